"""The outer loop."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

from metadist.core.errors import CheckpointError, WorkerError
from metadist.core.learner import Learner
from metadist.core.state import State
from metadist.core.trial_learner import EPISODES_SHOWN, TrialLearner
from metadist.runtime.checkpoint import Checkpoints, Loaded
from metadist.runtime.evaluation import Evaluation, TrialEvaluation, as_json, evaluate
from metadist.runtime.scheduler import Scheduler


class Tracker(Protocol):
    """What the loop needs of experiment tracking: calls that return at once."""

    def metrics(self, step: int, values: Mapping[str, float]) -> None: ...

    def flush(self) -> None: ...

    @property
    def mlflow_run_id(self) -> str | None: ...


class Display(Protocol):
    """What a person sees while it runs."""

    def step(self, meta_step: int, report: Mapping[str, float], tasks_per_second: float) -> None: ...

    def evaluated(self, meta_step: int, evaluation: Evaluation) -> None: ...

    def note(self, message: str) -> None: ...


class Steering(Protocol):
    """What the loop needs of whoever steers it."""

    def boundary(self, meta_step: int, fleet: Scheduler, save: Callable[[], bool]) -> tuple[Learner | TrialLearner, str | None]:
        """Between meta-steps: the learner for the next one, and why to stop, if at all. Returns when the run may go on."""
        ...

    def history(self, before: int) -> Sequence[Mapping[str, Any]]:
        """The commands that the parameters after ``before`` meta-steps were trained under."""
        ...

    def saved(self, meta_step: int) -> None: ...

    def over(self) -> None:
        """No boundary is to come."""
        ...


@dataclass(frozen=True)
class Run:
    """The facts of one run. ``manifest`` goes into every checkpoint (config, fingerprint, versions)."""

    id: str
    seed: int
    learner: Learner | TrialLearner
    evaluate_every: int = 500
    evaluate_tasks: int = 600
    inner_steps: int | None = None
    patience: int | None = None
    checkpoint_every: int = 500
    log_every: int = 10
    manifest: dict[str, Any] = field(default_factory=dict)
    #: what else is to be recorded of an evaluation
    beside: Callable[[Evaluation], Mapping[str, float]] = lambda judged: {}

    @property
    def meta_steps(self) -> int:
        return self.learner.outer.meta_steps


@dataclass
class Progress:
    """Where a run stands: what a checkpoint holds."""

    meta_step: int
    state: State
    #: one entry per validation: meta_step, mean, ci95, median, loss
    validation: list[dict[str, float]] = field(default_factory=list)
    #: one entry per logged meta-step, for the learning curve: meta_step, loss and metric
    curve: list[dict[str, float]] = field(default_factory=list)

    @classmethod
    def of(cls, loaded: Loaded) -> Progress:
        """Where the run stood at a checkpoint, whose JSON has null for what was not finite."""
        validation, curve = (
            [{k: math.nan if v is None else v for k, v in entry.items()} for entry in loaded.manifest[name]]
            for name in ("validation", "curve")
        )
        return cls(loaded.meta_step, loaded.state, validation, curve)

    def best(self, higher_is_better: bool) -> dict[str, float] | None:
        choose = max if higher_is_better else min
        return choose((v for v in self.validation if math.isfinite(v["mean"])), key=lambda v: v["mean"], default=None)

    def stale(self, higher_is_better: bool) -> int:
        """Validations since the best one."""
        best = self.best(higher_is_better)
        return sum(best is None or v["meta_step"] > best["meta_step"] for v in self.validation)


@dataclass
class Outcome:
    """What became of a run. ``stopped`` says why it ended early, if it did."""

    progress: Progress
    best: State
    best_step: int
    tasks_per_second: float
    stopped: str | None = None


def meta_train(
    run: Run, progress: Progress, fleet: Scheduler, tracker: Tracker, checkpoints: Checkpoints, display: Display, steering: Steering
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
    run: Run, progress: Progress, fleet: Scheduler, tracker: Tracker, checkpoints: Checkpoints, display: Display, steering: Steering,
    save: Callable[[], bool],
) -> Outcome:  # fmt: skip
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
        fleet, run.learner, progress.state, run=run.id, meta_step=step, seed=run.seed, split="validation",
        tasks=run.evaluate_tasks, inner_steps=run.inner_steps,
    )  # fmt: skip
    entry = {"meta_step": step, "mean": judged.score, "ci95": judged.score_ci95, "median": judged.score_median, "loss": judged.loss[-1]}
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
        return values | {prefix: judged.score, f"{prefix}/ci95": judged.score_ci95, f"{prefix}/median": judged.score_median}
    values = {f"{prefix}/step_{k}": judged.mean[k] for k in range(last + 1) if k in (0, 1, 2, 3, 5, 10, 20, 50) or k == last}
    values |= {prefix: judged.mean[last], f"{prefix}/ci95": judged.ci95[last], f"{prefix}/median": judged.median[last]}
    return values | {f"eval/{judged.split}/loss": judged.loss[last], f"eval/{judged.split}/divergence_rate": judged.divergence_rate}


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
    done = checkpoints.save(progress.meta_step, progress.state, manifest, slots=run.learner.slots, score=here[0] if here else None)
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


class _Meter:
    """Tasks per second, and what the scheduler measured since the last reading."""

    def __init__(self, fleet: Scheduler) -> None:
        self._fleet = fleet
        self._seconds = self._tasks = 0.0
        self._window_seconds = self._window_tasks = self._steps = 0.0
        #: since the last reading
        self.environment_steps = 0.0
        self.rate = 0.0

    def __enter__(self) -> None:
        self._began, self._before = time.perf_counter(), self._fleet.tasks_done

    def __exit__(self, *_: Any) -> None:
        seconds, tasks = time.perf_counter() - self._began, self._fleet.tasks_done - self._before
        self._seconds, self._tasks = self._seconds + seconds, self._tasks + tasks
        self._window_seconds, self._window_tasks = self._window_seconds + seconds, self._window_tasks + tasks
        self._steps += 1
        now = tasks / seconds
        self.rate = now if not self.rate else 0.95 * self.rate + 0.05 * now

    @property
    def average(self) -> float:
        return self._tasks / self._seconds if self._seconds else 0.0

    def read(self, fleet: Scheduler) -> dict[str, float]:
        taken, steps = fleet.measured.read(), self._steps or 1.0
        values = {
            "engine/tasks_per_second": self._window_tasks / self._window_seconds if self._window_seconds else 0.0,
            "engine/workers": float(len(fleet.executor.workers())),
            "engine/shards_retried": float(sum(fleet.retried.values())),
            "engine/results_too_late": float(taken.counts["duplicates"]),
        }
        for name in ("bytes_published", "bytes_received"):
            values[f"engine/{name}_per_step"] = taken.counts[name] / steps
        for name in ("publish", "gather", "compute", "reduce", *sorted(n for n in taken.seconds if n.startswith("compute/"))):
            values[f"engine/seconds_per_step/{name}"] = taken.seconds[name] / steps
        if self.environment_steps:
            values |= self._rates(taken.seconds)
        for worker, stats in sorted(taken.workers.items()):
            values |= {
                f"sys/{worker}/{k}": stats[k] for k in ("cpu_percent", "memory_bytes", "gpu_percent", "gpu_memory_bytes") if k in stats
            }
        self._window_seconds = self._window_tasks = self._steps = self.environment_steps = 0.0
        return values

    def _rates(self, seconds: Mapping[str, float]) -> dict[str, float]:
        """Environment steps per second of the run, and per second that workers spent on each part of them."""
        learning = sum(
            s for n, s in seconds.items() if n.startswith("compute/") and not n.startswith(("compute/rollout", "compute/evaluate"))
        )
        parts = {
            "": self._window_seconds, "/environment": seconds.get("compute/rollout/environment", 0.0),
            "/inference": seconds.get("compute/rollout/inference", 0.0), "/learning": learning,
        }  # fmt: skip
        return {f"engine/steps_per_second{n}": self.environment_steps / s for n, s in parts.items() if s}
