"""Record evaluations in the run's directory and in MLflow, with a row per task and step.

``RUN/evaluations/ID/`` holds ``evaluation.json`` (scores, protocol, deviations from the run), ``tasks.parquet`` and the
spool of a child run in MLflow.
"""

from __future__ import annotations

import json
import secrets
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from metadist.config.schema import flatten
from metadist.core.state import Records
from metadist.experiment.judging import Judgement
from metadist.learners.evaluation import Evaluation
from metadist.storage.run_directory import RunDirectory, tracking_root
from metadist.tracking import Tracker, make_tracker

FOLDER = "evaluations"
TASKS = "tasks.parquet"


def new_evaluation_id(split: str) -> str:
    """Return a new id: the local time, the split and four random hexadecimal digits."""
    return f"{time.strftime('%Y%m%d-%H%M%S')}-{split}-{secrets.token_hex(2)}"


@dataclass
class EvaluationRecord:
    """The record of one evaluation; ``written`` is its folder's name in the run directory, once it is there."""

    judgement: Judgement
    id: str
    directory: RunDirectory
    tracker: Tracker
    written: str | None = None

    def write(self, evaluation: Evaluation, records: Records) -> None:
        """Write the scores and the records of single tasks, and log them."""
        judgement, name = self.judgement, f"{FOLDER}/{self.id}"
        trained, folder = judgement.trained, self.directory.scratch / name
        about = {
            "id": self.id,
            "created": time.time(),
            "run_id": trained.run_id,
            "meta_step": trained.meta_step,
            "params_sha256": trained.state.sha256(),
            **_deviations(judgement),
            "evaluation": evaluation.as_dict(),
        }
        self.directory.write(f"{name}/evaluation.json", json.dumps(about, indent=1))
        self.directory.upload(write_tasks(folder / TASKS, evaluation, records), f"{name}/{TASKS}")
        (folder / "evaluation.json").write_text(json.dumps(about, indent=1))
        self.tracker.metrics(trained.meta_step, evaluation.metrics())
        for file in ("evaluation.json", TASKS):
            self.tracker.artifact(folder / file)
        self.written = name


@contextmanager
def recording_of(judgement: Judgement, name: str | None = None) -> Iterator[EvaluationRecord]:
    """Begin a child run of the run in MLflow, and end it with the status of the block."""
    experiment, trained = judgement.experiment, judgement.trained
    directory, name = RunDirectory(trained.run_dir), name or new_evaluation_id(judgement.options.split)
    tracker = make_tracker(
        experiment.tracking.uri,
        spool=directory.scratch / FOLDER / name / "tracking",
        experiment=experiment.tracking.experiment,
        runs_root=tracking_root(directory),
    )
    deviations = _deviations(judgement)
    tags = {
        "metadist.kind": "evaluation",
        "metadist.run_dir": directory.url,
        "metadist.overrides": deviations["overrides"],
    }
    tracker.start(
        run_id=f"{trained.run_id}.{name}",
        name=f"evaluate {name}",
        params=flatten(deviations),
        tags={key: " ".join(v) if isinstance(v, list) else v for key, v in tags.items() if v},
        parent=trained.run_id,
    )
    status = "FAILED"
    try:
        yield EvaluationRecord(judgement, name, directory, tracker)
        status = "FINISHED"
    except KeyboardInterrupt:
        status = "KILLED"
        raise
    finally:
        tracker.finish(status, timeout=60.0 if status == "FINISHED" else 10.0)


def _deviations(judgement: Judgement) -> dict[str, Any]:
    chosen, options = judgement.experiment.evaluate, judgement.options
    return {
        "weights": judgement.trained.state.weights,
        "split": options.split,
        "tasks": judgement.request.tasks,
        "inner_steps": chosen.inner_steps,
        "normalization": chosen.normalization,
        "seed": judgement.request.key.seed,
        "overrides": list(options.overrides),
    }


def write_tasks(path: Path, evaluation: Evaluation, records: Records) -> Path:
    """Write a Parquet file with a row per task and step: ``task``, ``step`` or ``episode``, and every recorded value.

    A value that a task has once stands in each of its rows. Sources and tables (confusion matrices, row by row) are
    lists.
    """
    import pyarrow
    from pyarrow import parquet

    lists = {n: v for n, v in records.columns.items() if n == "source" or v.dim() > 2}
    others = {n: v for n, v in records.columns.items() if n != "task" and n not in lists}
    wide = {name: values.reshape(records.rows, -1) for name, values in others.items()}
    count = max(values.shape[1] for values in wide.values())
    kind, first = evaluation.counted
    columns = {
        "task": records.columns["task"].repeat_interleave(count),
        kind: torch.arange(first, first + count).repeat(records.rows),
    }
    for name, values in wide.items():
        columns[name] = (values if values.shape[1] == count else values[:, :1].expand(-1, count)).reshape(-1)
    arrays: dict[str, Any] = {name: values.numpy() for name, values in columns.items()}
    for name, values in lists.items():
        each = values.repeat_interleave(count, 0) if name == "source" else values
        arrays[name] = each.reshape(records.rows * count, -1).tolist()
    path.parent.mkdir(parents=True, exist_ok=True)
    parquet.write_table(pyarrow.table(arrays), path)
    return path
