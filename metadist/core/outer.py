"""The outer loop: its settings, and the outer update of the whole state."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, fields
from typing import Any, Literal

import torch
from torch import Tensor

from metadist.core.errors import ConfigError, NonFiniteError, at_least, nearest, one_of, within
from metadist.core.optimizers import OPTIMIZERS, SlotSettings
from metadist.core.schedules import SCHEDULES, Schedule
from metadist.core.state import Contribution, Slot, State
from metadist.core.transformations import ParameterGroup, Proposal, UpdateContext, squared_norm

OptimizerName = Literal["sgd", "adam", "adamw", "schedule_free", "muon"]
ScheduleName = Literal["constant", "linear", "cosine"]


@dataclass(frozen=True)
class SlotOptimizer:
    """The optimiser of one slot: a setting that is null is that of the outer loop.

    ``lr`` and ``weight_decay`` go before those of the slot. ``clip_norm`` bounds the norm of this slot's gradient
    alone, and the slot does not count in the norm over the others.
    """

    optimizer: OptimizerName | None = None
    lr: float | None = None
    final_lr: float | None = None
    schedule: ScheduleName | None = None
    warmup: int | None = None
    momentum: float | None = None
    betas: tuple[float, float] | None = None
    eps: float | None = None
    weight_decay: float | None = None
    clip_norm: float | None = None
    clip_value: float | None = None


@dataclass(frozen=True)
class OuterLoop:
    """The settings of the outer update and the size of a meta-step.

    ``lr`` grows linearly over the ``warmup`` first meta-steps, then follows ``schedule`` from ``lr`` to ``final_lr``
    until ``meta_steps``. ``momentum`` is that of sgd (null: 0) and of muon (null: 0.95). ``clip_value`` bounds every
    element of the mean gradient, then ``clip_norm`` its global norm over all slots. ``weight_decay`` is added to the
    gradient (sgd, adam) or decoupled (others).

    ``schedule_free`` is schedule-free AdamW (Defazio et al. 2024). ``muon`` orthogonalises the momentum of the model's
    whole matrices and convolution kernels (Jordan et al. 2024; scaled to Adam's step, so that one ``lr`` serves all);
    vectors, embeddings, the head and all other slots learn by adamw.

    ``ema`` (the decay of an exponential average) or ``tail`` (the part of the meta-steps at the end with a uniform
    average) average θ. Where θ is averaged, also by schedule_free, evaluation, export and service use the averages.

    ``optimizers`` maps a slot (``model``; ``inner_lr`` of meta_sgd; …) to an optimiser of its own. A slot's own ``lr``,
    ``weight_decay`` and ``bounds``, which an algorithm gives, replace those of the outer loop for this slot.
    """

    optimizer: OptimizerName = "adam"
    lr: float = 1e-3
    final_lr: float = 0.0
    schedule: ScheduleName = "constant"
    warmup: int = 0
    momentum: float | None = None
    betas: tuple[float, float] = (0.9, 0.999)
    eps: float = 1e-8
    weight_decay: float = 0.0
    clip_norm: float | None = None
    clip_value: float | None = None
    ema: float | None = None
    tail: float | None = None
    optimizers: Mapping[str, SlotOptimizer] = field(default_factory=dict)
    meta_batch_size: int = 32
    shard_size: int = 8
    meta_steps: int = 1000

    def __post_init__(self) -> None:
        at_least(1, **{f"outer.{n}": getattr(self, n) for n in ("meta_batch_size", "shard_size", "meta_steps")})
        _check("outer", _given(self), self.optimizer, self.schedule)
        for name, own in self.optimizers.items():
            if not isinstance(own, SlotOptimizer):  # from Python: a config builds them
                raise ConfigError(f"outer.optimizers.{name}: expected a SlotOptimizer, got {own!r}")
            optimizer, schedule = own.optimizer or self.optimizer, own.schedule or self.schedule
            _check(f"outer.optimizers.{name}", given := _given(own), optimizer, schedule)
            _refuse_without_effect(f"outer.optimizers.{name}", given, optimizer, schedule)
        momentum = {n: v for n, v in self._own_settings.items() if n == "momentum"}
        _refuse_without_effect("outer", momentum, self.optimizer, self.schedule)
        within(0, 1, **{"outer.ema": self.ema})
        if self.tail is not None and not 0 < self.tail <= 1:
            raise ConfigError(f"outer.tail: {self.tail} is not a number in (0, 1]; it is a part of the meta-steps")
        if len(ways := self._averages) > 1:
            raise ConfigError(f"outer: {' and '.join(ways)} would each average θ; keep one of them")

    @property
    def _averages(self) -> list[str]:
        """The settings that average θ, as a config writes them."""
        found = [f"{n}: {getattr(self, n)}" for n in ("ema", "tail") if getattr(self, n) is not None]
        used = {self.optimizer, *(own.optimizer for own in self.optimizers.values() if own.optimizer)}
        return found + [f"optimizer: {name}" for name in sorted(used) if OPTIMIZERS[name].averages]

    @property
    def averages(self) -> str | None:
        """The setting that averages θ, as a config writes it; None where there is none."""
        return next(iter(self._averages), None)

    @property
    def open_ended(self) -> bool:
        """Whether more ``meta_steps`` continue the same trajectory: no rate and no average depends on the last one."""
        schedules = [self.schedule, *(own.schedule for own in self.optimizers.values() if own.schedule)]
        return self.tail is None and all(name == "constant" for name in schedules)

    def remarks(self) -> list[str]:
        """Return what a user should know before the run starts, a line for each."""
        lines = []
        if self.averages:
            lines.append(f"θ is averaged ({self.averages}): scores, export and service are of the averages")
        if self.warmup >= self.meta_steps:
            lines.append(f"outer.warmup: {self.warmup} of {self.meta_steps} meta-steps; the run ends in its warm-up")
        return lines

    def refuse_without_effect(self) -> None:
        """Raise ConfigError for settings without an effect. For new runs: earlier versions ignored them in silence."""
        _refuse_without_effect("outer", self._own_settings, self.optimizer, self.schedule)

    @property
    def _own_settings(self) -> dict[str, Any]:
        """The settings that differ from their defaults, without those that take effect through ``optimizers``."""
        inherited = set[str]()
        for own in self.optimizers.values():
            uses = OPTIMIZERS[own.optimizer or self.optimizer].uses
            scheduled = (own.schedule or self.schedule) != "constant"
            names = [*uses, *(["final_lr"] if scheduled else [])]
            inherited.update(n for n in names if getattr(own, n) is None)
        return {n: v for n, v in _given(self).items() if n not in inherited}

    def check_slots(self, slots: Mapping[str, Slot]) -> None:
        """Raise ConfigError where ``optimizers`` names no learned slot, or an optimiser does not suit its slot."""
        learned = _learned(slots)
        for name, own in self.optimizers.items():
            key = f"outer.optimizers.{name}"
            if name not in learned:
                reason = f"is {slots[name].rule} and has no optimiser" if name in slots else "is not in this experiment"
                raise ConfigError(
                    f"{key}: slot '{name}' {reason}; expected one of {', '.join(learned)}{nearest(name, learned)}"
                )
            if own.lr is not None and slots[name].lr is not None:
                raise ConfigError(
                    f"{key}.lr: {own.lr}, but the algorithm gives slot '{name}' the rate {slots[name].lr}; keep one"
                )
        whole = [n for n in learned if self.settings(n, slots[n]).optimizer == "muon"]
        named = [n for n in whole if n in self.optimizers]
        for name in named if named else whole:
            if not slots[name].matrices and (named or not any(slots[n].matrices for n in whole)):
                key = f"outer.optimizers.{name}" if named else "outer"
                raise ConfigError(
                    f"{key}.optimizer: muon, but slot '{name}' has no matrices besides embeddings and a head; use adamw"
                )

    def rate(self, lr: float, meta_step: int) -> float:
        """Return the scheduled rate at ``meta_step`` (from 0) of a slot without an optimiser of its own."""
        return Schedule(self.schedule, self.lr, self.final_lr, self.meta_steps, self.warmup).rate(lr, meta_step)

    def settings(self, name: str, slot: Slot) -> SlotSettings:
        """Return the settings of the slot ``name``: its optimiser's, then its own, then those of the outer loop."""
        own = self.optimizers.get(name, SlotOptimizer())

        def chosen(key: str, slots: Any = None) -> Any:
            return next(v for v in (getattr(own, key), slots, getattr(self, key)) if v is not None)

        lr = chosen("lr", slot.lr)
        first, last = (self.lr, self.final_lr) if own.final_lr is None else (lr, own.final_lr)
        return SlotSettings(
            optimizer=chosen("optimizer"),
            group=ParameterGroup(lr, chosen("weight_decay", slot.weight_decay), slot.bounds),
            schedule=Schedule(chosen("schedule"), first, last, self.meta_steps, chosen("warmup")),
            momentum=self.momentum if own.momentum is None else own.momentum,
            betas=chosen("betas"),
            eps=chosen("eps"),
            layout=slot.layout,
            matrices=slot.matrices,
            clip_norm=self.clip_norm if own.clip_norm is None else own.clip_norm,
            ema=self.ema,
            tail_start=None
            if self.tail is None
            else self.meta_steps - math.ceil(round(self.tail * self.meta_steps, 9)),
        )

    def initial(self, slots: Mapping[str, Slot], values: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Return the outer state before the first update: ``{slot}/{name}`` → tensor, for every learned slot."""
        return {
            f"{slot}/{name}": tensor
            for slot in _learned(slots)
            for name, tensor in self.settings(slot, slots[slot]).chain().init(values[slot]).items()
        }

    def update(
        self, slots: Mapping[str, Slot], state: State, total: Contribution, meta_step: int, *, count: int | None = None
    ) -> tuple[State, dict[str, float]]:
        """Apply θ ← outer(θ, Σ contributions / Σ weights).

        ``total`` is the sum of the contributions of a meta-batch. ``count`` is the number of earlier updates, where it
        differs from the number of meta-steps. Returns the new state, and ``gradient_norm`` (before clipping), ``lr``
        and the rates of ``optimizers`` for the log. Raises NonFiniteError where no task counts, or where the norm of
        the mean gradient is NaN or Inf.
        """
        if not total.weight:
            raise NonFiniteError(
                f"every task of meta-step {meta_step} gave NaN or Inf; lower outer.lr, or the rate of the inner loop"
            )
        means = {n: v / total.weight for n, v in total.slots.items()}
        squares = {n: squared_norm(means[n]) for n in _learned(slots)}
        norm = _root_of_sum(squares.values())
        if not math.isfinite(norm):
            raise NonFiniteError(
                f"the norm of the mean gradient at meta-step {meta_step} is {norm}; "
                "lower outer.lr or algorithm.inner_lr"
            )
        report = {"gradient_norm": norm, "lr": self.rate(self.lr, meta_step)}
        gradients, norms = self._clipped_by_value(means, squares)
        updates = meta_step if count is None else count
        values, outer = dict(state.slots), dict(state.outer)
        for name in _learned(slots):
            settings = self.settings(name, slots[name])
            context = UpdateContext(settings.group, meta_step, updates, norms[name])
            memory = {n.removeprefix(f"{name}/"): v for n, v in outer.items() if n.startswith(f"{name}/")}
            proposal, kept = settings.chain().update(Proposal(values[name], gradients[name]), memory, context)
            values[name] = proposal.value
            outer.update({f"{name}/{n}": v for n, v in kept.items()})
            if name in self.optimizers:
                report[f"lr/{name}"] = settings.schedule.rate(settings.group.lr, meta_step)
        values.update({n: means[n] for n, slot in slots.items() if slot.rule == "average"})
        return State(values, outer), report

    def _clipped_by_value(
        self, means: Mapping[str, Tensor], squares: Mapping[str, Tensor]
    ) -> tuple[dict[str, Tensor], dict[str, float]]:
        """Return the gradients after ``clip_value``, and by slot the norm that ``clip_norm`` bounds.

        ``squares`` has the squared norms of the learned slots before.
        """
        gradients, after, alone = {n: means[n] for n in squares}, dict(squares), dict[str, float]()
        for name in squares:
            own = self.optimizers.get(name, SlotOptimizer())
            limit = self.clip_value if own.clip_value is None else own.clip_value
            if limit is not None:
                gradients[name] = means[name].clamp(-limit, limit)
                after[name] = squared_norm(gradients[name])
            if own.clip_norm is not None:
                alone[name] = _root_of_sum([after[name]])
        together = [square for name, square in after.items() if name not in alone]
        shared = _root_of_sum(together) if together else 0.0
        return gradients, {name: alone.get(name, shared) for name in squares}


def _given(settings: OuterLoop | SlotOptimizer) -> dict[str, Any]:
    """Return the settings that differ from their defaults."""
    values = {f.name: (getattr(settings, f.name), f.default) for f in fields(settings)}
    return {name: value for name, (value, default) in values.items() if value != default}


def _check(key: str, given: Mapping[str, Any], optimizer: str, schedule: str) -> None:
    """Raise ConfigError for a setting out of range, or settings that exclude each other.

    ``optimizer`` and ``schedule`` are those that ``given`` leads to.
    """
    one_of(f"{key}.optimizer", optimizer, OPTIMIZERS)
    one_of(f"{key}.schedule", schedule, SCHEDULES)
    at_least(0, **{f"{key}.warmup": given.get("warmup")})
    within(0, math.inf, **{f"{key}.{n}": given.get(n) for n in ("lr", "final_lr", "eps", "weight_decay")})
    betas = {f"{key}.betas[{i}]": beta for i, beta in enumerate(given.get("betas", ()))}
    within(0, 1, **{f"{key}.momentum": given.get("momentum"), **betas})
    for name in ("clip_norm", "clip_value"):
        if name in given and not given[name] > 0:
            raise ConfigError(f"{key}.{name}: {given[name]} is not above 0; use null for no clipping")
    if OPTIMIZERS[optimizer].averages and schedule != "constant":
        raise ConfigError(
            f"{key}.schedule: {schedule} with optimizer: {optimizer}, whose average replaces a schedule; use constant "
            "(a warmup is allowed)"
        )


def _refuse_without_effect(key: str, given: Mapping[str, Any], optimizer: str, schedule: str) -> None:
    """Raise ConfigError for a setting that changes nothing under ``optimizer`` and ``schedule``."""
    uses = OPTIMIZERS[optimizer].uses
    for name in ("momentum", "betas", "eps"):
        if given.get(name) and name not in uses:
            users = " or ".join(n for n, entry in OPTIMIZERS.items() if name in entry.uses)
            raise ConfigError(f"{key}.{name}: {given[name]} goes with optimizer: {users}; {optimizer} has {uses[0]}")
    if "final_lr" in given and schedule == "constant":
        raise ConfigError(
            f"{key}.final_lr: {given['final_lr']} has no effect with schedule: constant; use linear or cosine, or "
            "leave it out"
        )


def _learned(slots: Mapping[str, Slot]) -> list[str]:
    return [name for name, slot in slots.items() if slot.rule == "gradient"]


def _root_of_sum(squares: Iterable[Tensor]) -> float:
    return math.sqrt(float(torch.stack(list(squares)).sum()))
