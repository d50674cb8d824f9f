"""The inner loop: k differentiable optimiser steps on the support set."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal, Union, final

import torch
import torch.utils._pytree as pytree
from torch import Tensor

from metadist.core.algorithm import Algorithm, Phi, TaskContext, Theta
from metadist.core.engine import Engine
from metadist.core.errors import ConfigError, one_of, within
from metadist.core.model import BoundModel, InnerStep
from metadist.core.parameters import Parameters, Scalar
from metadist.core.random import TaskKey
from metadist.core.task import Examples
from metadist.core.tree import mapped

InnerLoss = Callable[[Parameters, InnerStep], Tensor]
"""(φ, inner step) → scalar loss."""
Rate = Union[float, Tensor, Parameters]
"""An inner learning rate: one for all parameters, or one for each."""


@dataclass(frozen=True)
class Moments:
    """The state of an inner optimiser: first and second moments with the shapes of φ (empty where the optimiser keeps
    none), and the number of steps so far.

    With ``counted``, the count is a tensor and a leaf of the pytree: a whole number in float64, because the leaves are
    differentiated, which integers cannot be. Otherwise it is a number, which is the same for all tasks and not a leaf.
    """

    first: Parameters
    second: Parameters
    count: Union[int, Tensor] = 0
    counted: bool = False


def _moments(values: Any, count: int | None) -> Moments:
    first, second, *counted = values
    return Moments(first, second, counted[0], counted=True) if counted else Moments(first, second, count or 0)


pytree.register_pytree_node(
    Moments,
    lambda m: ([m.first, m.second, m.count], None) if m.counted else ([m.first, m.second], m.count),
    _moments,
    serialized_type_name="metadist.core.Moments",
)

InnerState = tuple[Parameters, Moments]


def _bias_correction(beta: float, count: Union[int, Tensor], like: Parameters) -> Scalar:
    """Return 1 − βᵗ after ``count`` = t steps. In float32 the difference would lose the digits that β has above 1 − β.

    For a tensor the result has the dtype of ``like``.
    """
    if not isinstance(count, Tensor):
        return 1 - beta**count
    if beta == 0:
        return 1.0
    exact = -torch.expm1(count.detach().double() * math.log(beta))
    return exact.to(next(iter(like.values())).dtype)


@dataclass(frozen=True)
class Descent:
    """The description of one task's inner loop: minimise ``loss`` from ``phi`` at ``rate``.

    ``first_order`` treats the inner gradients as constants. ``finish`` converts (φ, moments) to the φ that ``predict``
    reads.
    """

    loss: InnerLoss
    phi: Parameters
    rate: Rate
    moments: Moments
    first_order: bool = False
    finish: Callable[[Parameters, Moments], Phi] = lambda phi, moments: phi

    @property
    def start(self) -> InnerState:
        """The state before the first step."""
        return self.phi, self.moments


@dataclass(frozen=True)
class Implicit:
    """Solve A x = v at the minimum of the inner loss g, A = ∇²g + ``damping`` I, by ``iterations`` products with A.

    ``cg`` is the method of conjugate gradients, which needs a positive definite A. ``neumann`` sums the first terms of
    the Neumann series step · Σ_i (I − step A)^i v, which converges where 0 < ``step`` < 2 / (largest eigenvalue of A).
    """

    solver: Literal["cg", "neumann"] = "cg"
    iterations: int = 5
    damping: float = 0.0
    step: float = 0.0


@dataclass(frozen=True)
class InnerLoop(Algorithm):
    """The base of all algorithms that adapt by gradient steps. A subclass defines ``descent``.

    An inner optimiser of your own overrides ``update``, and ``fresh`` where it keeps other moments. No other method is
    made for it: mixed differentiation takes a step apart into gradient and update, so ``step`` is final, and an
    algorithm that overrides ``step`` or ``adapt`` is differentiated through its recorded inner loop.

    ``inner_lr`` multiplies the gradient of the *mean* loss over the support set. Adam's ε is inside the root,
    φ ← φ − α m̂ / √(v̂ + ε), so that the step is differentiable at zero.
    An ``inner_batch_size`` below the size of the support set draws minibatches, one epoch after another, keyed by the
    task.
    """

    #: the values of ``inner_optimizer`` with which the ``update`` *of this class* is linear in (φ, gradient, moments);
    #: mixed differentiation then differentiates it without a value of the gradient. A class that overrides ``update``
    #: declares its own; without a declaration, its ``update`` is not linear.
    linear_optimizers: ClassVar[tuple[str, ...]] = ("sgd",)

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
        within(0, math.inf, **{f"algorithm.{name}": getattr(self, name) for name in ("inner_lr", "inner_eps")})
        betas = {f"algorithm.inner_betas[{i}]": beta for i, beta in enumerate(self.inner_betas)}
        within(0, 1, **{"algorithm.inner_momentum": self.inner_momentum, **betas})
        if self.inner_momentum and self.inner_optimizer == "adam":
            raise ConfigError(
                f"algorithm.inner_momentum: {self.inner_momentum} goes with inner_optimizer: sgd; adam has inner_betas"
            )
        if self.inner_batch_size is not None and self.inner_batch_size < 1:
            raise ConfigError(
                f"algorithm.inner_batch_size: {self.inner_batch_size} is below 1; use null for the whole set"
            )

    def descent(self, model: BoundModel, theta: Theta, support: Examples, context: TaskContext) -> Descent:
        """Return the inner loop of one task."""
        raise NotImplementedError

    def adapt(self, model: BoundModel, theta: Theta, support: Examples, context: TaskContext) -> Sequence[Phi]:
        """Return φ_0 … φ_k, each after ``finish``."""
        descent = self.descent(model, theta, support, context)
        states = [descent.start]
        for step in range(self.inner_steps):
            states.append(self.step(descent, states[-1], step))
        return [descent.finish(*state) for state in states]

    def release(self, engine: Engine) -> int:
        traced = engine.compile and engine.differentiation == "mixed"  # the count of Adam's steps is then a tensor
        return 2 if self.inner_optimizer == "adam" and traced else super().release(engine)

    @property
    def update_is_linear(self) -> bool:
        """Whether the class that defines ``update`` declares it linear under ``inner_optimizer``."""
        defined_by = next(cls for cls in type(self).__mro__ if "update" in vars(cls))
        return self.inner_optimizer in vars(defined_by).get("linear_optimizers", ())

    @property
    def implicit(self) -> Implicit | None:
        """How implicit differentiation solves its linear system; None where it is not defined for the algorithm.

        An algorithm that returns settings states that its steps minimise one loss (``descent().loss``), that the
        minimum depends on θ, and that the minimum is unique: the start φ_0 and the rate then have no gradient.
        """
        return None

    @property
    def overridden(self) -> str | None:
        """The name of a method that only unrolled differentiation follows where a subclass overrides it, or None."""
        own = type(self)
        return "adapt" if own.adapt is not InnerLoop.adapt else "step" if own.step is not InnerLoop.step else None

    @final
    def step(self, descent: Descent, state: InnerState, step: InnerStep) -> InnerState:
        """Return the state after one optimiser step from ``state``."""
        phi, moments = state
        gradient: Any = torch.func.grad(descent.loss)(phi.detach() if descent.first_order else phi, step)
        if descent.first_order:  # the loss may depend on θ besides φ, such as on ANIL's body
            gradient = gradient.detach()
        return self.update(phi, gradient, descent.rate, moments)

    def update(self, phi: Parameters, gradient: Parameters, rate: Rate, moments: Moments) -> InnerState:
        """Apply the inner optimiser's formula to ``gradient``; return the new state.

        The one place for an inner optimiser of your own: a function of its four arguments alone.
        """
        if self.inner_optimizer == "adam":
            beta1, beta2 = self.inner_betas
            count = moments.count + 1
            first = moments.first * beta1 + gradient * (1 - beta1)
            second = moments.second * beta2 + gradient.square() * (1 - beta2)
            corrections = (_bias_correction(beta, count, first) for beta in self.inner_betas)
            step = (first / next(corrections)) / (second / next(corrections) + self.inner_eps).sqrt()
            return phi - step * rate, Moments(first, second, count, moments.counted)
        if self.inner_momentum:
            first = moments.first * self.inner_momentum + gradient
            return phi - first * rate, Moments(first, moments.second, moments.count + 1, moments.counted)
        return phi - gradient * rate, moments

    def fresh(self, phi: Parameters) -> Moments:
        """Return the moments before the first step from ``phi``."""
        none = Parameters({})
        first = phi.zeros() if self.inner_optimizer == "adam" or self.inner_momentum else none
        return Moments(first, phi.zeros() if self.inner_optimizer == "adam" else none)

    def support_loss(
        self,
        model: BoundModel,
        support: Examples,
        context: TaskContext,
        whole: Callable[[Parameters], Parameters] = lambda phi: phi,
    ) -> InnerLoss:
        """Return the task's loss on the support set, or on its minibatches.

        ``whole`` adds the parameters that do not adapt to φ, to give all parameters of the model.
        """

        def loss(phi: Parameters, step: InnerStep) -> Tensor:
            batch = self.minibatch(support, context.key, step)
            return context.loss(model(whole(phi), batch.x, step=step), batch)

        return loss

    def minibatch(self, support: Examples, key: TaskKey, step: InnerStep) -> Examples:
        """Return the examples of inner step ``step``: all, or the next ``inner_batch_size`` of an endless sequence of
        shuffled epochs."""
        rows, size = support.rows, self.inner_batch_size
        if size is None or size >= rows:
            return support
        if support.mask is not None:
            return self._masked_minibatch(support, key, step, size)
        epoch, first = step * size // rows, step * size % rows
        epochs = (epoch, epoch + 1) if isinstance(step, Tensor) or first + size > rows else (epoch,)
        order = torch.cat([key.stream("minibatch", e).bits(rows).argsort(dim=-1, stable=True) for e in epochs])
        chosen = order[first + torch.arange(size, device=order.device)]
        return _rows(support, chosen, None)

    @staticmethod
    def _masked_minibatch(support: Examples, key: TaskKey, step: InnerStep, size: int) -> Examples:
        """Return the minibatch that the real rows alone have: all of them where they are at most ``size``.

        Words of a stream do not depend on their number, so the order of the real rows is that without padding.
        """
        assert support.mask is not None
        padding, place = ~support.mask.bool(), torch.arange(size, device=support.mask.device)
        count = (~padding).sum()
        few = count <= size
        epoch, first = step * size // count, step * size % count

        def order(epoch: Tensor) -> Tensor:
            words = key.stream("minibatch", epoch).bits(len(padding))
            return torch.where(padding, 1 << 32, words).argsort(dim=-1, stable=True)

        epoch, place = torch.where(few, 0, epoch), torch.where(few, place, first + place)
        later = place >= count
        own = order(epoch)[place.clamp(max=len(padding) - 1)]
        following = order(epoch + 1)[(place - count).clamp(min=0, max=len(padding) - 1)]
        chosen = torch.where(later & ~few, following, own)
        return _rows(support, chosen, ~(later & few))


def _rows(support: Examples, chosen: Tensor, mask: Tensor | None) -> Examples:
    x, y = (mapped(lambda t: t[chosen], part) for part in (support.x, support.y))
    return Examples(x, y, mask)
