"""The interface of a learner, and what few-shot and trial learners share: state, device, shards."""

from __future__ import annotations

import copy
import logging
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import replace
from typing import Any, ClassVar, TypeVar, Union

import torch
from torch import Tensor

from metadist.core.algorithm import Algorithm, Phi
from metadist.core.carried import CarriedAlgorithm
from metadist.core.computation import Computation, Evaluate
from metadist.core.engine import Engine
from metadist.core.errors import ConfigError, MetadistError, first_line
from metadist.core.model import Model
from metadist.core.outer import OuterLoop
from metadist.core.parameters import Layout, Parameters
from metadist.core.round import EvaluationRequest, MetaStepKey, Result, Round, Rounds, Shard, WithOutput
from metadist.core.signature import Signature
from metadist.core.state import Records, Slot, State
from metadist.core.task import Examples, TaskFamily
from metadist.engine.meta_gradient import BUFFERS
from metadist.engine.plan import Device, EngineRequest, Plan
from metadist.learners.culprit import place
from metadist.learners.evaluation import Evaluation
from metadist.rl.algorithm import TrialAlgorithm
from metadist.rl.environment import MetaEnvironment

log = logging.getLogger(__name__)
AnyLearner = TypeVar("AnyLearner", bound="Learner")

AnyAlgorithm = Union[Algorithm, TrialAlgorithm, CarriedAlgorithm]
"""An algorithm of any learner."""

Surround = Callable[[str], AbstractContextManager[None]]
"""Given the name of a graph, a context around its compilation."""


