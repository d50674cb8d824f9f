"""Optimisers by name: each is a chain of transformations of one slot.

``SlotSettings.chain`` is the whole update of a slot:

    clip → optimiser (decay, scaling) → schedule → step → bounds → averages

To add an optimiser, write a transformation where none of ``transformations.py`` fits, and add one line to
``OPTIMIZERS``; ``tests/core/test_optimizers.py`` tests every entry of that table.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from metadist.core.averages import ExponentialAverage, Interpolate, StepFromBase, TailAverage
from metadist.core.muon import ScaleByMuon
from metadist.core.parameters import Layout
from metadist.core.schedules import Schedule
from metadist.core.transformations import (
    Chain,
    ClampToBounds,
    ClipByGlobalNorm,
    CoupledDecay,
    DecoupledDecay,
    Momentum,
    ParameterGroup,
    ScaleByAdam,
    ScaleByRootMeanSquare,
    ScaleBySchedule,
    TakeStep,
    Transformation,
    chain,
)

Parts = tuple[Transformation, ...]


@dataclass(frozen=True)
class SlotSettings:
    """The settings of the update of one slot, after every fallback; fields are keys of ``outer``.

    ``momentum`` is None for the optimiser's own. ``tail_start`` is the first meta-step of the average over the tail.
    """

    optimizer: str
    group: ParameterGroup
    schedule: Schedule
    momentum: float | None
    betas: tuple[float, float]
    eps: float
    layout: Layout
    matrices: tuple[str, ...] = ()
    clip_norm: float | None = None
    ema: float | None = None
    tail_start: int | None = None

    def chain(self) -> Chain:
        """Return the update: clip → optimiser → schedule → step → bounds → averages."""
        optimizer = OPTIMIZERS[self.optimizer]
        clip: Parts = () if self.clip_norm is None else (ClipByGlobalNorm(self.clip_norm),)
        averages: Parts = () if self.ema is None else (ExponentialAverage(self.ema),)
        if self.tail_start is not None:
            averages += (TailAverage(self.tail_start),)
        steps = (ScaleBySchedule(self.schedule), TakeStep(), ClampToBounds())
        return Chain((*clip, optimizer.scaling(self), *steps, *optimizer.ending(self), *averages))


@dataclass(frozen=True)
class Optimizer:
    """An entry of the table: the part of the chain between clipping and schedule, and a part behind the bounds.

    ``uses`` names the settings that only some optimisers have. ``averages``: whether it keeps an average of its own,
    and needs no schedule.
    """

    uses: tuple[str, ...]
    scaling: Callable[[SlotSettings], Chain]
    ending: Callable[[SlotSettings], Parts] = lambda settings: ()
    averages: bool = False


def _sgd(settings: SlotSettings) -> Chain:
    scaling = (Momentum(settings.momentum),) if settings.momentum else ()
    return chain(CoupledDecay(), *scaling)


def _adam(settings: SlotSettings) -> Chain:
    return chain(CoupledDecay(), ScaleByAdam(settings.betas, settings.eps))


def _adamw(settings: SlotSettings) -> Chain:
    return chain(DecoupledDecay(settings.schedule), ScaleByAdam(settings.betas, settings.eps))


def _schedule_free(settings: SlotSettings) -> Chain:
    return chain(StepFromBase(settings.schedule), ScaleByRootMeanSquare(settings.betas[1], settings.eps))


def _muon(settings: SlotSettings) -> Chain:
    momentum, others = settings.momentum, ScaleByAdam(settings.betas, settings.eps)
    scaling = ScaleByMuon(settings.layout, settings.matrices, 0.95 if momentum is None else momentum, others)
    return chain(DecoupledDecay(settings.schedule), scaling)


OPTIMIZERS: dict[str, Optimizer] = {
    "sgd": Optimizer(("momentum",), _sgd),
    "adam": Optimizer(("betas", "eps"), _adam),
    "adamw": Optimizer(("betas", "eps"), _adamw),
    "schedule_free": Optimizer(
        ("betas", "eps"), _schedule_free, lambda s: (Interpolate(s.betas[0], s.schedule),), averages=True
    ),
    "muon": Optimizer(("momentum", "betas", "eps"), _muon),
}
"""Optimisers by name."""
