"""Compute meta-steps of an experiment on a fleet, for the benchmarks of tracking, transport and scheduling."""

from __future__ import annotations

from typing import Any

from metadist.config.build import build
from metadist.config.document import set_workers
from metadist.config.experiment import Experiment
from metadist.config.schema import Document
from metadist.core.round import MetaStepKey, run_rounds
from metadist.core.state import State
from metadist.learners.few_shot import FewShotLearner
from metadist.training.scheduler import Scheduler


class MetaSteps:
    """Compute one more meta-step at every call."""

    def __init__(self, learner: FewShotLearner, seed: int, scheduler: Scheduler, tracker: Any = None) -> None:
        self._learner, self._seed, self._scheduler, self._tracker = learner, seed, scheduler, tracker
        self.state: State = learner.initial(seed)
        self.meta_step = 0

    def __call__(self) -> None:
        rounds = self._learner.meta_step(MetaStepKey("bench", self.meta_step, self._seed), self.state)
        self.state, report = run_rounds(rounds, self._scheduler.sum)
        self.meta_step += 1
        if self._tracker is not None:
            self._tracker.metrics(self.meta_step, {f"meta/{k}": v for k, v in report.items()})


def experiment_with(document: Document, workers: str) -> Experiment:
    """Build the experiment of ``document`` with another number of workers."""
    return build(set_workers(document, workers))


def settings_of(document: Document, steps: int) -> dict[str, Any]:
    """Return the settings of a report."""
    return {"config": document.get("name"), "meta_steps": steps}
