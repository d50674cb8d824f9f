"""Estimate the gradient of a long unrolled computation, one window of inner steps per meta-step.

``engine.differentiation`` chooses the estimator. With the window's mean loss L, and noise ε ~ N(0, σ²) of the learned
slots, keyed by meta-step and particle:

``truncated``: ∇L through the window alone (truncated backpropagation through time). Biased: it does not see the effect
    of θ on later windows. Its memory grows with the window.
``es``: (L⁺ − L⁻) / (2σ²) · ε, where the window starts twice from one state, under θ + ε and θ − ε (antithetic evolution
    strategies). Biased in the same way; no derivative, and no memory for one; the state continues under θ.
``pes``: (L⁺ − L⁻) / (2σ²) · Σ ε, where two states continue under θ + ε and θ − ε, and the sum is over the windows since
    the particle started (persistent evolution strategies: Vicol, Metz, Sohl-Dickstein 2021, algorithm 2). Its mean is
    the gradient of the whole unroll, smoothed by σ.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar, Union, final

import torch
import torch.utils._pytree as pytree
from torch import Tensor
from torch.func import grad, vmap

from metadist.core.algorithm import Theta
from metadist.core.carried import CarriedAlgorithm, CarriedContext, CarriedContribution, ParticleState
from metadist.core.errors import ConfigError, at_least
from metadist.core.model import InnerStep
from metadist.core.parameters import Parameters
from metadist.core.random import TaskKey
from metadist.engine.functions import mapped

#: the values of ``engine.differentiation`` for algorithms with carried state, and their price
ESTIMATORS = {
    "truncated": "biased towards effects within one window; memory grows with the window",
    "es": "biased towards effects within one window; noise instead of a derivative; three windows of time, constant "
    "memory",
    "pes": "unbiased over the whole unroll but for the smoothing by sigma; noise grows with the number of windows; two "
    "windows of time, constant memory",
}

Inner = Any
"""The inner state of a computation: a pytree of tensors."""
Learned = dict[str, Parameters]
"""The learned slots of θ."""
Window = Callable[[Learned, Inner], tuple[Inner, Tensor]]
"""One window of a particle: (learned slots, inner state) → (inner state, mean loss)."""
Estimate = tuple[Learned, Inner, Tensor]
"""(gradient by slot, the inner state after the window, mean loss)."""


@dataclass(frozen=True)
class Pair:
    """PES's state of a particle: the inner states under θ + ε and θ − ε, stacked [2, …], and Σ ε of each slot."""

    states: Inner
    noise: Learned


pytree.register_pytree_node(
    Pair,
    lambda p: ([p.states, p.noise], None),
    lambda values, _: Pair(*values),
    serialized_type_name="metadist.engine.Pair",
)


def truncated(window: Window, learned: Learned, state: Inner) -> Estimate:
    """Differentiate through one window: TBPTT."""

    def objective(learned: Learned) -> tuple[Tensor, tuple[Inner, Tensor]]:
        after, loss = window(learned, state)
        return loss, (mapped(torch.Tensor.detach, after), loss.detach())

    gradient, (after, loss) = grad(objective, has_aux=True)(learned)
    return gradient, after, loss


def es(window: Window, learned: Learned, state: Inner, noise: Learned, sigma: float) -> Estimate:
    """Compare one window under θ ± ε from one state. ``noise`` is ε."""
    losses = vmap(lambda sign: window(_moved(learned, noise, sign), state)[1])(_signs(learned))
    after, loss = window(learned, state)
    return _weighted(noise, losses, sigma), after, loss


def pes(window: Window, learned: Learned, pair: Pair, noise: Learned, sigma: float) -> tuple[Learned, Pair, Tensor]:
    """Continue two states under θ ± ε, and weight the difference of their losses by the sum of all noise."""

    def continued(sign: Tensor, state: Inner) -> tuple[Inner, Tensor]:
        return window(_moved(learned, noise, sign), state)

    states, losses = vmap(continued)(_signs(learned), pair.states)
    total = {slot: pair.noise[slot] + noise[slot] for slot in noise}
    return _weighted(total, losses, sigma), Pair(states, total), losses.mean()


def _signs(learned: Learned) -> Tensor:
    like = next(iter(next(iter(learned.values())).values()))
    return torch.tensor([1.0, -1.0], dtype=like.dtype, device=like.device)


def _moved(learned: Learned, noise: Learned, sign: Tensor) -> Learned:
    return {slot: p + noise[slot] * sign for slot, p in learned.items()}


def _weighted(noise: Learned, losses: Tensor, sigma: float) -> Learned:
    scale = (losses[0] - losses[1]) / (2 * sigma**2)
    return {slot: p * scale for slot, p in noise.items()}


def perturbation(learned: Learned, key: TaskKey, sigma: float) -> Learned:
    """Draw ε ~ N(0, σ²) for every learned slot, keyed by meta-step and particle."""
    drawn = {}
    for slot, parameters in learned.items():
        sizes = [t.numel() for t in parameters.values()]
        values = key.stream(f"perturbation of {slot}").normal(sum(sizes))
        parts = values.split(sizes)
        drawn[slot] = Parameters(
            {n: (part.view(t.shape) * sigma).to(t.dtype) for (n, t), part in zip(parameters.items(), parts)}
        )
    return drawn


