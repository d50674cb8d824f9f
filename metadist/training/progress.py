"""A run, and its state between two meta-steps."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace

from metadist.config.settings import CheckpointSettings, EvaluateSettings
from metadist.core.round import EvaluationRequest, MetaStepKey, Report
from metadist.core.state import State
from metadist.learners.base import Learner
from metadist.learners.evaluation import Evaluation
from metadist.storage.checkpoints import Loaded

#: points of the learning curve that a checkpoint holds at most
MOST_POINTS = 2000


@dataclass(frozen=True)
class Run:
    """The facts of one run that do not change while it trains.

    ``manifest`` is stored in every checkpoint (config, fingerprint, versions). ``extra_scores`` gives further metrics
    of an evaluation.
    """

    id: str
    seed: int
    learner: Learner
    evaluate: EvaluateSettings = EvaluateSettings()
    checkpoint: CheckpointSettings = CheckpointSettings()
    log_every: int = 10
    manifest: dict[str, object] = field(default_factory=dict)
    extra_scores: Callable[[Evaluation], Mapping[str, float]] = lambda judged: {}

    @property
    def meta_steps(self) -> int:
        """The number of meta-steps of the whole run."""
        return self.learner.outer.meta_steps

    @property
    def higher_is_better(self) -> bool:
        """Whether larger validation scores are better."""
        return self.learner.tasks.higher_is_better

    def key(self, progress: Progress) -> MetaStepKey:
        """Name the next meta-step."""
        return MetaStepKey(self.id, progress.meta_step, self.seed)

    def validation(self, progress: Progress) -> EvaluationRequest:
        """Return the request that judges the current state on validation tasks."""
        key = self._judging_key(progress.meta_step)
        return EvaluationRequest(key, "validation", self.evaluate.tasks, self.evaluate.inner_steps)

    def test(self, meta_step: int) -> EvaluationRequest:
        """Return the request that judges the state after ``meta_step`` meta-steps on test tasks."""
        key = self._judging_key(meta_step)
        return EvaluationRequest(key, "test", self.evaluate.test_tasks, self.evaluate.inner_steps)

    def _judging_key(self, meta_step: int) -> MetaStepKey:
        seed = self.evaluate.seed
        return MetaStepKey(self.id, meta_step, self.seed if seed is None else seed)

    def best_so_far(self, progress: Progress, judged: Evaluation) -> dict[str, float]:
        """Return the best validation score so far as a metric; nothing where none is finite."""
        best = progress.best(self.higher_is_better)
        return {} if best is None else {f"eval/{judged.split}/{judged.metric}/best": best["mean"]}

    def out_of_patience(self, progress: Progress) -> str | None:
        """Return the reason to stop early, or None."""
        patience = self.evaluate.patience
        if patience is None or progress.validations_since_best(self.higher_is_better) < patience:
            return None
        return f"no better validation in {patience} evaluations"

    def logs(self, progress: Progress) -> bool:
        """Return whether the report of this meta-step is recorded."""
        return progress.meta_step % self.log_every == 0 or progress.meta_step == self.meta_steps

    def validates(self, progress: Progress) -> bool:
        """Return whether a validation is due."""
        return progress.meta_step % self.evaluate.every == 0 or progress.meta_step == self.meta_steps

    def saves(self, progress: Progress) -> bool:
        """Return whether a checkpoint is due: by its interval, at the end, or because this validation is the best so
        far.
        """
        best = progress.best(self.higher_is_better)
        improved = best is not None and best["meta_step"] == progress.meta_step
        return progress.meta_step % self.checkpoint.every == 0 or progress.meta_step == self.meta_steps or improved


@dataclass(frozen=True)
class Progress:
    """The state of a run between two meta-steps: the content of a checkpoint.

    ``validation`` has an entry per validation: meta_step, mean, ci95, median, loss, tasks and left_out
    (the last two not in checkpoints of version 0.1). ``curve`` has an entry per logged
    meta-step: meta_step and its report.
    """

    meta_step: int
    state: State
    validation: list[dict[str, float]] = field(default_factory=list)
    curve: list[dict[str, float]] = field(default_factory=list)

    @classmethod
    def of(cls, loaded: Loaded) -> Progress:
        """Return the progress that a checkpoint holds. Its JSON has null in place of values that were not finite."""
        validation, curve = (
            [{k: math.nan if v is None else v for k, v in entry.items()} for entry in loaded.manifest[name]]
            for name in ("validation", "curve")
        )
        return cls(loaded.meta_step, loaded.state, validation, curve)

    def advance(self, state: State) -> Progress:
        """Return the progress after one further meta-step."""
        return replace(self, meta_step=self.meta_step + 1, state=state)

    def logged(self, report: Report) -> Progress:
        """Add a point to the learning curve. A long curve keeps every second point, so that manifests stay small."""
        curve = [*self.curve, {"meta_step": self.meta_step, **report}]
        return replace(self, curve=curve if len(curve) <= MOST_POINTS else curve[1::2])

    def validated(self, judged: Evaluation) -> Progress:
        """Add a validation of the current state."""
        entry = {
            "meta_step": self.meta_step,
            "mean": judged.score,
            "ci95": judged.score_ci95,
            "median": judged.score_median,
            "loss": judged.loss[-1],
            "tasks": judged.drawn,
            "left_out": judged.left_out,
        }
        return replace(self, validation=[*self.validation, entry])

    def score(self) -> float | None:
        """Return the validation score of the current state, or None where it was not validated."""
        return next((v["mean"] for v in self.validation if v["meta_step"] == self.meta_step), None)

    def best(self, higher_is_better: bool) -> dict[str, float] | None:
        """Return the best validation, the earliest of equal ones; None where none is finite."""
        choose = max if higher_is_better else min
        return choose((v for v in self.validation if math.isfinite(v["mean"])), key=lambda v: v["mean"], default=None)

    def validations_since_best(self, higher_is_better: bool) -> int:
        """Return the number of validations after the best one."""
        best = self.best(higher_is_better)
        return sum(best is None or v["meta_step"] > best["meta_step"] for v in self.validation)


@dataclass(frozen=True)
class Outcome:
    """The end of a run. ``stopped`` is the reason why it ended early, or None."""

    progress: Progress
    best: State
    best_step: int
    tasks_per_second: float
    stopped: str | None = None
