"""The configuration: strict YAML with dotted overrides → typed settings → a Learner. Layers meet here and in ``experiment``."""

from __future__ import annotations

import functools
import inspect
import re
from collections.abc import Callable
from dataclasses import dataclass, field, is_dataclass
from typing import Any, Union

import torch
from torch import nn

from metadist.config.catalog import ALGORITHM, ENVIRONMENT, MODEL, TASK_FAMILY
from metadist.config.components import component, function, model_factory, named
from metadist.config.engine import EngineSettings
from metadist.config.groups import WorkerGroup
from metadist.config.schema import Document, as_plain, explained, settings, typed
from metadist.config.settings import (
    CheckpointSettings,
    ControlSettings,
    EvaluateSettings,
    MetricSettings,
    OutsideSettings,
    TrackingSettings,
)
from metadist.core.algorithm import Algorithm
from metadist.core.errors import ConfigError, nearest
from metadist.core.model import Model
from metadist.core.outer import OuterLoop
from metadist.core.task import TaskFamily
from metadist.learners.few_shot import Learner
from metadist.learners.trials import TrialAlgorithm, TrialLearner
from metadist.rl.environment import MetaEnvironment


@dataclass(frozen=True)
class Config:
    """A whole experiment. ``tasks``, ``model`` and ``algorithm`` are built already; ``document`` is what they were built from."""

    name: str
    seed: int
    tasks: TaskFamily | MetaEnvironment
    model: Callable[[], nn.Module]
    freeze: tuple[str, ...]
    algorithm: Any
    outer: OuterLoop
    evaluate: EvaluateSettings
    workers: tuple[WorkerGroup, ...]
    engine: EngineSettings
    checkpoint: CheckpointSettings
    tracking: TrackingSettings
    control: ControlSettings
    outside: OutsideSettings
    init_from: str | None
    document: Document = field(repr=False)

    def learner(self) -> Learner | TrialLearner:
        with explained("model", getattr(self.model, "func", self.model)):
            model = Model(self.model, dtype=getattr(torch, self.engine.dtype), freeze=self.freeze)
        if isinstance(self.tasks, MetaEnvironment):
            apart = any(g.role == "environment" and g.max for g in self.workers)
            role = "environment" if apart else "learner"
            return TrialLearner(
                self.algorithm,
                model,
                self.tasks,
                self.outer,
                self.engine.non_finite,
                rollout_role=role,
                policy=self.evaluate.policy,
            )
        return Learner(
            self.algorithm, model, self.tasks, self.outer, self.evaluate.normalization, self.engine.non_finite
        )


def supervised(learner: Learner | TrialLearner) -> Learner:
    """``learner``, where it learns from supervised tasks; else a ConfigError."""
    if not isinstance(learner, Learner):
        raise ConfigError(
            f"environment: {type(learner.tasks).__name__} is a meta-environment; this is for supervised tasks"
        )
    return learner


KEYS = (
    "name",
    "seed",
    "tasks",
    "environment",
    "model",
    "algorithm",
    "outer",
    "evaluate",
    "workers",
    "engine",
    "checkpoint",
    "tracking",
    "control",
    "outside",
    "init_from",
    "loss",
    "metric",
)


# Reading --------------------------------------------------------------------------------------------------------------


# Building -------------------------------------------------------------------------------------------------------------


def build(document: Document) -> Config:
    """Every key checked, every part built. Raises ConfigError naming the key, the value and what is allowed."""
    for key in document:
        if key not in KEYS:
            raise ConfigError(f"unknown key '{key}'{nearest(str(key), KEYS)}; allowed: {', '.join(KEYS)}")
    if "tasks" in document and "environment" in document:
        raise ConfigError("tasks, environment: give one of them: a family of supervised tasks, or a meta-environment")
    what = "environment" if "environment" in document else "tasks"
    for key in (what, "model", "algorithm"):
        if key not in document:
            raise ConfigError(
                f"key '{key}' is missing; expected {key}: {{name: …}}"
                + (" (or environment: {name: …})" if key == "tasks" else "")
            )
    tasks = component(what, document[what], ENVIRONMENT if what == "environment" else TASK_FAMILY)
    _judge_by(tasks, document)
    model_document = dict(named("model", document["model"]))
    freeze = typed("model.freeze", model_document.pop("freeze", []), tuple[str, ...])
    algorithm = component("algorithm", document["algorithm"], ALGORITHM)
    model = component("model", model_document, MODEL, deferred=True)
    kind: Any = MetaEnvironment if what == "environment" else TaskFamily
    if not isinstance(tasks, kind):
        raise ConfigError(f"{what}.name: {type(tasks).__name__} is not a metadist.{kind.__name__}")
    wanted: Any = TrialAlgorithm if what == "environment" else Algorithm
    if not isinstance(algorithm, wanted):
        fits = [n for n, cls in ALGORITHM.own.items() if issubclass(cls, wanted)]
        raise ConfigError(
            f"algorithm.name: {type(algorithm).__name__} is not a metadist.{wanted.__name__}; with {what}: {', '.join(sorted(fits))}, or your own"
        )
    factory = model_factory(model, tasks, algorithm)
    groups = document.get("workers")
    if groups is not None and not isinstance(groups, list):
        raise ConfigError(f"workers: expected a list of groups, such as [{{role: learner, max: 2}}], got {groups!r}")
    config = Config(
        name=typed("name", document.get("name", "experiment"), str),
        seed=typed("seed", document.get("seed", 0), int),
        tasks=tasks,
        model=factory,
        freeze=freeze,
        algorithm=algorithm,
        outer=settings("outer", document.get("outer"), OuterLoop),
        evaluate=settings("evaluate", document.get("evaluate"), EvaluateSettings),
        workers=tuple(settings(f"workers.{i}", g, WorkerGroup) for i, g in enumerate(groups or [{}])),
        engine=settings("engine", document.get("engine"), EngineSettings),
        checkpoint=settings("checkpoint", document.get("checkpoint"), CheckpointSettings),
        tracking=settings("tracking", document.get("tracking"), TrackingSettings),
        control=settings("control", document.get("control"), ControlSettings),
        outside=settings("outside", document.get("outside"), OutsideSettings),
        init_from=typed("init_from", document.get("init_from"), Union[str, None]),
        document=document,
    )
    _check_name(config.name)
    _check_outside(config, what)
    for key, value in (
        ("evaluate.every", config.evaluate.every),
        ("evaluate.tasks", config.evaluate.tasks),
        ("evaluate.test_tasks", config.evaluate.test_tasks),
        ("checkpoint.every", config.checkpoint.every),
        ("checkpoint.keep", config.checkpoint.keep),
        ("tracking.log_every", config.tracking.log_every),
    ):
        if value < 1:
            raise ConfigError(f"{key}: {value} is below 1")
    for key, limit in (
        ("evaluate.inner_steps", config.evaluate.inner_steps),
        ("evaluate.patience", config.evaluate.patience),
        ("engine.shard_timeout", config.engine.shard_timeout),
        ("engine.worker_patience", config.engine.worker_patience),
    ):
        lowest = 0 if key == "evaluate.inner_steps" else 1
        if limit is not None and limit < lowest:
            raise ConfigError(f"{key}: {limit} is below {lowest}")
    return config


