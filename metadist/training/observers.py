"""The interfaces of trackers, displays and steering."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol

from metadist.learners.few_shot import Learner
from metadist.learners.trials import TrialLearner
from metadist.training.evaluation import Evaluation
from metadist.training.scheduler import Scheduler


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

    def boundary(
        self, meta_step: int, fleet: Scheduler, save: Callable[[], bool]
    ) -> tuple[Learner | TrialLearner, str | None]:
        """Between meta-steps: the learner for the next one, and why to stop, if at all. Returns when the run may go on."""
        ...

    def history(self, before: int) -> Sequence[Mapping[str, Any]]:
        """The commands that the parameters after ``before`` meta-steps were trained under."""
        ...

    def saved(self, meta_step: int) -> None: ...

    def over(self) -> None:
        """No boundary is to come."""
        ...
