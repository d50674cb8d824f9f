"""The interface of a tracker. Every method does nothing by default, so that a tracker overrides what it records."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from metadist.training.observers import Observer

STATUSES = ("FINISHED", "FAILED", "KILLED")


class Tracker(Observer):
    """Records a run. Between ``start`` and ``finish`` no call waits for a server or raises because of one.

    ``metrics(step, values)`` records points; of several with the same (key, step), also across resumes, the first one counts. ``flush``
    makes everything so far survive a power cut.
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
        """Begin or resume ``run_id``. ``parent`` is the ``run_id`` of the group that it belongs to."""

    def tags(self, values: Mapping[str, str]) -> None:
        """Set tags of the run."""

    def artifact(self, path: str | Path, folder: str = "") -> None:
        """Record a copy of the file as it is now, under ``folder``."""

    def model(self, name: str, files: Sequence[Path], about: Mapping[str, Any]) -> None:
        """Record a model as it is now. ``model_registry.log_and_register`` describes ``about``."""

    def finish(self, status: str, timeout: float) -> int:
        """End the run (FINISHED, FAILED, KILLED) and return the number of records that were not delivered within ``timeout`` s."""
        return 0

    @property
    def mlflow_run_id(self) -> str | None:
        """The id of the MLflow run, once the server has created it."""
        return None

    def url(self) -> str | None:
        """Return the address of the run's page, if a server has one."""
        return None

    def facts(self) -> dict[str, Any]:
        return {"mlflow_run_id": self.mlflow_run_id}


class NullTracker(Tracker):
    """Records nothing."""
