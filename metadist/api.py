"""The Python interface: the same experiments without YAML."""

from __future__ import annotations

import copy
import functools
import inspect
import sys
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import is_dataclass
from typing import Any

from torch import nn

from metadist.config.components import JUDGES, judge_by, model_factory
from metadist.config.experiment import KEYS, Component, Experiment
from metadist.config.groups import WorkerGroup
from metadist.config.schema import Document, as_plain
from metadist.config.settings import TrackingSettings
from metadist.core.algorithm import Algorithm
from metadist.core.carried import CarriedAlgorithm
from metadist.core.errors import ConfigError, nearest
from metadist.core.imports import path_of
from metadist.core.round import Report
from metadist.core.task import TaskFamily
from metadist.core.text import show
from metadist.experiment.interruption import StopSignals, TrainingInterrupted
from metadist.experiment.live import live
from metadist.experiment.load import load_run
from metadist.experiment.request import RunRequest
from metadist.experiment.result import Result
from metadist.experiment.train import train as train_experiment
from metadist.learners.evaluation import Evaluation
from metadist.training.observers import Observer, Observers


def compose(
    *,
    tasks: TaskFamily,
    model: Callable[[], nn.Module] | nn.Module | Any,
    algorithm: Algorithm | CarriedAlgorithm,
    workers: int | WorkerGroup = 0,
    tracking: TrackingSettings | str = "auto",
    freeze: tuple[str, ...] = (),
    **settings: Any,
) -> Experiment:
    """Return an experiment that is made of objects.

    ``model`` is a function that builds an ``nn.Module`` (initialised from ``seed``), a module (training starts from
    its parameters) or a model config such as ``metadist.Conv4()``. ``workers=0`` computes in this process.
    ``settings`` are further fields of an experiment: name, seed, outer, evaluate, engine, checkpoint, control,
    init_from, and loss, metric and task_metrics by name or import path. Raises ConfigError where a part has the
    wrong type.
    """
    if not isinstance(tasks, TaskFamily) or not isinstance(algorithm, (Algorithm, CarriedAlgorithm)):
        raise ConfigError(
            f"expected tasks: TaskFamily and algorithm: Algorithm, got {type(tasks).__name__} and "
            f"{type(algorithm).__name__}"
        )
    known = [f.name for f in KEYS]
    for name in settings:
        if name not in known:
            raise ConfigError(f"unknown setting '{name}'{nearest(name, known)}; allowed: {', '.join(known)}")
    if any(settings.get(name) is not None for name in JUDGES):
        tasks = copy.copy(tasks)  # the caller's family keeps its own
        judge_by(tasks, settings)
    experiment = Experiment(
        tasks=Component(tasks, _described(tasks)),
        model=Component(model_factory(model, tasks, algorithm), {**_described(model), "freeze": list(freeze)}),
        algorithm=Component(algorithm, _described(algorithm)),
        workers=(WorkerGroup(min=workers, max=workers) if isinstance(workers, int) else workers,),
        tracking=TrackingSettings(uri=tracking) if isinstance(tracking, str) else tracking,
        from_document=False,
        **settings,
    )
    experiment.learner  # noqa: B018  a mistake shows here, not later
    return experiment


def train(
    *,
    run_dir: str | None = None,
    resume: bool = False,
    on_step: Callable[[int, Mapping[str, float]], object] | None = None,
    on_evaluation: Callable[[int, Evaluation], object] | None = None,
    quiet: bool = False,
    trust: Sequence[str] = (),
    **parts: Any,
) -> Result:
    """Meta-train the experiment that ``compose(**parts)`` returns.

    Progress is shown on stderr: a bar on a terminal, a line below the cell of a notebook, lines elsewhere; nothing with
    ``quiet``. ``on_step(meta_step, report)`` is called after every meta-step, ``on_evaluation(meta_step, evaluation)``
    after every validation; an exception that they raise ends the run, with a checkpoint. So do Ctrl-C and SIGTERM:
    ``TrainingInterrupted``, a KeyboardInterrupt, then carries the result so far. ``trust``: the modules that the
    run in ``init_from`` may name, besides those of this experiment.
    """
    experiment = compose(**parts)
    with StopSignals(lambda message: show(message, file=sys.stderr)) as stop, ExitStack() as stack:
        display = Observer() if quiet else stack.enter_context(live(experiment))
        observers = Observers(display, stop, _Callbacks(on_step, on_evaluation))
        result = train_experiment(
            experiment, RunRequest(run_dir=run_dir, resume=resume, trust=trust, stop=stop), observers
        )
    if result.interrupted and stop.asked:
        raise TrainingInterrupted(result)
    return result


class _Callbacks(Observer):
    """Call the functions of the user."""

    def __init__(
        self,
        on_step: Callable[[int, Mapping[str, float]], object] | None,
        on_evaluation: Callable[[int, Evaluation], object] | None,
    ) -> None:
        self._on_step, self._on_evaluation = on_step, on_evaluation

    def step(self, meta_step: int, report: Report, tasks_per_second: float) -> None:
        if self._on_step is not None:
            self._on_step(meta_step, {**report, "tasks_per_second": tasks_per_second})

    def evaluated(self, meta_step: int, evaluation: Evaluation) -> None:
        if self._on_evaluation is not None:
            self._on_evaluation(meta_step, evaluation)


def load(run_dir: str, made_from: Experiment | None = None, trust: Sequence[str] = ()) -> Result:
    """Load the best parameters of a run, ready to ``adapt`` and ``predict``.

    ``trust``: the modules with parts of the run that metadist may import, such as ``["lines"]`` for your lines.py.
    Pass the experiment as ``made_from`` where they cannot be imported.
    """
    return load_run(run_dir, made_from, trust)


def _described(part: Any) -> Document:
    """Return the config that builds the same object, where its class can be imported; its name in any case."""
    if isinstance(part, functools.partial):
        return {**_described(part.func), **part.keywords}
    named = part if inspect.isfunction(part) or inspect.isclass(part) else type(part)
    options = as_plain(part) if is_dataclass(part) and not inspect.isclass(part) else {}
    return {"name": path_of(named), **options}


__all__ = ["compose", "load", "train"]
