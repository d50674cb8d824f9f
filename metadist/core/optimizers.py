"""The outer update as a chain of small transformations on flat vectors.

A transformation is a pair of pure functions: ``init(value) -> memory`` and
``update(proposal, memory, context) -> (proposal, memory)``, both for one slot. A chain of transformations is a
transformation. ``OuterLoop`` builds this one for every slot:

    clip → optimiser (decay, scaling) → schedule → step → bounds

To add an optimiser, write a transformation where none of these fits, and add one line to ``OPTIMIZERS``;
``tests/core/test_optimizers.py`` tests every entry of that table. A transformation after the step sees the new values
in ``proposal.value``, and can keep a running average of them in its memory.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace

import torch
from torch import Tensor

Bounds = tuple[float | None, float | None]
Memory = Mapping[str, Tensor]
"""The vectors that a slot's chain keeps between updates, by name; each has the shape of the slot's vector."""


@dataclass(frozen=True)
class ParameterGroup:
    """The settings of one slot: the rate before the schedule, the weight decay, and bounds on the values."""

    lr: float
    weight_decay: float = 0.0
    bounds: Bounds = (None, None)


@dataclass(frozen=True)
class UpdateContext:
    """Everything that a transformation may know besides the vectors of its slot.

    ``meta_step`` counts from 0 and drives the schedule. ``updates`` is the number of earlier updates, for bias
    correction. ``gradient_norm`` is the norm of the mean gradient over all slots: with this norm given, every
    transformation is local to its slot.
    """

    group: ParameterGroup
    meta_step: int
    updates: int
    gradient_norm: float


@dataclass(frozen=True)
class Proposal:
    """A slot's vector ``value`` [n], and the proposed step ``direction / divisor`` [n], which is subtracted from it.

    ``direction`` starts as the mean gradient. ``divisor`` is separate because rounding depends on the order: Adam's
    rate multiplies the first moment *before* the division by the root of the second moment.
    """

    value: Tensor
    direction: Tensor
    divisor: Tensor | None = None

    @property
    def step(self) -> Tensor:
        """Return ``direction / divisor``."""
        return self.direction if self.divisor is None else self.direction / self.divisor


class Transformation:
    """One part of the update of a slot. Subclass it as a frozen dataclass; both methods are pure functions.

    ``update`` receives the memory of the slot's whole chain, and returns it with this transformation's own vectors
    replaced.
    """

    def init(self, value: Tensor) -> Memory:
        """Return this transformation's vectors before the first update of a slot with initial vector ``value``."""
        return {}

    def update(self, proposal: Proposal, memory: Memory, context: UpdateContext) -> tuple[Proposal, Memory]:
        """Return the changed proposal and the changed memory."""
        raise NotImplementedError


@dataclass(frozen=True)
class Chain(Transformation):
    """Apply ``parts`` one after the other. Raise ValueError where two parts keep a vector of the same name."""

    parts: tuple[Transformation, ...]

    def init(self, value: Tensor) -> Memory:
        memory: dict[str, Tensor] = {}
        for part in self.parts:
            own = part.init(value)
            if shared := memory.keys() & own.keys():
                raise ValueError(f"two transformations of one chain keep the vectors {sorted(shared)}; rename one")
            memory.update(own)
        return memory

    def update(self, proposal: Proposal, memory: Memory, context: UpdateContext) -> tuple[Proposal, Memory]:
        for part in self.parts:
            proposal, memory = part.update(proposal, memory, context)
        return proposal, memory


def chain(*parts: Transformation) -> Chain:
    """Return the transformation that applies ``parts`` in order."""
    return Chain(parts)


# Schedules ------------------------------------------------------------------------------------------------------------


def _constant(lr: float, final: float, done: float) -> float:
    return lr


def _linear(lr: float, final: float, done: float) -> float:
    return final + (lr - final) * max(0.0, 1 - done)


def _cosine(lr: float, final: float, done: float) -> float:
    return final + (lr - final) * 0.5 * (1 + math.cos(math.pi * min(1.0, done)))


SCHEDULES: dict[str, Callable[[float, float, float], float]] = {
    "constant": _constant,
    "linear": _linear,
    "cosine": _cosine,
}
"""(first rate, last rate, part of the meta-steps done in [0, 1]) → rate."""


@dataclass(frozen=True)
class Schedule:
    """The rate by meta-step: from ``lr`` to ``final_lr`` over ``meta_steps``, on the curve ``SCHEDULES[name]``."""

    name: str
    lr: float
    final_lr: float
    meta_steps: int

    def rate(self, lr: float, meta_step: int) -> float:
        """Return the rate at ``meta_step`` (from 0) of a slot that starts at ``lr``.

        The ratio of last to first rate is the same for all slots.
        """
        final = lr * (self.final_lr / self.lr if self.lr else 0.0)
        return SCHEDULES[self.name](lr, final, meta_step / self.meta_steps)