class Learner(ABC):
    """The mathematics of one experiment: algorithm, model, tasks and outer loop.

    A learner knows nothing of workers, files or time. ``compute`` is a pure function of a shard and θ; ``meta_step``
    says which shards a meta-step consists of and updates the state with their sums.
    """

    #: functions of shards whose sums have slots: gradients and sums of the same layout
    gradients: ClassVar[tuple[str, ...]] = ("gradient",)

    algorithm: AnyAlgorithm
    model: Model
    tasks: TaskFamily | MetaEnvironment
    outer: OuterLoop
    engine: Engine
    non_finite: str
    slots: dict[str, Slot]
    device: torch.device
    _prepared: bool

    # Before a run -----------------------------------------------------------------------------------------------------

    @abstractmethod
    def dry_run(self, seed: int) -> None:
        """Compute one small task of each split. ConfigError where tasks, model and algorithm do not fit together."""

    @abstractmethod
    def sampled_hashes(self, seed: int) -> dict[str, str]:
        """Return the SHA-256 of the first tasks of each split, or of the first trials, by name."""

    @abstractmethod
    def plan(self, request: EngineRequest, device: Device, sharing: float = 1.0) -> Plan:
        """Choose the engine for workers that compute on ``device``, whose memory ``sharing`` workers share.

        ConfigError where the request cannot be met.
        """

    def remarks(self) -> list[str]:
        """Return what a user should know before the run starts and may not expect, a line for each."""
        return [*(line for line in (self.model.frozen_line,) if line), *self.outer.remarks()]

    @property
    def data_sha256(self) -> str | None:
        """SHA-256 of the data that the tasks are made of; None where they are made of random numbers alone."""
        return self.tasks.data_sha256

    def splits(self) -> Mapping[str, Sequence[str]] | None:
        """Return the names of the classes of each split, or None where tasks have none. ConfigError: two share one."""
        splits = self.tasks.splits()
        seen: dict[str, str] = {}
        for split, names in (splits or {}).items():
            for name in names:
                if seen.setdefault(name, split) != split:
                    raise ConfigError(
                        f"tasks: '{name}' is in the {seen[name]} split and in the {split} split of "
                        f"'{type(self.tasks).__name__}'; each class belongs to one split, or training sees test classes"
                    )
        return splits

    # The rounds of a meta-step ----------------------------------------------------------------------------------------

    @abstractmethod
    def meta_step(self, key: MetaStepKey, state: State) -> Rounds:
        """Yield the rounds of one meta-step, receive the sum of each, and return the new state and a report."""

    @property
    def has_states(self) -> bool:
        """Whether a meta-step needs states of the one before (``carried``)."""
        return False

    def carried(self, key: MetaStepKey) -> Sequence[Shard]:
        """Return the shards whose states the meta-step of ``key`` needs; none where the learner carries no states."""
        return ()

    @abstractmethod
    def evaluation(self, request: EvaluationRequest, state: State) -> Round:
        """Return the round that judges ``state``. Its records have one row per task."""

    @abstractmethod
    def summarise(self, request: EvaluationRequest, records: Records) -> Evaluation:
        """Reduce the records of an evaluation round to scores."""

    # What a worker does -----------------------------------------------------------------------------------------------

    @abstractmethod
    def compute(self, shard: Shard, theta: Mapping[str, Tensor], inputs: Sequence[Records] = ()) -> Result | WithOutput:
        """Compute one shard under the slot vectors ``theta``, with the kept outputs that the shard needs.

        A pure function.
        """

    def set_engine(self, engine: Engine, around: Surround | None = None) -> None:
        """Compute shards with ``engine``. ``around(name)`` is a context that surrounds each compilation."""
        self.engine = engine

    def warm_up(self, seed: int) -> float:
        """Compile everything that a shard needs, and return the seconds that compilation took."""
        return 0.0

    def miscompiled(self, seed: int, memory_bytes: int | None = None) -> str | None:
        """Return how a compiled shard differs from the mathematics by more than rounding, or None.

        The comparison may take ``memory_bytes``.
        """
        return None

    @property
    def leaves_out_tasks(self) -> bool:
        """Whether a contribution may lack tasks that failed."""
        return "skip" in (self.non_finite, self.tasks.on_error)

    def receivers(self, computation: Computation) -> frozenset[str]:
        """Return the slots that the sums of ``computation`` have."""
        if computation.name not in self.gradients:
            return frozenset()
        return frozenset(name for name, slot in self.slots.items() if slot.rule != "constant")

    # After a run ------------------------------------------------------------------------------------------------------

    def exported_tasks(self) -> dict[str, Any]:
        """Return options of the tasks that replace their data in an exported config."""
        return {}

    def servable(self) -> str | None:
        """Return why this learner cannot be served, or None where it can."""
        return f"{type(self.tasks).__name__} is a meta-environment; its policy adapts by acting (metadist evaluate)"

    def describe(self, seed: int) -> Signature | None:
        """Return the signature of the model from sampled tasks; None where the learner is not ``servable``."""
        return None

    def describe_earlier(self, seed: int) -> Signature | None:
        """Return the signature for a run of a version that did not record it; None as in ``describe``."""
        return None

    def adapt(self, state: State, support: Examples, inner_steps: int | None = None, classes: int | None = None) -> Phi:
        """Return φ_k for one support set of ``classes`` classes. ConfigError where the learner is not ``servable``."""
        raise ConfigError(f"adapt: {self.servable()}")

    def predict(self, state: State, phi: Phi, x: Tensor, support: Examples) -> Tensor:
        """Return predictions for x [N, …] with φ. ConfigError where the learner is not ``servable``."""
        raise ConfigError(f"predict: {self.servable()}")

    def optimizer(self, state: State, parameters: Iterable[Any]) -> torch.optim.Optimizer:
        """Return the learned optimiser of ``parameters`` of any network. ConfigError where none is learned."""
        raise ConfigError(f"optimizer: algorithm '{type(self.algorithm).__name__}' learns no optimiser")

    def normalize(self, normalization: str) -> None:
        """Normalise query sets in evaluation as ``normalization`` says. ConfigError where there are none."""
        raise ConfigError(f"--normalization: {self.servable()}; it goes with supervised tasks")

    # State ------------------------------------------------------------------------------------------------------------

    def _declare(self, seed: int) -> dict[str, tuple[Slot, Parameters]]:
        learned, frozen, buffers = self.model.initial(seed)
        declared = {"model": (Slot(Layout.of(learned), matrices=self.model.matrices()), learned)}
        declared.update(self.algorithm.slots(self.model, learned))
        if frozen:
            declared["frozen"] = (Slot(Layout.of(frozen), "constant"), frozen)
        for dtype in sorted({b.dtype for b in buffers.values()}, key=str):
            group = Parameters({n: b for n, b in buffers.items() if b.dtype == dtype})
            declared[BUFFERS + str(dtype).removeprefix("torch.")] = (Slot(Layout.of(group), "constant"), group)
        return declared

    def _declared_slots(self) -> dict[str, Slot]:
        """Return the slots by name. ConfigError where the outer loop names other slots, or does not suit them."""
        slots = {name: slot for name, (slot, _) in self._declare(0).items()}
        self.outer.check_slots(slots)
        return slots

    def initial(self, seed: int, start_from: Mapping[str, Tensor] | None = None) -> State:
        """Return the state before meta-step 0. ``start_from`` replaces initial model parameters by name."""
        declared = self._declare(seed)
        if start_from is not None:
            self._start_from(declared, start_from)
        values = {name: slot.layout.flatten(initial) for name, (slot, initial) in declared.items()}
        return State(values, self.outer.initial(self.slots, values))

    def _start_from(self, declared: dict[str, tuple[Slot, Parameters]], given: Mapping[str, Tensor]) -> None:
        if declared["model"][0].rule == "constant" and isinstance(self.algorithm, CarriedAlgorithm):
            raise ConfigError(
                f"init_from: algorithm '{type(self.algorithm).__name__}' learns no initial parameters of the model, "
                "which init_from would replace; leave it out"
            )
        known: set[str] = set()
        for slot_name in [n for n in declared if n in ("model", "frozen") or n.startswith(BUFFERS)]:
            slot, initial = declared[slot_name]
            known |= set(initial)
            for name in set(initial) & set(given):
                if initial[name].shape != given[name].shape:
                    raise ConfigError(
                        f"init_from: '{name}' has shape {list(given[name].shape)}, this model's has "
                        f"{list(initial[name].shape)}"
                    )
            chosen = {n: given[n].to(initial[n].dtype) for n in initial if n in given}
            declared[slot_name] = (slot, initial.replace(chosen))
        if not known & set(given):
            raise ConfigError(
                f"init_from: none of its parameters ({', '.join(sorted(given)[:4])}, …) is one of this model's"
            )
        if known - set(given):
            log.warning(
                "init_from has no %s; they start from their initial values", ", ".join(sorted(known - set(given)))
            )
        if set(given) - known:
            log.warning(
                "init_from: %s are not parameters of this model and are left out", ", ".join(sorted(set(given) - known))
            )

    def parameters(self, state: State) -> dict[str, Tensor]:
        """Return the model's parameters and buffers under their own names, for export and prediction."""
        theta = state.theta(self.slots)
        return {
            n: t
            for slot in theta
            if slot in ("model", "frozen") or slot.startswith(BUFFERS)
            for n, t in theta[slot].items()
        }

    def with_meta_batch_size(self: AnyLearner, size: int) -> AnyLearner:
        """Return a copy that makes rounds of ``size`` tasks. It computes nothing itself.

        ConfigError where the algorithm does not go with this size.
        """
        outer = replace(self.outer, meta_batch_size=size)
        self._check_outer(outer)
        other = copy.copy(self)
        other.outer = outer
        return other

    def _check_outer(self, outer: OuterLoop) -> None:  # noqa: B027  most learners accept every outer loop
        """ConfigError where the algorithm does not go with ``outer``."""

    # Where it runs ----------------------------------------------------------------------------------------------------

    def prepare(self, device: torch.device) -> None:
        """Load the data of the tasks and move the model to ``device``. Every process that computes calls it once."""
        if not self._prepared or device != self.device:
            self._prepare_tasks(device)
            self.model.to(device)
            self.device, self._prepared = device, True
            self.set_engine(self.engine)

    def _prepare_tasks(self, device: torch.device) -> None:
        try:
            self.tasks.prepare(device)
        except MetadistError:
            raise
        except Exception as error:  # the user's own code
            key = "tasks" if isinstance(self.tasks, TaskFamily) else "environment"
            name = type(self.tasks).__name__
            raise ConfigError(f"{key}: '{name}' can't be prepared: {first_line(error)}{place(error)}") from error

    def prepared_like(self, other: Learner) -> None:
        """Compute on the device of ``other``, with the data that it has loaded."""
        self.model.to(other.device)
        self.device, self._prepared = other.device, True

    def evaluation_shards(self, request: EvaluationRequest) -> list[Shard]:
        """Return the shards of an evaluation."""
        return self.shards(request.key, Evaluate(request.inner_steps), split=request.split, tasks=request.tasks)

    def shards(self, key: MetaStepKey, computation: Computation, *, tasks: int, split: str = "train") -> list[Shard]:
        """Cut ``tasks`` tasks of ``split`` into shards of ``outer.shard_size``; the last one may be shorter.

        Validation and test tasks are the same at every meta-step.
        """
        size = self.outer.shard_size
        return [
            Shard(
                key.run,
                key.meta_step,
                0,
                index,
                computation,
                start,
                min(size, tasks - start),
                key.seed,
                split,
                key.meta_step if split == "train" else 0,
            )
            for index, start in enumerate(range(0, tasks, size))
        ]


def refuse_another_population(known: OuterLoop, outer: OuterLoop, name: str) -> None:
    """Refuse another ``meta_batch_size``, for learners whose shards hand on the states of a population."""
    if outer.meta_batch_size != known.meta_batch_size:
        raise ConfigError(
            f"outer.meta_batch_size: {outer.meta_batch_size}; the run has a population of {known.meta_batch_size} "
            f"{name}, whose states go on; start another run for another number"
        )
