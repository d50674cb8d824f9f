"""An experiment from beginning to end: fleet, tracker, checkpoints, loop, test score, plots. Used by the command line and from Python."""

from __future__ import annotations

import dataclasses
import json
import logging
import platform
import subprocess
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import yaml

import metadist
from metadist.config.schema import flatten
from metadist.control.feed import Board
from metadist.core.errors import ConfigError
from metadist.core.round import Executor
from metadist.experiment.description import Experiment, Quiet
from metadist.experiment.fleet import fleet, planner_for
from metadist.experiment.lifecycle import checked, claimed, served, steering_of
from metadist.experiment.load import _initial, tracking_root
from metadist.experiment.oracle_comparison import Regret
from metadist.experiment.result import Result
from metadist.experiment.resume import _checked_manifest, _refuse_other_config
from metadist.jobs import links as run_page
from metadist.learners.dry_run import check
from metadist.storage.checkpoints import Checkpoints
from metadist.storage.run_directory import RunFolder, new_run_id, newest_run, runs_root
from metadist.tracking.prometheus import exporting
from metadist.training.evaluation import Evaluation, evaluate
from metadist.training.loop import evaluation_metrics, meta_train
from metadist.training.observers import Display
from metadist.training.progress import Outcome, Progress, Run
from metadist.training.scheduler import Scheduler
from metadist.workers.plan import obey

log = logging.getLogger(__name__)


# The main job ---------------------------------------------------------------------------------------------------------


def train(
    experiment: Experiment,
    *,
    run_dir: str | None = None,
    resume: bool = False,
    display: Display | None = None,
    stop: Callable[[], bool] = lambda: False,
    wrap: Callable[[Executor], Executor] | None = None,
    parent: str | None = None,
    test: bool = True,
    plots: bool = True,
    run_id: str | None = None,
) -> Result:
    """Meta-train, test once, and record everything under ``run_dir`` (default: a new folder under ``METADIST_RUNS``).

    ``wrap`` puts an executor around the run's own: one that fails on purpose (``metadist.workers.faulty``).
    """
    began = time.perf_counter()
    display = display or Quiet()
    learner = experiment.learner
    checked(experiment.control)
    if resume and run_dir is None:
        run_dir = newest_run(experiment.name)
    run_id = run_id or new_run_id(experiment.name)
    folder = RunFolder(run_dir or f"{runs_root()}/{run_id}")
    checkpoints = Checkpoints(
        folder.url, keep=experiment.checkpoint.keep, higher_is_better=learner.tasks.higher_is_better
    )
    learner.prepare(torch.device("cpu"))
    check(learner, experiment.seed)  # before the folder is claimed: a mistake in the config leaves nothing behind
    with claimed(folder):
        run_id = _open(folder, experiment, run_id, resume)
        result = _train(experiment, folder, checkpoints, run_id, display, stop, wrap, parent, test, plots)
    result.wall_seconds = time.perf_counter() - began
    return result


def _train(
    experiment: Experiment,
    folder: RunFolder,
    checkpoints: Checkpoints,
    run_id: str,
    display: Display,
    stop: Callable[[], bool],
    wrap: Callable[[Executor], Executor] | None,
    parent: str | None,
    test: bool,
    plots: bool,
) -> Result:
    """``train`` in a folder that is this process's."""
    began, learner = time.perf_counter(), experiment.learner
    earlier = checkpoints.latest(learner.slots)
    progress = Progress.of(earlier) if earlier else Progress(0, learner.initial(experiment.seed, _initial(experiment)))
    expected = _checked_manifest(experiment, earlier.manifest) if earlier else None
    _refuse_other_config(folder, experiment, progress.meta_step)
    tracker = _start_tracker(
        experiment, folder, run_id, parent, earlier.manifest.get("mlflow_run_id") if earlier else None
    )
    status, result = "FAILED", None
    try:
        run_page.record(folder, None)
        planner = obey(earlier.manifest.get("engine", {})) if earlier else planner_for(experiment)
        board = Board(display)
        inexact = list(earlier.manifest.get("inexact", ())) if earlier else []

        def mark(other: str) -> None:
            if other not in inexact:
                inexact.append(other)
                board.note(f"the run is inexact from now on: {other}")
                tracker.tags({"metadist.inexact": "; ".join(inexact)})

        steering = steering_of(experiment, folder, run_id, earlier, board, tracker, stop)
        with (
            served(steering, board, experiment.control, folder, run_id),
            fleet(
                experiment, run_id, planner, expected=expected, wrap=wrap, folder=folder, note=board.note, mark=mark
            ) as workers,
        ):
            # The list itself: what joins later stands in the checkpoints from then on.
            run = _run(experiment, run_id, {**_facts(experiment, workers), "inexact": inexact})
            if progress.meta_step:
                board.note(f"resumed at meta-step {progress.meta_step}")
            watched = exporting(tracker, experiment.workers, run_id)
            outcome = meta_train(run, progress, workers, watched, checkpoints, board, steering)
            evaluations = []
            if test and outcome.stopped != "interrupted":
                evaluations = [_test(experiment, run_id, workers, outcome)]
                watched.metrics(
                    progress.meta_step, {**evaluation_metrics(evaluations[0]), **run.beside(evaluations[0])}
                )
            retried, workers.ended = dict(workers.retried), outcome.stopped or ""
        learner.prepare(torch.device("cpu"))  # an executor in this process may have moved it to a GPU
        ended = "KILLED" if outcome.stopped == "interrupted" else "FINISHED"
        result = Result(
            run_id,
            folder.url,
            experiment,
            outcome,
            evaluations,
            progress.state.sha256(),
            retried,
            time.perf_counter() - began,
            inexact=inexact,
        )
        _record(folder, result, tracker, finished=ended == "FINISHED", plots=plots)
        status = ended
    except KeyboardInterrupt:
        status = "KILLED"
        raise
    finally:
        left = tracker.finish(status, timeout=60.0 if status == "FINISHED" else 10.0)
        run_page.record(folder, tracker.url())
    result.undelivered, result.tracking_url = left, tracker.url()
    return result