@dataclass(frozen=True, kw_only=True)
class Unrolled(CarriedAlgorithm):
    """A long inner computation, such as the training of a network by a learned optimiser.

    A subclass is a frozen dataclass and writes ``begin`` and ``inner_step``, and ``predict`` for evaluation; it
    declares the slots that it learns in ``learned``. A meta-step is a window of ``window`` inner steps; ``unroll`` is
    the number of inner steps after which a particle starts afresh, or the bounds (low, high) from which each particle
    draws it at its start, log-uniformly. ``sigma`` is the standard deviation of the noise of ``es`` and ``pes``.

    Source: Vicol, Metz, Sohl-Dickstein 2021, "Unbiased gradient estimation in unrolled computation graphs with
    persistent evolution strategies", algorithms 1 and 2.
    """

    estimated = True
    #: the slots that are differentiated; all others are constants
    learned: ClassVar[tuple[str, ...]] = ("model",)

    window: int = 20
    unroll: Union[int, tuple[int, int]] = 100
    sigma: float = 0.01

    def __post_init__(self) -> None:
        at_least(1, **{"algorithm.window": self.window})
        low, high = self.bounds
        if not self.window <= low <= high:
            raise ConfigError(
                f"algorithm.unroll: {self.unroll} with algorithm.window: {self.window}; expected a number of inner "
                "steps, or (low, high) with low ≤ high, of at least one window"
            )
        if isinstance(self.unroll, int) and self.unroll % self.window:
            nearest = self.unroll // self.window * self.window
            raise ConfigError(
                f"algorithm.unroll: {self.unroll} is no multiple of algorithm.window: {self.window}; use {nearest} or "
                f"{nearest + self.window}"
            )
        if not self.sigma > 0:
            raise ConfigError(f"algorithm.sigma: {self.sigma} is not above 0; 0.01 is usual")

    @property
    def bounds(self) -> tuple[int, int]:
        """The smallest and the largest number of inner steps of a particle."""
        return (self.unroll, self.unroll) if isinstance(self.unroll, int) else self.unroll

    # Written by subclasses ------------------------------------------------------------------------------------------

    def begin(self, theta: Theta, context: CarriedContext) -> Inner:
        """Return the inner state before the first step. It is a constant: see ``enter``."""
        raise NotImplementedError

    def enter(self, theta: Theta, inner: Inner, context: CarriedContext) -> Inner:
        """Return the inner state before the first step, differentiably in θ, from that of ``begin``.

        Override it where the computation starts from learned values. It has the shapes of ``begin``'s state.
        """
        return inner

    def inner_step(self, theta: Theta, inner: Inner, context: CarriedContext, index: InnerStep) -> tuple[Inner, Tensor]:
        """Return the inner state after step ``index`` of this meta-step (from 0), and the step's loss."""
        raise NotImplementedError

    def inner_steps_of(self, theta: Theta, inner: Inner, context: CarriedContext, count: int) -> tuple[Inner, Tensor]:
        """Return the inner state after ``count`` steps, and their mean loss. Override it to draw all data at once."""
        total: Any = 0.0
        for index in range(count):
            inner, loss = self.inner_step(theta, inner, context, index)
            total = total + loss
        return inner, total / count

    # The particle's life ----------------------------------------------------------------------------------------------

    def lifetime(self, context: CarriedContext) -> int:
        """Return the number of windows until the particle starts afresh."""
        low, high = self.bounds
        uniform = float(context.key.stream("unroll").uniform(1).double())
        steps = low * math.exp(math.log(high / low) * uniform)
        return max(1, round(steps / self.window))

    @final
    def start(self, theta: Theta, context: CarriedContext) -> ParticleState:
        inner = self.begin(theta, context)
        if not context.training:
            return self.enter(theta, inner, context)
        if context.model.engine.differentiation != "pes":
            return inner
        zeros = {slot: theta[slot].zeros() for slot in self.learned}
        return Pair(mapped(lambda t: torch.stack((t, t)), inner), zeros)

    @final
    def advance(
        self, theta: Theta, state: ParticleState, context: CarriedContext
    ) -> tuple[ParticleState, CarriedContribution]:
        learned: Learned = {slot: theta[slot] for slot in self.learned}
        entered = type(self).enter is not Unrolled.enter

        def window(learned: Learned, inner: Inner) -> tuple[Inner, Tensor]:
            given = {**theta, **learned}
            if entered:
                inner = _where(context.age == 0, self.enter(given, inner, context), inner)
            return self.inner_steps_of(given, inner, context, self.window)

        chosen = context.model.engine.differentiation
        if chosen in ("es", "pes"):
            noise = perturbation(learned, context.key, self.sigma)
            gradient, state, loss = (es if chosen == "es" else pes)(window, learned, state, noise, self.sigma)
        else:
            gradient, state, loss = truncated(window, learned, state)
        return state, CarriedContribution(gradient, {"loss": loss})

    def step(self, theta: Theta, state: ParticleState, context: CarriedContext, index: InnerStep) -> ParticleState:
        return self.inner_step(theta, state, context, index)[0]


def _where(first: Union[bool, Tensor], a: Inner, b: Inner) -> Inner:
    if isinstance(first, bool):
        return a if first else b
    return pytree.tree_map(lambda x, y: torch.where(first, x, y), a, b)
