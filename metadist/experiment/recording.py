"""Record a run: start and finish its tracker, and write its files."""

from __future__ import annotations

import hashlib
import json
import logging
import platform
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch

import metadist
from metadist.config.experiment import Experiment
from metadist.config.schema import flatten
from metadist.experiment.attempt import Attempt
from metadist.experiment.evaluation_record import write_tasks
from metadist.experiment.result import Result
from metadist.jobs import links
from metadist.storage.run_directory import RunDirectory, tracking_root
from metadist.tracking import Tracker, make_tracker
from metadist.training.observers import Observer

log = logging.getLogger(__name__)


@dataclass
class Recording:
    """A started tracker and the status at the run's end. ``undelivered`` and ``url`` are known after the end."""

    tracker: Tracker
    status: str = "FAILED"
    undelivered: int = 0
    url: str | None = None


@contextmanager
def recorded(attempt: Attempt, parent: str | None) -> Iterator[Recording]:
    """Start the tracker of a run, and finish it with the status that the caller sets. Ctrl-C sets KILLED."""
    recording = Recording(_start_tracker(attempt, parent))
    try:
        links.record(attempt.directory, None)
        yield recording
    except KeyboardInterrupt:
        recording.status = "KILLED"
        raise
    finally:
        timeout = 60.0 if recording.status == "FINISHED" else 10.0
        recording.undelivered = recording.tracker.finish(recording.status, timeout=timeout)
        recording.url = recording.tracker.url()
        links.record(attempt.directory, recording.url)


def _start_tracker(attempt: Attempt, parent: str | None) -> Tracker:
    experiment, directory = attempt.experiment, attempt.directory
    settings = experiment.tracking
    tracker = make_tracker(
        settings.uri,
        spool=directory.scratch / "tracking",
        experiment=settings.experiment,
        runs_root=tracking_root(directory),
    )
    tags = {
        "metadist.run_id": attempt.run_id,
        "metadist.run_dir": directory.url,
        "metadist.version": metadist.__version__,
        "metadist.data_sha256": experiment.learner.data_sha256 or "",
        **_revisions(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "host": platform.node(),
        "platform": platform.platform(),
        **links.tags(),
    }
    tracker.start(
        run_id=attempt.run_id,
        name=directory.url.rsplit("/", 1)[-1],
        params=flatten(experiment.document),
        tags={k: v for k, v in tags.items() if v},
        parent=parent,
        mlflow_run_id=attempt.manifest.get("mlflow_run_id"),
    )
    _record_input(tracker, experiment)
    if directory.local and (Path(directory.url) / "config.yaml").is_file():
        tracker.artifact(Path(directory.url) / "config.yaml")
    _record_data(attempt, tracker)
    return tracker


def _revisions() -> dict[str, str]:
    """Return the git revision of the user's working directory and that of metadist's checkout, where there are any.

    MLflow shows ``mlflow.source.git.commit`` with the run.
    """
    commit, own = _git(Path.cwd(), "rev-parse", "HEAD"), _git(Path(__file__).parent, "rev-parse", "HEAD")
    changed = "-dirty" if commit and _git(Path.cwd(), "status", "--porcelain", "--untracked-files=no") else ""
    return {
        "git.revision": commit + changed,
        "mlflow.source.git.commit": commit,
        "mlflow.source.name": sys.argv[0] if sys.argv else "",
        "mlflow.source.type": "LOCAL",
        "metadist.git.revision": own,
    }


def _git(folder: Path, *arguments: str) -> str:
    try:
        command = ["git", "-C", str(folder), *arguments]
        return subprocess.run(command, capture_output=True, text=True, timeout=5, check=True).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return ""


def _record_input(tracker: Tracker, experiment: Experiment) -> None:
    """Record the data of the tasks as an input of the run; for generated tasks, their config."""
    document = experiment.document[experiment.tasks_key]
    name, data = str(document.get("name")), experiment.learner.data_sha256
    described = hashlib.sha256(json.dumps(document, sort_keys=True, default=str).encode()).hexdigest()
    source = str(document.get("path") or name) if data else f"tasks:{name}"
    about = {key: str(value) for key, value in flatten(document).items()}
    tracker.dataset(name, data or described, source, about)


def description(result: Result) -> str:
    """Return the text at the top of a run's page in MLflow: scores, hashes and links, as Markdown."""
    outcome, learner = result.outcome, result.experiment.learner
    scores = [
        f"**{judged.split} {judged.metric} {judged.score:.4f} ± {judged.score_ci95:.4f}** on {judged.tasks} tasks"
        for judged in result.evaluations
    ]
    ended, averages = f" ({outcome.stopped})" if outcome.stopped else "", result.averaged_sha256
    facts = {
        "meta-steps": f"{outcome.progress.meta_step} of {learner.outer.meta_steps}{ended}, best at {outcome.best_step}",
        "run directory": f"`{result.run_dir}`",
        "parameters": f"sha256 `{result.params_sha256}`",
        "averages": f"sha256 `{averages}`; scores and models are of them" if averages else "",
        "data": f"sha256 `{learner.data_sha256}`" if learner.data_sha256 else "",
        "job": links.job_link(),
    }
    rows = [f"- {name}: {value}" for name, value in facts.items() if value]
    return "\n\n".join([*scores, "\n".join(rows)])


def _record_data(attempt: Attempt, tracker: Tracker) -> None:
    """Write the classes of each split to ``splits.json``, which can serve as a ``split_list``; log the data's notes."""
    directory, learner = attempt.directory, attempt.experiment.learner
    if splits := learner.splits():
        path = directory.scratch / "splits.json"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps({s: list(names) for s, names in splits.items()}, indent=1), encoding="utf-8")
        directory.upload(path, path.name)
        tracker.artifact(path)
    if notes := "; ".join(learner.tasks.data_notes()):
        log.warning("data: %s", notes)
        tracker.tags({"metadist.data_notes": notes[:5000]})


