"""The inner loop: k differentiable optimiser steps on the support set."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal, Union

import torch
from torch import Tensor

from metadist.core.errors import ConfigError, one_of
from metadist.core.parameters import Parameters
from metadist.core.random import TaskKey
from metadist.core.task import Examples

InnerLoss = Callable[[Parameters, int], Tensor]
"""(φ, inner step) → scalar loss."""


@dataclass(frozen=True)
class Moments:
    """Inner-optimiser state: first and second moments like φ, and the number of steps behind them."""

    first: Parameters
    second: Parameters
    count: Union[int, Tensor]

    @classmethod
    def fresh(cls, phi: Parameters) -> Moments:
        zeros = phi.zeros()
        return cls(zeros, zeros, 0)


@dataclass(frozen=True)
class InnerLoop:
    """Fields and descent shared by every algorithm that adapts by gradient steps.

    ``inner_lr`` multiplies the gradient of the *mean* loss over the support set. Adam's ε stands inside the root,
    φ ← φ − α m̂ / √(v̂ + ε), so that the step is differentiable at zero.
    ``inner_batch_size`` smaller than the support set draws minibatches, epoch after epoch, keyed by the task.
    """

    inner_lr: float = 0.01
    inner_steps: int = 1
    inner_optimizer: Literal["sgd", "adam"] = "sgd"
    inner_momentum: float = 0.0
    inner_betas: tuple[float, float] = (0.9, 0.999)
    inner_eps: float = 1e-8
    inner_batch_size: int | None = None

    def __post_init__(self) -> None:
        one_of("algorithm.inner_optimizer", self.inner_optimizer, ("sgd", "adam"))
        if self.inner_steps < 0:
            raise ConfigError(f"algorithm.inner_steps: {self.inner_steps} is negative; expected 0 or more")
        if not 0 <= self.inner_momentum < 1:
            raise ConfigError(f"algorithm.inner_momentum: {self.inner_momentum} is not in [0, 1)")
        if self.inner_momentum and self.inner_optimizer == "adam":
            raise ConfigError("algorithm.inner_momentum goes with inner_optimizer: sgd; Adam's is inner_betas")
        if self.inner_batch_size is not None and self.inner_batch_size < 1:
            raise ConfigError(f"algorithm.inner_batch_size: {self.inner_batch_size} is below 1; use null for the whole set")

    def descend(
        self,
        loss: InnerLoss,
        phi: Parameters,
        *,
        lr: float | Parameters | None = None,
        first_order: bool = False,
        moments: Moments | None = None,
    ) -> list[tuple[Parameters, Moments]]:
        """φ_0 … φ_k with the optimiser's moments. ``first_order`` takes the inner gradients as constants."""
        rate = self.inner_lr if lr is None else lr
        moments = moments or Moments.fresh(phi)
        trajectory = [(phi, moments)]
        for step in range(self.inner_steps):
            gradient: Any = torch.func.grad(loss)(phi.detach() if first_order else phi, step)
            if first_order:  # the loss may hold on to θ besides φ: ANIL's body
                gradient = gradient.detach()
            phi, moments = self._update(phi, gradient, rate, moments)
            trajectory.append((phi, moments))
        return trajectory

    def _update(self, phi: Parameters, gradient: Parameters, rate: Any, moments: Moments) -> tuple[Parameters, Moments]:
        if self.inner_optimizer == "adam":
            beta1, beta2 = self.inner_betas
            count = moments.count + 1
            first = moments.first * beta1 + gradient * (1 - beta1)
            second = moments.second * beta2 + gradient.square() * (1 - beta2)
            step = (first / (1 - beta1**count)) / (second / (1 - beta2**count) + self.inner_eps).sqrt()
            return phi - step * rate, Moments(first, second, count)
        if self.inner_momentum:
            first = moments.first * self.inner_momentum + gradient
            return phi - first * rate, Moments(first, moments.second, moments.count + 1)
        return phi - gradient * rate, moments

    def minibatch(self, support: Examples, key: TaskKey, step: int) -> Examples:
        """The examples of inner step ``step``: all, or the next ``inner_batch_size`` of an endless shuffled sequence."""
        rows, size = support.x.shape[0], self.inner_batch_size
        if size is None or size >= rows:
            return support
        if support.mask is not None:
            raise ConfigError("algorithm.inner_batch_size: tasks of unequal size can't be cut into minibatches; set it to null")
        first, last = step * size, (step + 1) * size
        epochs = range(first // rows, (last - 1) // rows + 1)
        order = torch.cat([key.stream("minibatch", epoch).bits(rows).argsort(dim=-1, stable=True) for epoch in epochs])
        chosen = order[first - epochs[0] * rows : last - epochs[0] * rows]
        return Examples(support.x[chosen], support.y[chosen])
