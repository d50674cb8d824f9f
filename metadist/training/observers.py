"""The interfaces of everything that follows or steers a run. Every method of an observer does nothing by default."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:  # a tracker, `metadist ui` for example, does without torch
    from metadist.core.round import Report
    from metadist.learners.base import Learner
    from metadist.learners.evaluation import Evaluation
    from metadist.training.scheduler import Scheduler


class Observer:
    """Follows a run: trackers, displays, metric exporters. No call waits for a server or raises because of one."""

    def step(self, meta_step: int, report: Report, tasks_per_second: float) -> None:
        """Take note of a finished meta-step."""

    def metrics(self, step: int, values: Mapping[str, float]) -> None:
        """Record points at meta-step ``step``."""

    def evaluated(self, meta_step: int, evaluation: Evaluation) -> None:
        """Take note of a validation."""

    def testing(self, tasks: int) -> None:
        """Take note that the loop has ended and that the final test, on ``tasks`` tasks, begins."""

    def note(self, message: str) -> None:
        """Show a message to the user."""

    def flush(self) -> None:
        """Write everything so far to disk. The loop calls it before a checkpoint counts as written."""

    def facts(self) -> dict[str, object]:
        """Return the facts that a checkpoint stores for this observer."""
        return {}


class Observers(Observer):
    """Forwards every call to several observers, in their order."""

    def __init__(self, *observers: Observer) -> None:
        self._observers = observers

    def step(self, meta_step: int, report: Report, tasks_per_second: float) -> None:
        for observer in self._observers:
            observer.step(meta_step, report, tasks_per_second)

    def metrics(self, step: int, values: Mapping[str, float]) -> None:
        for observer in self._observers:
            observer.metrics(step, values)

    def evaluated(self, meta_step: int, evaluation: Evaluation) -> None:
        for observer in self._observers:
            observer.evaluated(meta_step, evaluation)

    def testing(self, tasks: int) -> None:
        for observer in self._observers:
            observer.testing(tasks)

    def note(self, message: str) -> None:
        for observer in self._observers:
            observer.note(message)

    def flush(self) -> None:
        for observer in self._observers:
            observer.flush()

    def facts(self) -> dict[str, object]:
        return {name: value for observer in self._observers for name, value in observer.facts().items()}


class Commands(Protocol):
    """The commands to a live run, obeyed between two meta-steps."""

    def boundary(self, meta_step: int, workers: Scheduler, save: Callable[[], bool]) -> tuple[Learner, str | None]:
        """Return the learner of the next meta-step, and the reason to stop or None. Blocks while the run is paused."""
        ...

    def history(self, before: int) -> Sequence[Mapping[str, object]]:
        """Return the commands that entered the parameters after ``before`` meta-steps."""
        ...

    def saved(self, meta_step: int) -> None:
        """Take note of a checkpoint."""

    def over(self) -> None:
        """Refuse every later command: the loop has ended."""
