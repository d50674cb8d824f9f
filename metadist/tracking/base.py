"""The interface of a tracker, and the tracker that records nothing."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from metadist.training.observers import Observer

STATUSES = ("FINISHED", "FAILED", "KILLED")


class Tracker(Observer):
    """Record a run. The methods of this class do nothing: a subclass overrides only the methods that it needs.

    One process calls ``start`` once, then the other methods from one thread, then ``finish`` once. Training waits for
    every call: between ``start`` and ``finish`` no method may wait for a server or raise because of one.
    """

    def start(
        self,
        *,
        run_id: str,
        name: str,
        params: Mapping[str, object],
        tags: Mapping[str, str],
        parent: str | None = None,
        mlflow_run_id: str | None = None,
    ) -> None:
        """Begin or resume ``run_id``. ``parent`` is the ``run_id`` of the group of seeds that the run belongs to."""

    def metrics(self, step: int, values: Mapping[str, float]) -> None:
        """Record points. A resumed run repeats steps: of several points with one (key, step), keep the first."""

    def tags(self, values: Mapping[str, str]) -> None:
        """Set tags of the run."""

    def dataset(self, name: str, digest: str, source: str, about: Mapping[str, str]) -> None:
        """Record the data that the run reads: its hash, its address, and facts about it."""

    def artifact(self, path: str | Path, folder: str = "") -> None:
        """Record a copy of the file's present content under ``folder``."""

    def model(self, name: str, files: Sequence[Path], about: Mapping[str, Any]) -> None:
        """Record copies of a model's files; ``model_registry.log_and_register`` documents ``about``."""

    def flush(self) -> None:
        """Make all records survive a power cut. Called before a checkpoint counts as written."""

    def finish(self, status: str, timeout: float) -> int:
        """End the run with a status of ``STATUSES``; return the undelivered records after ``timeout`` seconds."""
        return 0

    @property
    def mlflow_run_id(self) -> str | None:
        """The id of the MLflow run, or None where MLflow has no run yet."""
        return None

    def facts(self) -> dict[str, object]:
        """Return the facts about the records that every checkpoint stores."""
        return {"mlflow_run_id": self.mlflow_run_id}

    def url(self) -> str | None:
        """Return the address of the run's page, or None where no server shows the run."""
        return None


class NullTracker(Tracker):
    """Record nothing."""
