"""The outer loop: its settings, and the outer update of the whole state."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from metadist.core.errors import ConfigError, NonFiniteError, at_least, one_of, within
from metadist.core.optimizers import (
    OPTIMIZERS,
    SCHEDULES,
    Chain,
    ClampToBounds,
    ClipByGlobalNorm,
    OptimizerSettings,
    ParameterGroup,
    Proposal,
    ScaleBySchedule,
    Schedule,
    TakeStep,
    Transformation,
    UpdateContext,
)
from metadist.core.state import Contribution, Slot, State


def squared_norm(vector: Tensor) -> Tensor:
    """Return Σ v² in float64, added up in blocks of fixed size: the result does not depend on the number of threads."""
    square = vector.double().square()
    while square.numel() > 1024:
        square = torch.nn.functional.pad(square, (0, -square.numel() % 1024)).view(-1, 1024).sum(1)
    return square.sum()


@dataclass(frozen=True)
class OuterLoop:
    """The settings of the outer update and the size of a meta-step.

    ``lr`` follows ``schedule`` from ``lr`` to ``final_lr`` over ``meta_steps``. ``clip_norm`` bounds the global norm of
    the mean gradient over all slots. ``weight_decay`` is added to the gradient (sgd, adam) or decoupled (adamw).
    A slot's own ``lr``, ``weight_decay`` and ``bounds`` replace those of the outer loop for this slot.
    """

    optimizer: Literal["sgd", "adam", "adamw"] = "adam"
    lr: float = 1e-3
    final_lr: float = 0.0
    schedule: Literal["constant", "linear", "cosine"] = "constant"
    momentum: float = 0.0
    betas: tuple[float, float] = (0.9, 0.999)
    eps: float = 1e-8
    weight_decay: float = 0.0
    clip_norm: float | None = None
    meta_batch_size: int = 32
    shard_size: int = 8
    meta_steps: int = 1000

    def __post_init__(self) -> None:
        one_of("outer.optimizer", self.optimizer, OPTIMIZERS)
        one_of("outer.schedule", self.schedule, SCHEDULES)
        at_least(1, **{f"outer.{n}": getattr(self, n) for n in ("meta_batch_size", "shard_size", "meta_steps")})
        within(0, math.inf, **{f"outer.{n}": getattr(self, n) for n in ("lr", "final_lr", "eps", "weight_decay")})
        within(0, 1, **{"outer.momentum": self.momentum, **{f"outer.betas[{i}]": b for i, b in enumerate(self.betas)}})
        if self.momentum and self.optimizer != "sgd":
            raise ConfigError(
                f"outer.momentum: {self.momentum} goes with optimizer: sgd; for {self.optimizer} set outer.betas"
            )
        if self.clip_norm is not None and not self.clip_norm > 0:
            raise ConfigError(f"outer.clip_norm: {self.clip_norm} is not above 0; use null for no clipping")

    def rate(self, lr: float, meta_step: int) -> float:
        """Return the scheduled rate at ``meta_step`` (from 0) of a slot that starts at ``lr``."""
        return self._schedule.rate(lr, meta_step)

    @property
    def _schedule(self) -> Schedule:
        return Schedule(self.schedule, self.lr, self.final_lr, self.meta_steps)

    def chain(self) -> Chain:
        """Return the update of one slot: clip → optimiser → schedule → step → bounds."""
        settings = OptimizerSettings(self.momentum, self.betas, self.eps, self._schedule)
        clip: tuple[Transformation, ...] = () if self.clip_norm is None else (ClipByGlobalNorm(self.clip_norm),)
        optimizer = OPTIMIZERS[self.optimizer](settings)
        return Chain((*clip, optimizer, ScaleBySchedule(self._schedule), TakeStep(), ClampToBounds()))

    def group(self, slot: Slot) -> ParameterGroup:
        """Return the settings of ``slot``: its own where given, else those of the outer loop."""
        return ParameterGroup(
            lr=self.lr if slot.lr is None else slot.lr,
            weight_decay=self.weight_decay if slot.weight_decay is None else slot.weight_decay,
            bounds=slot.bounds,
        )

    def initial(self, slots: Mapping[str, Slot], values: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Return the outer state before the first update: ``{slot}/{name}`` → vector, for every learned slot."""
        update = self.chain()
        return {
            f"{slot}/{name}": vector for slot in _learned(slots) for name, vector in update.init(values[slot]).items()
        }

    def update(
        self, slots: Mapping[str, Slot], state: State, total: Contribution, meta_step: int, *, count: int | None = None
    ) -> tuple[State, dict[str, float]]:
        """Apply θ ← outer(θ, Σ contributions / Σ weights).

        ``total`` is the sum of the contributions of a meta-batch. ``count`` is the number of earlier updates, where it
        differs from the number of meta-steps. Returns the new state, and ``gradient_norm`` and ``lr`` for the log.
        Raises NonFiniteError where no task counts, or where the norm of the mean gradient is NaN or Inf.
        """
        if not total.weight:
            raise NonFiniteError(
                f"every task of meta-step {meta_step} gave NaN or Inf; lower algorithm.inner_lr or outer.lr"
            )
        means = {n: v / total.weight for n, v in total.slots.items()}
        norm = _global_norm([means[n] for n in _learned(slots)])
        if not math.isfinite(norm):
            raise NonFiniteError(
                f"the norm of the mean gradient at meta-step {meta_step} is {norm}; "
                "lower outer.lr or algorithm.inner_lr"
            )
        updates = meta_step if count is None else count
        update, values, outer = self.chain(), dict(state.slots), dict(state.outer)
        for name in _learned(slots):
            context = UpdateContext(self.group(slots[name]), meta_step, updates, norm)
            memory = {n.removeprefix(f"{name}/"): v for n, v in outer.items() if n.startswith(f"{name}/")}
            proposal, kept = update.update(Proposal(values[name], means[name]), memory, context)
            values[name] = proposal.value
            outer.update({f"{name}/{n}": v for n, v in kept.items()})
        values.update({n: means[n] for n, slot in slots.items() if slot.rule == "average"})
        return State(values, outer), {"gradient_norm": norm, "lr": self.rate(self.lr, meta_step)}


def _learned(slots: Mapping[str, Slot]) -> list[str]:
    return [name for name, slot in slots.items() if slot.rule == "gradient"]


def _global_norm(vectors: Sequence[Tensor]) -> float:
    return math.sqrt(float(torch.stack([squared_norm(v) for v in vectors]).sum()))
