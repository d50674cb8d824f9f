"""The state of a run between two meta-steps."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from metadist.core.state import State
from metadist.learners.few_shot import Learner
from metadist.learners.trials import TrialLearner
from metadist.storage.checkpoints import Loaded
from metadist.training.evaluation import Evaluation


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