# Transformations ------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class ClipByGlobalNorm(Transformation):
    """Scale the gradient so that its norm over all slots is at most ``limit``."""

    limit: float

    def update(self, proposal: Proposal, memory: Memory, context: UpdateContext) -> tuple[Proposal, Memory]:
        if context.gradient_norm <= self.limit:
            return proposal, memory
        return replace(proposal, direction=proposal.direction * (self.limit / context.gradient_norm)), memory


@dataclass(frozen=True)
class CoupledDecay(Transformation):
    """Add ``weight_decay`` · value to the gradient: the gradient of an L2 penalty."""

    def update(self, proposal: Proposal, memory: Memory, context: UpdateContext) -> tuple[Proposal, Memory]:
        decay = context.group.weight_decay
        if not decay:
            return proposal, memory
        return replace(proposal, direction=proposal.step + decay * proposal.value, divisor=None), memory


@dataclass(frozen=True)
class DecoupledDecay(Transformation):
    """Multiply the values by 1 − rate · ``weight_decay`` (Loshchilov, Hutter 2019, algorithm 2), before the step."""

    schedule: Schedule

    def update(self, proposal: Proposal, memory: Memory, context: UpdateContext) -> tuple[Proposal, Memory]:
        decay = context.group.weight_decay
        if not decay:
            return proposal, memory
        rate = self.schedule.rate(context.group.lr, context.meta_step)
        return replace(proposal, value=proposal.value * (1 - rate * decay)), memory


@dataclass(frozen=True)
class Momentum(Transformation):
    """Replace the gradient g by the trace m ← ``momentum`` · m + g, kept as ``first``."""

    momentum: float

    def init(self, value: Tensor) -> Memory:
        return {"first": torch.zeros_like(value)}

    def update(self, proposal: Proposal, memory: Memory, context: UpdateContext) -> tuple[Proposal, Memory]:
        first = memory["first"] * self.momentum + proposal.step
        return replace(proposal, direction=first, divisor=None), {**memory, "first": first}


@dataclass(frozen=True)
class ScaleByAdam(Transformation):
    """Replace the gradient by m̂ / (√v̂ + ε) (Kingma, Ba 2015, algorithm 1), with m as ``first`` and v as
    ``second``.
    """

    betas: tuple[float, float]
    eps: float

    def init(self, value: Tensor) -> Memory:
        return {"first": torch.zeros_like(value), "second": torch.zeros_like(value)}

    def update(self, proposal: Proposal, memory: Memory, context: UpdateContext) -> tuple[Proposal, Memory]:
        (beta1, beta2), gradient, count = self.betas, proposal.step, context.updates + 1
        first = memory["first"] * beta1 + gradient * (1 - beta1)
        second = memory["second"] * beta2 + gradient.square() * (1 - beta2)
        root = (second / (1 - beta2**count)).sqrt() + self.eps
        changed = replace(proposal, direction=first / (1 - beta1**count), divisor=root)
        return changed, {**memory, "first": first, "second": second}


@dataclass(frozen=True)
class ScaleBySchedule(Transformation):
    """Multiply the step by the scheduled rate of the slot."""

    schedule: Schedule

    def update(self, proposal: Proposal, memory: Memory, context: UpdateContext) -> tuple[Proposal, Memory]:
        rate = self.schedule.rate(context.group.lr, context.meta_step)
        return replace(proposal, direction=rate * proposal.direction), memory


@dataclass(frozen=True)
class TakeStep(Transformation):
    """Subtract the step from the values, and leave no step."""

    def update(self, proposal: Proposal, memory: Memory, context: UpdateContext) -> tuple[Proposal, Memory]:
        value = proposal.value - proposal.step
        return Proposal(value, torch.zeros((), dtype=value.dtype, device=value.device)), memory


@dataclass(frozen=True)
class ClampToBounds(Transformation):
    """Clamp the values to the slot's bounds."""

    def update(self, proposal: Proposal, memory: Memory, context: UpdateContext) -> tuple[Proposal, Memory]:
        low, high = context.group.bounds
        if low is None and high is None:
            return proposal, memory
        return replace(proposal, value=proposal.value.clamp(low, high)), memory


# Optimisers -----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class OptimizerSettings:
    """The settings that an optimiser of ``OPTIMIZERS`` may use; fields are those of ``OuterLoop``."""

    momentum: float
    betas: tuple[float, float]
    eps: float
    schedule: Schedule


def _sgd(settings: OptimizerSettings) -> Chain:
    scaling = (Momentum(settings.momentum),) if settings.momentum else ()
    return chain(CoupledDecay(), *scaling)


def _adam(settings: OptimizerSettings) -> Chain:
    return chain(CoupledDecay(), ScaleByAdam(settings.betas, settings.eps))


def _adamw(settings: OptimizerSettings) -> Chain:
    return chain(DecoupledDecay(settings.schedule), ScaleByAdam(settings.betas, settings.eps))


OPTIMIZERS: dict[str, Callable[[OptimizerSettings], Chain]] = {"sgd": _sgd, "adam": _adam, "adamw": _adamw}
"""Optimisers by name: settings → the part of the chain between clipping and the schedule."""
