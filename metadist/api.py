"""The Python interface: the same experiments without YAML."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from metadist.config.build import EngineSettings, _check_name
from metadist.config.components import model_factory
from metadist.config.groups import WorkerGroup
from metadist.config.schema import as_plain
from metadist.config.settings import CheckpointSettings, ControlSettings, EvaluateSettings, TrackingSettings
from metadist.core.algorithm import Algorithm
from metadist.core.errors import ConfigError
from metadist.core.model import Model
from metadist.core.outer import OuterLoop
from metadist.core.task import TaskFamily
from metadist.experiment.description import Experiment
from metadist.experiment.load import load_run as _load_run
from metadist.experiment.result import Result
from metadist.experiment.train import train as _train
from metadist.learners.few_shot import Learner


def compose(
    *,
    tasks: TaskFamily,
    model: Callable[[], nn.Module] | nn.Module | Any,
    algorithm: Algorithm,
    outer: OuterLoop = OuterLoop(),
    name: str = "experiment",
    seed: int = 0,
    workers: int | WorkerGroup = 0,
    freeze: tuple[str, ...] = (),
    init_from: str | None = None,
    evaluate: EvaluateSettings = EvaluateSettings(),
    checkpoint: CheckpointSettings = CheckpointSettings(),
    engine: EngineSettings = EngineSettings(),
    tracking: TrackingSettings | str = "auto",
    control: ControlSettings = ControlSettings(),
) -> Experiment:
    """An experiment from objects. ``model`` is a function that builds an ``nn.Module`` (initialised from ``seed``), a module (its
    parameters are where training starts) or a model config such as ``metadist.Conv4()``. ``workers=0`` computes in this process.
    """
    _check_name(name)
    if not isinstance(tasks, TaskFamily) or not isinstance(algorithm, Algorithm):
        raise ConfigError(
            f"expected tasks: TaskFamily and algorithm: Algorithm, got {type(tasks).__name__} and {type(algorithm).__name__}"
        )
    group = WorkerGroup(min=workers, max=workers) if isinstance(workers, int) else workers
    settings = TrackingSettings(uri=tracking) if isinstance(tracking, str) else tracking
    pure = Model(model_factory(model, tasks, algorithm), dtype=getattr(torch, engine.dtype), freeze=freeze)
    learner = Learner(algorithm, pure, tasks, outer, evaluate.normalization, engine.non_finite)
    document = {
        "name": name,
        "seed": seed,
        "tasks": _described(tasks),
        "model": {**_described(model), "freeze": list(freeze)},
        "algorithm": _described(algorithm),
        "outer": as_plain(outer),
        "evaluate": as_plain(evaluate),
        "workers": [as_plain(group)],
        "engine": as_plain(engine),
        "checkpoint": as_plain(checkpoint),
        "tracking": as_plain(settings),
        "control": as_plain(control),
        "init_from": init_from,
    }
    return Experiment(
        name,
        seed,
        learner,
        evaluate,
        (group,),
        engine,
        checkpoint,
        settings,
        control,
        init_from=init_from,
        document=document,
    )


def train(*, run_dir: str | None = None, resume: bool = False, **parts: Any) -> Result:
    """Meta-train what ``compose(**parts)`` describes; see there for the arguments."""
    return _train(compose(**parts), run_dir=run_dir, resume=resume)


def load(run_dir: str, made_from: Experiment | None = None) -> Result:
    """A run's best parameters, ready to ``adapt`` and ``predict``. ``made_from`` is needed where the run's classes can't be imported."""
    return _load_run(run_dir, made_from)


def _described(part: Any) -> dict[str, Any]:
    """The config that builds the same object, if its class can be imported; at any rate what to call it."""
    if isinstance(part, functools.partial):
        return {**_described(part.func), **part.keywords}
    named = part if inspect.isfunction(part) or inspect.isclass(part) else type(part)
    name = f"{named.__module__}:{named.__qualname__}"
    return {
        "name": name,
        **(as_plain(part) if hasattr(part, "__dataclass_fields__") and not inspect.isclass(part) else {}),
    }


__all__ = ["compose", "load", "train"]
