"""Small transformations on flat vectors, of which the outer update of a slot is a chain.

A transformation is a pair of pure functions: ``init(value) -> memory`` and
``update(proposal, memory, context) -> (proposal, memory)``, both for one slot. A chain of transformations is a
transformation. A transformation after the step sees the new values in ``proposal.value``, and can keep a running
average of them in its memory.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from metadist.core.schedules import Schedule

Bounds = tuple[float | None, float | None]
Memory = Mapping[str, Tensor]
"""The tensors that a slot's chain keeps between updates, by name: vectors of the slot's shape, or one number [1]."""


def squared_norm(vector: Tensor) -> Tensor:
    """Return Σ v² in float64, added up in blocks of fixed size: the result does not depend on the number of threads."""
    square = vector.double().square()
    while square.numel() > 1024:
        square = torch.nn.functional.pad(square, (0, -square.numel() % 1024)).view(-1, 1024).sum(1)
    return square.sum()


@dataclass(frozen=True)
class ParameterGroup:
    """The settings of one slot: the rate before the schedule, the weight decay, and bounds on the values."""

    lr: float
    weight_decay: float = 0.0
    bounds: Bounds = (None, None)

    def within_bounds(self, value: Tensor) -> Tensor:
        """Return ``value``, clamped to the bounds where there are some."""
        low, high = self.bounds
        return value if low is None and high is None else value.clamp(low, high)


@dataclass(frozen=True)
class UpdateContext:
    """Everything that a transformation may know besides the vectors of its slot.

    ``meta_step`` counts from 0 and drives the schedule. ``updates`` is the number of earlier updates, for bias
    correction. ``gradient_norm`` is the norm of the mean gradient over all slots that are clipped together: with this
    norm given, every transformation is local to its slot.
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


# Transformations ------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class ClipByGlobalNorm(Transformation):
    """Scale the gradient so that its norm over the slots that are clipped together is at most ``limit``."""

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
class ScaleByRootMeanSquare(Transformation):
    """Replace the gradient by g / (√v̂ + ε) (Adam's second moment alone), with v as ``second``."""

    beta: float
    eps: float

    def init(self, value: Tensor) -> Memory:
        return {"second": torch.zeros_like(value)}

    def update(self, proposal: Proposal, memory: Memory, context: UpdateContext) -> tuple[Proposal, Memory]:
        gradient = proposal.step
        second = memory["second"] * self.beta + gradient.square() * (1 - self.beta)
        root = (second / (1 - self.beta ** (context.updates + 1))).sqrt() + self.eps
        return replace(proposal, direction=gradient, divisor=root), {**memory, "second": second}


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
        return replace(proposal, value=context.group.within_bounds(proposal.value)), memory
