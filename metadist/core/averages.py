"""Averages of a slot's values over the updates: exponential, over the tail of a run, and of schedule-free learning.

Each keeps the vector ``AVERAGE`` in the outer state. Training uses the values of the slot; evaluation, export and
service use the average (``State.judged``). Averages of values within bounds leave these by rounding, so they are
clamped.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from metadist.core.schedules import Schedule
from metadist.core.state import AVERAGE
from metadist.core.transformations import Memory, Proposal, Transformation, UpdateContext


@dataclass(frozen=True)
class ExponentialAverage(Transformation):
    """Keep a ← ``decay`` · a + (1 − ``decay``) · θ, which is θ after the first update (Polyak, Juditsky 1992)."""

    decay: float

    def init(self, value: Tensor) -> Memory:
        return {AVERAGE: value}

    def update(self, proposal: Proposal, memory: Memory, context: UpdateContext) -> tuple[Proposal, Memory]:
        value = proposal.value
        average = memory[AVERAGE] * self.decay + value * (1 - self.decay) if context.updates else value
        return proposal, {**memory, AVERAGE: context.group.within_bounds(average)}


@dataclass(frozen=True)
class TailAverage(Transformation):
    """Keep the mean of θ after each update from meta-step ``start`` on, and θ itself before (Izmailov et al. 2018).

    ``averaged`` [1] counts the updates in the mean.
    """

    start: int

    def init(self, value: Tensor) -> Memory:
        return {AVERAGE: value, "averaged": torch.zeros(1, dtype=torch.float64)}

    def update(self, proposal: Proposal, memory: Memory, context: UpdateContext) -> tuple[Proposal, Memory]:
        value = proposal.value
        if context.meta_step < self.start:
            return proposal, {**memory, AVERAGE: value}
        count = memory["averaged"] + 1
        average = memory[AVERAGE] + (value - memory[AVERAGE]) / float(count)
        return proposal, {**memory, AVERAGE: context.group.within_bounds(average), "averaged": count}


@dataclass(frozen=True)
class StepFromBase(Transformation):
    """Begin an update of schedule-free learning: the step is taken from z, after its decay by rate · λ · y.

    The slot holds y, where the gradient is taken. ``base`` is z and ``AVERAGE`` is x.
    """

    schedule: Schedule

    def init(self, value: Tensor) -> Memory:
        return {"base": value, AVERAGE: value, "weights": torch.zeros(1, dtype=torch.float64)}

    def update(self, proposal: Proposal, memory: Memory, context: UpdateContext) -> tuple[Proposal, Memory]:
        base, decay = memory["base"], context.group.weight_decay
        if decay:
            rate = self.schedule.rate(context.group.lr, context.meta_step)
            base = base - (rate * decay) * proposal.value
        return replace(proposal, value=base), memory


@dataclass(frozen=True)
class Interpolate(Transformation):
    """End an update of schedule-free learning (Defazio et al. 2024, algorithm 1): average z, and move y.

    x ← (1 − c) x + c z with c = rate² / Σ rate², and y = (1 − ``beta``) z + ``beta`` x. ``weights`` [1] is Σ rate².
    """

    beta: float
    schedule: Schedule

    def update(self, proposal: Proposal, memory: Memory, context: UpdateContext) -> tuple[Proposal, Memory]:
        base, weight = proposal.value, self.schedule.rate(context.group.lr, context.meta_step) ** 2
        weights = memory["weights"] + weight
        total = float(weights)
        # Differences, so that x and y stay where they are if z does not move.
        average = memory[AVERAGE] + (weight / total if total else 0.0) * (base - memory[AVERAGE])
        average = context.group.within_bounds(average)
        value = context.group.within_bounds(average + (1 - self.beta) * (base - average))
        return replace(proposal, value=value), {**memory, "base": base, AVERAGE: average, "weights": weights}
