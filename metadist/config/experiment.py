"""One experiment: the schema of a config, the description of a run, and the content of its manifest."""

from __future__ import annotations

import functools
import re
import typing
from collections.abc import Callable
from dataclasses import dataclass, field, fields, is_dataclass
from typing import Generic, TypeVar, Union

import torch
from torch import nn

from metadist.config.engine import EngineSettings
from metadist.config.groups import WorkerGroup
from metadist.config.modules import code_hashes, code_modules, main_hashes
from metadist.config.schema import Document, Plain, as_plain, explained
from metadist.config.settings import (
    CheckpointSettings,
    ControlSettings,
    EvaluateSettings,
    OutsideSettings,
    TrackingSettings,
)
from metadist.core.algorithm import Algorithm
from metadist.core.carried import CarriedAlgorithm
from metadist.core.errors import ConfigError
from metadist.core.model import Model
from metadist.core.outer import OuterLoop
from metadist.core.task import TaskFamily
from metadist.learners.base import AnyAlgorithm, Learner
from metadist.learners.carried import CarriedLearner
from metadist.learners.few_shot import FewShotLearner
from metadist.learners.trials import TrialLearner
from metadist.rl.algorithm import TrialAlgorithm
from metadist.rl.environment import MetaEnvironment

T = TypeVar("T")


@dataclass(frozen=True)
class Component(Generic[T]):
    """A built part of an experiment, and the config that builds it again."""

    made: T
    document: Document


@dataclass(frozen=True, kw_only=True)
class Experiment:
    """Everything that a run depends on.

    Every field is a key of a config (``tasks`` is ``environment`` for meta-environments).

    A new setting is one field here, or one field of a section; reading, defaults, ``--print-config``, the manifest and
    the comparison on ``--resume`` follow from it.
    """

    name: str = "experiment"
    seed: int = 0
    tasks: Component[TaskFamily | MetaEnvironment]
    model: Component[Callable[[], nn.Module]]
    algorithm: Component[AnyAlgorithm]
    outer: OuterLoop = OuterLoop()
    evaluate: EvaluateSettings = EvaluateSettings()
    workers: tuple[WorkerGroup, ...] = (WorkerGroup(),)
    engine: EngineSettings = EngineSettings()
    checkpoint: CheckpointSettings = CheckpointSettings()
    tracking: TrackingSettings = TrackingSettings()
    control: ControlSettings = ControlSettings()
    outside: OutsideSettings = OutsideSettings()
    init_from: Union[str, None] = None
    loss: Union[str, None] = None
    metric: Union[str, Document, None] = None
    task_metrics: Union[tuple[str, ...], None] = None
    #: whether the config can be read back: not where objects were made in Python
    from_document: bool = field(default=True, metadata={"key": False})

    def __post_init__(self) -> None:
        if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9_.-]{0,79}", self.name):
            raise ConfigError(
                f"name: '{self.name}' must be 1 to 80 letters, digits, '.', '_' or '-', since it names a folder"
            )
        self._check_remote_groups()

    def _check_remote_groups(self) -> None:
        """Refuse groups of remote workers that nobody could join, or that have nothing to compute."""
        groups = [(i, g) for i, g in enumerate(self.workers) if g.outside and g.max]
        for i, group in groups:
            if self.outside.listen is None:
                raise ConfigError(
                    f"workers.{i}.outside: true, but there is no address to connect to; give outside: "
                    f"{{listen: HOST:PORT}}, "
                    "or --outside HOST:PORT"
                )
            if group.role == "environment" and self.tasks_key == "tasks":
                raise ConfigError(
                    f"workers.{i}.role: environment, but supervised tasks have no environments; expected learners"
                )
            if sum(other.role == group.role for _, other in groups) > 1:
                raise ConfigError(f"workers.{i}: two groups of {group.role}s from outside; expected one for each role")
        if groups and self.engine.wire != "exact":
            raise ConfigError(
                f"engine.wire: {self.engine.wire} is for workers of the Ray cluster; with workers from outside use "
                "exact"
            )

    @property
    def tasks_key(self) -> str:
        """The key of the tasks in a config: ``tasks`` or ``environment``."""
        return "environment" if isinstance(self.tasks.made, MetaEnvironment) else "tasks"

    @property
    def evaluation_seed(self) -> int:
        """The seed of validation and test tasks."""
        return self.seed if self.evaluate.seed is None else self.evaluate.seed

    @property
    def in_process(self) -> bool:
        """Whether the driver's own process computes every shard."""
        return not any(group.max for group in self.workers)

    @functools.cached_property
    def document(self) -> Document:
        """The config with every default filled in: what ``--print-config`` shows and a run records."""
        keys = {f.name: getattr(self, f.name) for f in KEYS}
        return {self.tasks_key if name == "tasks" else name: _plain(value) for name, value in keys.items()}

    @property
    def code_modules(self) -> tuple[str, ...]:
        """The modules whose code can change θ: those that the config names by import path, and those of plug-ins."""
        return code_modules(self.document, self.tasks.made, self.algorithm.made)

    @functools.cached_property
    def code(self) -> dict[str, str]:
        """The SHA-256 of each module of the user's own that the experiment is made of, at the first look."""
        return {**code_hashes(self.code_modules), **main_hashes(self.document)}

    @functools.cached_property
    def learner(self) -> Learner:
        """The mathematics of the experiment."""
        factory, freeze = self.model.made, tuple(self.model.document.get("freeze", ()))
        with explained("model", getattr(factory, "func", factory)):
            model = Model(factory, dtype=getattr(torch, self.engine.dtype), freeze=freeze)
        tasks, algorithm = self.tasks.made, self.algorithm.made
        if isinstance(tasks, MetaEnvironment):
            assert isinstance(algorithm, TrialAlgorithm)
            apart = any(g.role == "environment" and g.max for g in self.workers)
            return TrialLearner(
                algorithm,
                model,
                tasks,
                self.outer,
                self.engine.non_finite,
                rollout_role="environment" if apart else "learner",
                policy=self.evaluate.policy,
            )
        if isinstance(algorithm, CarriedAlgorithm):
            if self.evaluate.normalization != "transductive":
                raise ConfigError(
                    f"evaluate.normalization: {self.evaluate.normalization}; algorithm "
                    f"'{type(algorithm).__name__}' trains whole networks, which take transductive"
                )
            return CarriedLearner(algorithm, model, tasks, self.outer, self.engine.non_finite)
        assert isinstance(algorithm, Algorithm)
        return FewShotLearner(algorithm, model, tasks, self.outer, self.evaluate.normalization, self.engine.non_finite)


#: the fields that are keys of a config
KEYS = tuple(f for f in fields(Experiment) if f.metadata.get("key", True))
#: the keys that name a class and its options; all others are typed values
COMPONENTS = ("tasks", "environment", "model", "algorithm")
ALLOWED = tuple(key for f in KEYS for key in (("tasks", "environment") if f.name == "tasks" else (f.name,)))


def setting_types() -> dict[str, object]:
    """Return the type of every key that is no component."""
    hints = typing.get_type_hints(Experiment)
    return {f.name: hints[f.name] for f in KEYS if f.name not in COMPONENTS}


def _plain(value: object) -> Plain:
    if isinstance(value, Component):
        return value.document
    if isinstance(value, tuple):
        return [_plain(item) for item in value]
    if is_dataclass(value):
        return as_plain(value)
    return value  # type: ignore[return-value]  # a text, number, mapping or None