def _check_outside(config: Config, what: str) -> None:
    """Groups of workers from outside that nobody could join, or that nothing could be asked of."""
    groups = [(i, g) for i, g in enumerate(config.workers) if g.outside and g.max]
    for i, group in groups:
        if config.outside.listen is None:
            raise ConfigError(
                f"workers.{i}.outside: true, but there is no address to connect to; give outside: {{listen: HOST:PORT}}, or --outside HOST:PORT"
            )
        if group.role == "environment" and what == "tasks":
            raise ConfigError(
                f"workers.{i}.role: environment, but supervised tasks have no environments; expected learners"
            )
        if sum(other.role == group.role for _, other in groups) > 1:
            raise ConfigError(f"workers.{i}: two groups of {group.role}s from outside; expected one for each role")
    if groups and config.engine.wire != "exact":
        raise ConfigError(
            f"engine.wire: {config.engine.wire} is for workers of the Ray cluster; with workers from outside use exact"
        )


def build_environment(document: Document) -> MetaEnvironment:
    """The meta-environment of a document alone."""
    if "environment" not in document:
        raise ConfigError("key 'environment' is missing; expected environment: {name: …}")
    made = component("environment", document["environment"], ENVIRONMENT)
    if not isinstance(made, MetaEnvironment):
        raise ConfigError(f"environment.name: {type(made).__name__} is not a metadist.MetaEnvironment")
    return made


def _check_name(name: str) -> None:
    if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9_.-]{0,79}", name):
        raise ConfigError(f"name: '{name}' must be 1 to 80 letters, digits, '.', '_' or '-', since it names a folder")


def _judge_by(tasks: Any, document: Document) -> None:
    """Put the user's own loss and metric in the family's place."""
    if document.get("loss") is not None:
        loss = function(typed("loss", document["loss"], str), "loss")
        object.__setattr__(tasks, "loss", loss)
    if document.get("metric") is not None:
        metric = document["metric"]
        chosen = settings("metric", {"name": metric} if isinstance(metric, str) else metric, MetricSettings)
        object.__setattr__(tasks, "metric", function(chosen.name, "metric"))
        object.__setattr__(tasks, "metric_name", chosen.name.partition(":")[2])
        object.__setattr__(tasks, "higher_is_better", chosen.higher_is_better)


def resolved(config: Config) -> Document:
    """The document with every default filled in: what ``--print-config`` shows and a run records."""
    document: Document = {"name": config.name, "seed": config.seed}
    what = "environment" if "environment" in config.document else "tasks"
    for key, part in ((what, config.tasks), ("model", config.model), ("algorithm", config.algorithm)):
        given = dict(named(key, config.document[key]))
        instance: Any = part
        if key == "model" and isinstance(part, functools.partial) and inspect.ismethod(part.func):
            instance = part.func.__self__
        document[key] = {
            "name": given.get("name"),
            **(as_plain(instance) if is_dataclass(instance) else given),
            **given,
        }
    document["outer"] = as_plain(config.outer)
    document["evaluate"] = as_plain(config.evaluate)
    document["workers"] = [as_plain(g) for g in config.workers]
    for key in ("engine", "checkpoint", "tracking", "control", "outside"):
        document[key] = as_plain(getattr(config, key))
    return {**document, **{k: config.document.get(k) for k in ("init_from", "loss", "metric")}}
