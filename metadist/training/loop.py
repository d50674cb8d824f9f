"""The outer loop."""

from __future__ import annotations

from functools import partial

from metadist.core.round import run_rounds
from metadist.storage.checkpoints import Checkpoints
from metadist.training.carried_states import CarriedStates
from metadist.training.checkpointing import RunCheckpoints
from metadist.training.evaluation import evaluate
from metadist.training.meter import Meter
from metadist.training.observers import Commands, Observer
from metadist.training.progress import Outcome, Progress, Run
from metadist.training.scheduler import Scheduler


def meta_train(
    run: Run, progress: Progress, workers: Scheduler, observers: Observer, checkpoints: Checkpoints, commands: Commands
) -> Outcome:
    """θ ← outer(θ, Σ contributions / Σ weights), ``run.meta_steps`` times, with validation and checkpoints when due."""
    states, meter, stopped = CarriedStates(run, checkpoints, workers), Meter(workers), None
    saver, saved = RunCheckpoints(run, checkpoints, observers, commands, states), progress.meta_step
    try:
        states.restore(progress)
        while progress.meta_step < run.meta_steps:
            if stopped := run.out_of_patience(progress):
                break
            learner, stopped = commands.boundary(progress.meta_step, workers, partial(saver.save, progress))
            if stopped:
                break
            with meter:
                # A generator of rounds that is sent the sum of each.
                state, report = run_rounds(learner.meta_step(run.key(progress), progress.state), workers.sum)
            progress = progress.advance(state)
            meter.environment_steps += report.get("steps", 0.0)
            observers.step(progress.meta_step, report, meter.rate)
            if run.logs(progress):
                progress = progress.logged(report)
                observers.metrics(progress.meta_step, {**{f"meta/{k}": v for k, v in report.items()}, **meter.read()})
            if run.validates(progress):
                judged = evaluate(workers, run.learner, progress.state, run.validation(progress))
                progress = progress.validated(judged)
                found = {**judged.metrics(), **run.best_so_far(progress, judged), **run.extra_scores(judged)}
                observers.metrics(progress.meta_step, found)
                observers.evaluated(progress.meta_step, judged)
            if run.saves(progress):
                saver.save(progress)
                saved = progress.meta_step
            elif states.due(progress):
                saver.save_states(progress)
        if saved != progress.meta_step:
            saver.save(progress)
        best_step, best = saver.best(progress)
        return Outcome(progress, best, best_step, meter.average, stopped)
    except Exception:  # of a worker, or of a user's callback: the run ends, but keeps everything that it has learned
        if progress.meta_step > saved:
            saver.save(progress)
        raise
    finally:
        commands.over()