def inexact_marker(attempt: Attempt, observers: Observer, tracker: Tracker) -> Callable[[str], None]:
    """Return a function that reports a worker whose numerics differ from the run's: once to display and tracker."""

    def mark(worker: str) -> None:
        if worker not in attempt.inexact:
            attempt.inexact.append(worker)
            observers.note(f"the run is inexact from now on: {worker}")
            tracker.tags({"metadist.inexact": "; ".join(attempt.inexact)})

    return mark


def write_result(directory: RunDirectory, result: Result, tracker: Tracker, *, plots: bool) -> None:
    """Write model and scores to the run directory and the tracker.

    For a finished run, also register the model where the config asks for it, and draw the plots.
    """
    result.export(f"{directory.url}/model.safetensors")
    directory.write("result.json", json.dumps(result.as_dict(), indent=1))
    if directory.local:
        tracker.artifact(Path(directory.url) / "model.safetensors")
    if result.evaluations:
        directory.write("evaluation.json", json.dumps([e.as_dict() for e in result.evaluations], indent=1))
    if result.evaluations and result.task_records is not None:
        tasks = write_tasks(directory.scratch / "evaluation_tasks.parquet", result.evaluations[0], result.task_records)
        directory.upload(tasks, tasks.name)
        tracker.artifact(tasks)
    hashes = {"metadist.params_sha256": result.params_sha256, "metadist.averaged_sha256": result.averaged_sha256 or ""}
    tracker.tags({**{k: v for k, v in hashes.items() if v}, "mlflow.note.content": description(result)})
    if result.interrupted:
        return
    # Matplotlib and MLflow's requirements take seconds to import.
    if result.experiment.tracking.register:
        from metadist.experiment.registration import log_models

        log_models(tracker, directory, result, result.experiment.tracking.register)
    if plots:
        from metadist.experiment.reports import draw

        for path in draw(result, directory.scratch / "plots"):
            tracker.artifact(path, "plots")
            directory.upload(path, f"plots/{path.name}")
