"""Log and register a run's models in MLflow."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import logging
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from metadist.core.differences import flat
from metadist.core.errors import ConfigError
from metadist.core.random import TaskKey
from metadist.experiment.load import load_run
from metadist.experiment.result import Result
from metadist.learners import supervised
from metadist.storage.run_directory import RunDirectory, runs_root, tracking_root

log = logging.getLogger(__name__)


def log_models(tracker: Any, folder: RunDirectory, result: Result, register: str) -> None:
    """Register the parameters that validated best as the model ``register``; log the last parameters, too."""
    if reason := result.experiment.learner.servable():
        log.warning("tracking.register: not registered: %s", reason)
        return
    outcome = result.outcome
    place = folder.scratch / "mlflow_model"
    _record(tracker, place, result, "model", outcome.best_step, register)
    if outcome.progress.meta_step != outcome.best_step:
        last = dataclasses.replace(result, outcome=dataclasses.replace(outcome, best=outcome.progress.state))
        _record(tracker, place, last, "model-final", outcome.progress.meta_step, None)


def _record(tracker: Any, place: Path, result: Result, name: str, meta_step: int, register: str | None) -> None:
    tracker.model(name, _write(place / name, result), {**_about(result, meta_step), "register": register})


def _write(place: Path, result: Result) -> list[Path]:
    place.mkdir(parents=True, exist_ok=True)
    files = [place / "model.safetensors", place / "example.npz"]
    result.export(files[0])
    np.savez(files[1], **_example(result))
    return files


def _example(result: Result) -> dict[str, Any]:
    """Return the first validation task as an example of the model's input."""
    learner = supervised(result.experiment.learner)
    task = learner.sample(TaskKey.of(result.experiment.evaluation_seed, "validation", 0, [0]))
    parts = {"support_x": task.support.x, "support_y": task.support.y, "query_x": task.query.x}
    return {name: tensor[0].numpy() for name, tensor in flat(parts).items()}


def _about(result: Result, meta_step: int) -> dict[str, Any]:
    experiment = result.experiment
    learner, settings = supervised(experiment.learner), experiment.evaluate
    judged = [v for v in result.outcome.progress.validation if v["meta_step"] == meta_step]
    if not judged:
        raise ConfigError(
            f"run {result.run_id} has no validation at meta-step {meta_step}; the choice of the champion needs one"
        )
    protocol = {
        "tasks": experiment.document.get("tasks"),
        "seed": experiment.evaluation_seed,
        "validation_tasks": settings.tasks,
        "inner_steps": settings.inner_steps,
        "metric": learner.tasks.metric_name,
    }
    return {
        "run_id": result.run_id,
        "meta_step": meta_step,
        "weights": result.weights,
        "algorithm": type(learner.algorithm).__name__,
        "metric": learner.tasks.metric_name,
        "score": judged[-1]["mean"],
        "higher_is_better": learner.tasks.higher_is_better,
        "protocol": hashlib.sha256(json.dumps(protocol, sort_keys=True, default=str).encode()).hexdigest()[:16],
        "predictions": {
            name: [[-1 if n is None else n for n in kind.shape or ()], str(learner.model.dtype).removeprefix("torch.")]
            for name, kind in result.signature.prediction.items()
        },
        "inner_steps": -1 if settings.inner_steps is None else settings.inner_steps,
    }


def register_run(run_dir: str, name: str, trust: Sequence[str] = ()) -> str:
    """Log a finished run's best parameters as an MLflow model, register it as ``name``, and return its version."""
    from metadist.tracking.model_registry import register_now

    result, folder = load_run(run_dir, trust=trust), RunDirectory(run_dir)
    if reason := result.experiment.learner.servable():
        raise ConfigError(f"register: {run_dir}: {reason}")
    result.experiment.learner.prepare(torch.device("cpu"))
    with tempfile.TemporaryDirectory() as place:
        _write(Path(place), result)
        about = {**_about(result, result.outcome.best_step), "register": name}
        return register_now(
            folder.scratch / "tracking", result.experiment.tracking.uri, tracking_root(folder), Path(place), about
        )


def fetch_registered(uri: str) -> str:
    """Download the model ``models:/NAME@ALIAS``, ``models:/NAME/VERSION`` or ``runs:/…``; return its weights' path."""
    from metadist.tracking.model_registry import fetch

    return str(fetch(uri, Path(runs_root()).resolve()))
