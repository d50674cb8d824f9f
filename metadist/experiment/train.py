"""Train an experiment and record its result."""

from __future__ import annotations

import time

import torch

from metadist.config.experiment import Experiment
from metadist.control.feed import Feed
from metadist.core.signature import Signature
from metadist.core.state import Records
from metadist.experiment.attempt import Attempt
from metadist.experiment.fleet import WorkerReports, start_workers
from metadist.experiment.lifecycle import check_control, serve_control, steering_of
from metadist.experiment.oracle_comparison import Regret
from metadist.experiment.other_process import compared_elsewhere
from metadist.experiment.recording import inexact_marker, recorded, write_result
from metadist.experiment.request import RunRequest
from metadist.experiment.result import Result
from metadist.experiment.resume import claimed, resume_or_start
from metadist.learners.evaluation import Evaluation
from metadist.storage.places import provide_home
from metadist.tracking import check_uri
from metadist.tracking.prometheus import exporters
from metadist.training.evaluation import judge
from metadist.training.loop import meta_train
from metadist.training.observers import Observer, Observers
from metadist.training.progress import Outcome, Run
from metadist.training.scheduler import Scheduler


def train(experiment: Experiment, request: RunRequest = RunRequest(), display: Observer | None = None) -> Result:
    """Meta-train, test once, and record everything in the run directory. Raises ConfigError for a user's mistake."""
    began, learner = time.perf_counter(), experiment.learner
    signature = _tried(experiment)  # before the directory is claimed: a user's mistake leaves nothing behind
    with claimed(experiment, request) as (directory, run_id):  # lock, run id, config.yaml
        attempt = resume_or_start(experiment, directory, run_id, request.trust)  # refuses another config, seed, data
        attempt.signature = signature
        with recorded(attempt, request.parent) as recording:
            feed, tracker = Feed(display or Observer()), recording.tracker
            observers = Observers(feed, tracker, *exporters(experiment.workers, run_id))
            steering = steering_of(attempt, feed, tracker, request.stop)
            mark = inexact_marker(attempt, observers, tracker)
            for module in attempt.edited:
                mark(f"module {module} was edited before meta-step {attempt.progress.meta_step}")
            with (
                serve_control(steering, feed, attempt),
                start_workers(
                    experiment,
                    run_id,
                    attempt.planner,
                    expected=attempt.fingerprint,
                    wrap=request.wrap,
                    reports=WorkerReports(observers.note, mark, directory),
                ) as workers,
            ):
                run = _run(attempt, workers)
                _announce(attempt, observers)
                outcome = meta_train(run, attempt.progress, workers, observers, attempt.checkpoints, steering)
                scores, records = _test(run, outcome, workers, observers) if request.test else ([], None)
                workers.ended = outcome.stopped or ""
            learner.prepare(torch.device("cpu"))  # an executor in this process may have moved the model to a GPU
            result = _result(attempt, outcome, scores, workers, time.perf_counter() - began)
            result.task_records = records
            write_result(directory, result, tracker, plots=request.plots)
            recording.status = "KILLED" if result.interrupted else "FINISHED"
    result.undelivered, result.tracking_url = recording.undelivered, recording.url
    result.wall_seconds = time.perf_counter() - began
    return result


def _tried(experiment: Experiment) -> Signature | None:
    """Try settings, data and a task of each split; return the signature of inputs and targets."""
    provide_home()
    check_control(experiment.control)
    check_uri(experiment.tracking.uri)
    learner = experiment.learner
    learner.prepare(torch.device("cpu"))
    with compared_elsewhere(experiment):
        learner.dry_run(experiment.seed)
    return learner.describe(experiment.seed)


def _announce(attempt: Attempt, observers: Observer) -> None:
    """Tell what a user may not expect, and where a resumed run continues."""
    for remark in attempt.experiment.learner.remarks():
        observers.note(remark)
    if attempt.progress.meta_step:
        observers.note(f"resumed at meta-step {attempt.progress.meta_step}")


def _run(attempt: Attempt, workers: Scheduler) -> Run:
    experiment = attempt.experiment
    return Run(
        attempt.run_id,
        experiment.seed,
        experiment.learner,
        experiment.evaluate,
        experiment.checkpoint,
        experiment.tracking.log_every,
        attempt.facts(workers),
        Regret(experiment.tasks.made, experiment.evaluation_seed),
    )


def _test(
    run: Run, outcome: Outcome, workers: Scheduler, observers: Observer
) -> tuple[list[Evaluation], Records | None]:
    """Judge the best state on the test tasks, unless the run was interrupted."""
    if outcome.stopped == "interrupted":
        return [], None
    request = run.test(outcome.best_step)
    observers.testing(request.tasks)
    judged, records = judge(workers, run.learner, outcome.best, request)
    observers.metrics(outcome.progress.meta_step, {**judged.metrics(), **run.extra_scores(judged)})
    return [judged], records


def _result(
    attempt: Attempt, outcome: Outcome, scores: list[Evaluation], workers: Scheduler, wall_seconds: float
) -> Result:
    return Result(
        attempt.run_id,
        attempt.directory.url,
        attempt.experiment,
        outcome,
        scores,
        outcome.progress.state.sha256(),
        dict(workers.retried),
        wall_seconds,
        inexact=attempt.inexact,
        recorded=attempt.signature,
    )
