"""The base of learned optimisers: networks that train networks, coordinate by coordinate."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar, Union

import torch
from torch import Tensor
from torch.func import grad_and_value

from metadist.algorithms.torch_optimizer import TorchOptimizer
from metadist.core.algorithm import Theta
from metadist.core.carried import CarriedContext
from metadist.core.errors import ConfigError, at_least
from metadist.core.model import InnerStep, Model
from metadist.core.parameters import Layout, Parameters
from metadist.core.random import integers
from metadist.core.state import Slot
from metadist.core.task import Examples
from metadist.core.tree import Tree, mapped
from metadist.core.tree import first as first_of
from metadist.engine.estimators import Inner, Unrolled

Memory = Mapping[str, Tensor]
"""The optimiser's memory of n coordinates: tensors by name."""


@dataclass(frozen=True, kw_only=True)
class LearnedOptimizer(Unrolled):
    """An optimiser with learned weights, the slot ``optimizer``; it trains the network of the config on each task.

    A particle is the training of one network on the support set of one task. Its minibatches have ``batch_size`` rows
    (null: all), drawn with replacement. The network's parameters start at their usual initial values; the optimiser
    sees each parameter tensor divided by a factor that is drawn from ``scales``, log-uniformly and by task, so that it
    has to cope with scales that it has not seen (Metz et al. 2022, appendix B). With ``first_order`` the gradient of
    the training loss counts as a constant: second derivatives are dropped (Andrychowicz et al. 2016, section 2.1).

    The slot ``model`` is empty: no initial parameters are learned, and the optimiser goes with any network.

    A subclass writes ``weights``, ``memory`` and ``update``, all on vectors of coordinates. ``update`` may compare the
    coordinates of one tensor (``sizes``), and those of different tensors never.
    """

    learned: ClassVar[tuple[str, ...]] = ("optimizer",)

    batch_size: Union[int, None] = 32
    scales: tuple[float, float] = (1.0, 1.0)
    first_order: bool = True
    evaluation_steps: int = 1000

    def __post_init__(self) -> None:
        super().__post_init__()
        at_least(1, **{"algorithm.batch_size": self.batch_size, "algorithm.evaluation_steps": self.evaluation_steps})
        if not 0 < self.scales[0] <= self.scales[1] < math.inf:
            raise ConfigError(f"algorithm.scales: {list(self.scales)}; expected (low, high) with 0 < low ≤ high")

    def weights(self, dtype: torch.dtype) -> Parameters:
        """Return the initial weights of the optimiser."""
        raise NotImplementedError

    def memory(self, parameters: Tensor) -> Memory:
        """Return the memory before the first step on ``parameters`` [n]."""
        raise NotImplementedError

    def update(
        self, weights: Parameters, parameters: Tensor, gradient: Tensor, memory: Memory, sizes: Sequence[int]
    ) -> tuple[Tensor, Memory]:
        """Return the new parameters [n] and memory. ``sizes`` are the elements of each tensor, whose sum is n."""
        raise NotImplementedError

    # The particle -----------------------------------------------------------------------------------------------------

    def slots(self, model: Model, parameters: Parameters) -> dict[str, tuple[Slot, Parameters]]:
        weights, nothing = self.weights(next(iter(parameters.values())).dtype), Parameters({})
        return {
            "model": (Slot(Layout.of(nothing), "constant"), nothing),
            "optimizer": (Slot(Layout.of(weights)), weights),
        }

    def begin(self, theta: Theta, context: CarriedContext) -> Inner:
        initial = context.fresh()
        layout = Layout.of(initial)
        parameters = layout.flatten(initial) / self._factors(layout, context)
        return {"parameters": layout.unflatten(parameters), "memory": dict(self.memory(parameters))}

    def inner_step(self, theta: Theta, inner: Inner, context: CarriedContext, index: InnerStep) -> tuple[Inner, Tensor]:
        return self._step(theta, inner, context, index, self._batch(context, self._rows(context, index, 1)[0]))

    def inner_steps_of(self, theta: Theta, inner: Inner, context: CarriedContext, count: int) -> tuple[Inner, Tensor]:
        estimator = context.model.engine.differentiation
        if count == 1 and estimator != "pes":
            raise ConfigError(
                f"algorithm.window: 1 with engine.differentiation: {estimator} learns nothing: the loss of a step is "
                "that before its update; use 2 or more, or pes"
            )
        losses = []
        for index, rows in enumerate(self._rows(context, 0, count)):
            inner, loss = self._step(theta, inner, context, index, self._batch(context, rows))
            losses.append(loss)
        return inner, torch.stack(losses).mean()

    def _step(
        self, theta: Theta, inner: Inner, context: CarriedContext, index: InnerStep, batch: Examples
    ) -> tuple[Inner, Tensor]:
        given: Parameters = inner["parameters"]
        layout = Layout.of(given)
        parameters, factors = layout.flatten(Parameters(given)), self._factors(layout, context)

        def loss_of(vector: Tensor) -> Tensor:
            used = layout.unflatten(vector * factors)
            return context.loss(context.model(used, batch.x, step=index), batch)

        gradient: Any
        gradient, loss = grad_and_value(loss_of)(parameters.detach() if self.first_order else parameters)
        if self.first_order:
            gradient, loss = gradient.detach(), loss.detach()
            # The derivative of the loss by the parameters is known: a second pass through the network is not needed.
            loss = loss + gradient @ (parameters - parameters.detach())
        after, memory = self.update(theta["optimizer"], parameters, gradient, inner["memory"], layout.sizes)
        return {"parameters": Parameters(dict(layout.unflatten(after))), "memory": dict(memory)}, loss

    def predict(self, theta: Theta, state: Inner, x: Tree, context: CarriedContext) -> Tree:
        layout = Layout.of(state["parameters"])
        vector = layout.flatten(Parameters(state["parameters"])) * self._factors(layout, context)
        return context.model(layout.unflatten(vector), x)

    def _factors(self, layout: Layout, context: CarriedContext) -> Union[float, Tensor]:
        """Return the factor between the optimiser's view of each coordinate and the network's: [n], or 1."""
        low, high = self.scales
        if high == 1.0 == low:
            return 1.0
        uniform = context.life.stream("scales").uniform(len(layout.sizes)).double()
        factors = (math.log(low) + math.log(high / low) * uniform).exp().to(layout.dtype)
        return torch.cat([f.expand(size) for f, size in zip(factors.unbind(-1), layout.sizes)])

    def _rows(self, context: CarriedContext, first: InnerStep, count: int) -> Sequence[Tensor | None]:
        """Draw the rows of the minibatches of ``count`` steps from ``first`` on; None for all rows."""
        support, size = context.task.support, self.batch_size
        if size is None:
            return [None] * count
        steps = torch.arange(count, device=first_of(support.y).device).unsqueeze(-1) + first
        keys = replace(context.key, tasks=context.key.tasks.expand(count))
        words = keys.stream("minibatch", steps).bits(size)
        if support.mask is None:
            return integers(words, support.rows).unbind(0)
        real = support.mask.bool()
        order = real.logical_not().long().argsort(dim=-1, stable=True)  # the real rows come first
        return order[(words * real.sum()) >> 32].unbind(0)

    @staticmethod
    def _batch(context: CarriedContext, rows: Tensor | None) -> Examples:
        support = context.task.support
        if rows is None:
            return support
        return Examples(*(mapped(lambda t: t[rows], part) for part in (support.x, support.y)))

    # For a user's own network -----------------------------------------------------------------------------------------

    def optimizer(self, theta: Theta, parameters: Iterable[Any]) -> torch.optim.Optimizer:
        return TorchOptimizer(parameters, self, theta["optimizer"])
