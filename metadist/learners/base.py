"""What every learner has: a state with named slots, a place to compute on, and shards."""

from __future__ import annotations

import copy
import logging
from collections.abc import Mapping
from dataclasses import replace
from typing import Any, ClassVar, TypeVar

import torch
from torch import Tensor

from metadist.core.engine import Engine
from metadist.core.errors import ConfigError
from metadist.core.model import Model
from metadist.core.outer import OuterLoop
from metadist.core.parameters import Layout, Parameters
from metadist.core.round import Shard
from metadist.core.state import Slot, State
from metadist.engine.meta_gradient import BUFFERS

log = logging.getLogger(__name__)
AnyLearner = TypeVar("AnyLearner", bound="BaseLearner")


class BaseLearner:
    """The half of a learner that knows nothing of what is learned: state, device, shards."""

    #: functions of shards whose sums have slots: gradients and what is laid out like them
    gradients: ClassVar[tuple[str, ...]] = ("gradient",)

    algorithm: Any
    model: Model
    tasks: Any
    outer: OuterLoop
    engine: Engine
    non_finite: str
    slots: dict[str, Slot]
    device: torch.device
    _prepared: bool

    def _declare(self, seed: int) -> dict[str, tuple[Slot, Parameters]]:
        learned, frozen, buffers = self.model.initial(seed)
        declared = {"model": (Slot(Layout.of(learned)), learned)}
        declared.update(self.algorithm.slots(self.model, learned))
        if frozen:
            declared["frozen"] = (Slot(Layout.of(frozen), "constant"), frozen)
        for dtype in sorted({b.dtype for b in buffers.values()}, key=str):
            group = Parameters({n: b for n, b in buffers.items() if b.dtype == dtype})
            declared[BUFFERS + str(dtype).removeprefix("torch.")] = (Slot(Layout.of(group), "constant"), group)
        return declared

    def initial(self, seed: int, start_from: Mapping[str, Tensor] | None = None) -> State:
        """The state before meta-step 0; ``start_from`` replaces initial model parameters by name."""
        declared = self._declare(seed)
        if start_from is not None:
            self._start_from(declared, start_from)
        values = {name: slot.layout.flatten(initial) for name, (slot, initial) in declared.items()}
        return State(values, self.outer.initial(self.slots, values))

    def _start_from(self, declared: dict[str, tuple[Slot, Parameters]], given: Mapping[str, Tensor]) -> None:
        known: set[str] = set()
        for slot_name in [n for n in declared if n in ("model", "frozen") or n.startswith(BUFFERS)]:
            slot, initial = declared[slot_name]
            known |= set(initial)
            for name in set(initial) & set(given):
                if initial[name].shape != given[name].shape:
                    raise ConfigError(
                        f"init_from: '{name}' has shape {list(given[name].shape)}, this model's has {list(initial[name].shape)}"
                    )
            chosen = {n: given[n].to(initial[n].dtype) for n in initial if n in given}
            declared[slot_name] = (slot, initial.replace(chosen))
        if not known & set(given):
            raise ConfigError(
                f"init_from: none of its parameters ({', '.join(sorted(given)[:4])}, …) is one of this model's"
            )
        if known - set(given):
            log.warning("init_from has no %s; they start anew", ", ".join(sorted(known - set(given))))
        if set(given) - known:
            log.warning(
                "init_from: %s are not parameters of this model and are left out", ", ".join(sorted(set(given) - known))
            )

    def parameters(self, state: State) -> dict[str, Tensor]:
        """The model's parameters and buffers under their own names, for export and for prediction."""
        theta = state.theta(self.slots)
        return {
            n: t
            for slot in theta
            if slot in ("model", "frozen") or slot.startswith(BUFFERS)
            for n, t in theta[slot].items()
        }

    def with_meta_batch_size(self: AnyLearner, size: int) -> AnyLearner:
        """The same learner with meta-steps of ``size`` tasks, to make rounds with; it computes nothing itself. ConfigError where
        the algorithm can't do with so many."""
        outer = replace(self.outer, meta_batch_size=size)
        self._check_outer(outer)
        other = copy.copy(self)
        other.outer = outer
        return other

    def _check_outer(self, outer: OuterLoop) -> None:
        """ConfigError where the algorithm doesn't go with ``outer``."""

    # Where it runs ----------------------------------------------------------------------------------------------------

    def prepare(self, device: torch.device) -> None:
        """Load the tasks' data and move the model to ``device``; once in every process that computes."""
        if not self._prepared or device != self.device:
            self.tasks.prepare(device)
            self.model.to(device)
            self.device, self._prepared = device, True
            self.set_engine(self.engine)

    def prepared_like(self, other: BaseLearner) -> None:
        """Compute where ``other`` does, with the data that it has loaded."""
        self.model.to(other.device)
        self.device, self._prepared = other.device, True

    def set_engine(self, engine: Engine, around: Any = None) -> None:
        """Compute shards as ``engine`` says from now on."""
        self.engine = engine

    def shards(
        self, run: str, meta_step: int, seed: int, *, function: str, split: str, tasks: int, **settings: Any
    ) -> list[Shard]:
        size = self.outer.shard_size
        key_step = meta_step if split == "train" else 0
        return [
            Shard(
                run,
                meta_step,
                0,
                index,
                function,
                start,
                min(size, tasks - start),
                seed,
                split,
                key_step,
                settings=tuple(sorted(settings.items())),
            )
            for index, start in enumerate(range(0, tasks, size))
        ]