def _run(experiment: Experiment, run_id: str, manifest: dict[str, Any]) -> Run:
    e = experiment
    return Run(
        run_id,
        e.seed,
        e.learner,
        e.evaluate.every,
        e.evaluate.tasks,
        e.evaluate.inner_steps,
        e.evaluate.patience,
        e.checkpoint.every,
        e.tracking.log_every,
        manifest,
        Regret(e.learner, e.seed),
    )


def _open(folder: RunFolder, experiment: Experiment, run_id: str, resume: bool) -> str:
    """Claim the folder for a new run, or find out whose it is; returns the run id."""
    about = folder.read_json("run.json")
    if about is not None:
        if not resume:
            raise ConfigError(
                f"run_dir '{folder.url}' holds a run already; go on with it by --resume, or choose another --run-dir"
            )
        return about["run_id"]
    if folder.read("group.json") is not None:
        raise ConfigError(
            f"run_dir '{folder.url}' holds a group of seeds; go on with it by --seeds, or choose another --run-dir"
        )
    if resume:
        log.warning("run_dir %s holds no run yet; a new one starts", folder.url)
    folder.write("config.yaml", yaml.safe_dump(experiment.document, sort_keys=False, allow_unicode=True))
    folder.write("run.json", json.dumps({"run_id": run_id, "name": experiment.name, "created": time.time()}))
    return run_id


def _facts(experiment: Experiment, workers: Scheduler) -> dict[str, Any]:
    first = next(iter(workers.executor.workers().values()))
    return {
        "config": experiment.document,
        "fingerprint": first["fingerprint"],
        "engine": dataclasses.asdict(workers.executor.plan.engine),
        "data_sha256": getattr(experiment.learner.tasks, "data_sha256", None),
        "versions": {"metadist": metadist.__version__, "torch": torch.__version__, "python": platform.python_version()},
    }


def _start_tracker(
    experiment: Experiment, folder: RunFolder, run_id: str, parent: str | None, mlflow_run_id: str | None
) -> Any:
    from metadist import tracking

    settings = experiment.tracking
    tracker = tracking.make_tracker(
        settings.uri, spool=folder.scratch / "tracking", experiment=settings.experiment, runs_root=tracking_root(folder)
    )
    tags = {
        "metadist.run_id": run_id,
        "metadist.run_dir": folder.url,
        "metadist.version": metadist.__version__,
        "git.revision": _git_revision(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "host": platform.node(),
        "platform": platform.platform(),
        **run_page.tags(),
    }
    tracker.start(
        run_id=run_id,
        name=folder.url.rsplit("/", 1)[-1],
        params=flatten(experiment.document),
        tags={k: v for k, v in tags.items() if v},
        parent=parent,
        mlflow_run_id=mlflow_run_id,
    )
    if folder.local and (Path(folder.url) / "config.yaml").is_file():
        tracker.artifact(Path(folder.url) / "config.yaml")
    return tracker


def _git_revision() -> str:
    """Of the working directory, else of metadist's own checkout, else nothing."""
    for folder in (Path.cwd(), Path(__file__).parent):
        try:
            command = ["git", "-C", str(folder), "describe", "--always", "--dirty", "--abbrev=40"]
            return subprocess.run(command, capture_output=True, text=True, timeout=5, check=True).stdout.strip()
        except (OSError, subprocess.SubprocessError):
            continue
    return ""


def _test(experiment: Experiment, run_id: str, workers: Scheduler, outcome: Outcome) -> Evaluation:
    settings = experiment.evaluate
    return evaluate(
        workers,
        experiment.learner,
        outcome.best,
        run=run_id,
        meta_step=outcome.best_step,
        seed=experiment.seed,
        split="test",
        tasks=settings.test_tasks,
        inner_steps=settings.inner_steps,
    )


def _record(folder: RunFolder, result: Result, tracker: Any, *, finished: bool, plots: bool) -> None:
    """The model and the scores, and of a finished run the registered model and the plots, in the run's folder and as MLflow artifacts."""
    result.export(f"{folder.url}/model.safetensors")
    folder.write("result.json", json.dumps(result.as_dict(), indent=1))
    if folder.local:
        tracker.artifact(Path(folder.url) / "model.safetensors")
    if result.evaluations:
        folder.write("evaluation.json", json.dumps([e.as_dict() for e in result.evaluations], indent=1))
    if finished and result.experiment.tracking.register:
        from metadist.experiment.registration import log_models

        log_models(tracker, folder, result, result.experiment.tracking.register)
    if not (finished and plots):
        return
    from metadist.experiment.reports import draw

    for path in draw(result, folder.scratch / "plots"):
        tracker.artifact(path, "plots")
        folder.upload(path, f"plots/{path.name}")


# Afterwards -----------------------------------------------------------------------------------------------------------
