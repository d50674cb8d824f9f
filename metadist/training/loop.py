"""The outer loop."""

from __future__ import annotations

from collections.abc import Callable

from metadist.core.errors import CheckpointError, WorkerError
from metadist.core.state import State
from metadist.learners.trials import EPISODES_SHOWN
from metadist.storage.checkpoints import Checkpoints
from metadist.training.evaluation import Evaluation, TrialEvaluation, as_json, evaluate
from metadist.training.meter import _Meter
from metadist.training.observers import Display, Steering, Tracker
from metadist.training.progress import Outcome, Progress, Run
from metadist.training.scheduler import Scheduler


def meta_train(
    run: Run,
    progress: Progress,
    fleet: Scheduler,
    tracker: Tracker,
    checkpoints: Checkpoints,
    display: Display,
    steering: Steering,
) -> Outcome:
    """θ ← outer(θ, Σ contributions / Σ weights), ``meta_steps`` times, with validation and checkpoints when due."""
    began = progress.meta_step

    def save() -> bool:
        return _save(run, progress, tracker, checkpoints, steering)

    try:
        return _loop(run, progress, fleet, tracker, checkpoints, display, steering, save)
    except WorkerError:  # the run ends, but nothing that it learned is lost
        if progress.meta_step > began:
            save()
        raise
    finally:
        steering.over()


def _loop(
    run: Run,
    progress: Progress,
    fleet: Scheduler,
    tracker: Tracker,
    checkpoints: Checkpoints,
    display: Display,
    steering: Steering,
    save: Callable[[], bool],
) -> Outcome:
    higher = run.learner.tasks.higher_is_better
    meter, saved = _Meter(fleet), progress.meta_step
    stopped = None
    while progress.meta_step < run.meta_steps:
        if run.patience is not None and progress.stale(higher) >= run.patience:
            stopped = f"no better validation in {run.patience} evaluations"
            break
        learner, stopped = steering.boundary(progress.meta_step, fleet, save)
        if stopped:
            break
        report: dict[str, float] = {}
        state = progress.state
        with meter:
            for round in learner.rounds(run.id, progress.meta_step, run.seed, state, report):
                total = fleet.run(round)
                state = round.apply(state, total)
        progress.state, progress.meta_step = state, progress.meta_step + 1
        meter.environment_steps += report.get("steps", 0.0)
        step, last = progress.meta_step, progress.meta_step == run.meta_steps
        display.step(step, report, meter.rate)
        if step % run.log_every == 0 or last:
            progress.curve.append({"meta_step": step, **report})
            progress.curve = _thinned(progress.curve)
            tracker.metrics(step, {**{f"meta/{k}": v for k, v in report.items()}, **meter.read(fleet)})
        improved = False
        if step % run.evaluate_every == 0 or last:
            improved = _validate(run, progress, fleet, tracker, display)
        if step % run.checkpoint_every == 0 or last or improved:
            save()
            saved = step
    if saved != progress.meta_step:
        save()
    best_step, best = _best(run, progress, checkpoints, display)
    return Outcome(progress, best, best_step, meter.average, stopped)


def _validate(run: Run, progress: Progress, fleet: Scheduler, tracker: Tracker, display: Display) -> bool:
    """Judge θ on the validation tasks; True if it is the best so far."""
    step, higher = progress.meta_step, run.learner.tasks.higher_is_better
    judged = evaluate(
        fleet,
        run.learner,
        progress.state,
        run=run.id,
        meta_step=step,
        seed=run.seed,
        split="validation",
        tasks=run.evaluate_tasks,
        inner_steps=run.inner_steps,
    )
    entry = {
        "meta_step": step,
        "mean": judged.score,
        "ci95": judged.score_ci95,
        "median": judged.score_median,
        "loss": judged.loss[-1],
    }
    progress.validation.append(entry)
    tracker.metrics(step, {**evaluation_metrics(judged), **run.beside(judged)})
    display.evaluated(step, judged)
    return progress.best(higher) is entry


def evaluation_metrics(judged: Evaluation) -> dict[str, float]:
    """``eval/<split>/…``: the metric after every step, and the last one's interval, median and divergence rate."""
    prefix = f"eval/{judged.split}/{judged.metric}"
    last = len(judged.mean) - 1
    if isinstance(judged, TrialEvaluation):
        name = "step_{}" if judged.by_gradient_steps else "episode_{}"
        values = {
            f"{prefix}/{name.format(k + (not judged.by_gradient_steps))}": judged.mean[k]
            for k in range(last + 1)
            if k + 1 in EPISODES_SHOWN or k == last
        }
        values |= {f"{prefix}/{policy}": total["mean"] for policy, total in judged.totals.items()}
        return values | {
            prefix: judged.score,
            f"{prefix}/ci95": judged.score_ci95,
            f"{prefix}/median": judged.score_median,
        }
    values = {
        f"{prefix}/step_{k}": judged.mean[k] for k in range(last + 1) if k in (0, 1, 2, 3, 5, 10, 20, 50) or k == last
    }
    values |= {prefix: judged.mean[last], f"{prefix}/ci95": judged.ci95[last], f"{prefix}/median": judged.median[last]}
    return values | {
        f"eval/{judged.split}/loss": judged.loss[last],
        f"eval/{judged.split}/divergence_rate": judged.divergence_rate,
    }


def _save(run: Run, progress: Progress, tracker: Tracker, checkpoints: Checkpoints, steering: Steering) -> bool:
    tracker.flush()  # every point before this meta-step is safe before the checkpoint that makes a resume skip it
    here = [v["mean"] for v in progress.validation if v["meta_step"] == progress.meta_step]
    manifest = {
        **run.manifest,
        "run_id": run.id,
        "seed": run.seed,
        "mlflow_run_id": tracker.mlflow_run_id,
        "validation": as_json(progress.validation),
        "curve": as_json(progress.curve),
        "commands": list(steering.history(progress.meta_step)),
    }
    done = checkpoints.save(
        progress.meta_step, progress.state, manifest, slots=run.learner.slots, score=here[0] if here else None
    )
    if done:
        steering.saved(progress.meta_step)
    return done


def _best(run: Run, progress: Progress, checkpoints: Checkpoints, display: Display) -> tuple[int, State]:
    """The state that validated best; the last one where there is none, or where its checkpoint is gone."""
    best = progress.best(run.learner.tasks.higher_is_better)
    if best is None or best["meta_step"] == progress.meta_step:
        return progress.meta_step, progress.state
    try:
        loaded = checkpoints.best(run.learner.slots)
    except CheckpointError as error:
        display.note(f"the best checkpoint can't be read ({error}); the last parameters are used instead")
        return progress.meta_step, progress.state
    return (loaded.meta_step, loaded.state) if loaded else (progress.meta_step, progress.state)


def _thinned(curve: list[dict[str, float]], most: int = 2000) -> list[dict[str, float]]:
    """Every second point once there are too many, so that a manifest stays small however long the run."""
    return curve if len(curve) <= most else curve[1::2]
