"""The interface of a tracker, and the tracker that records nothing."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

STATUSES = ("FINISHED", "FAILED", "KILLED")


class Tracker(Protocol):
    """Records a run. Between ``start`` and ``finish`` no call waits for a server or raises because of one."""

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
        """Begins or resumes ``run_id``; ``parent`` is the ``run_id`` of the group it belongs to."""

    def metrics(self, step: int, values: Mapping[str, float]) -> None:
        """Records points; of several with the same (key, step), also across resumes, the first counts."""

    def tags(self, values: Mapping[str, str]) -> None:
        """Sets tags of the run."""

    def artifact(self, path: str | Path, folder: str = "") -> None:
        """Records a copy of the file as it is now, under ``folder``."""

    def model(self, name: str, files: Sequence[Path], about: Mapping[str, Any]) -> None:
        """Records a model as it is now; see ``registry.log_and_register`` for ``about``."""

    def flush(self) -> None:
        """Makes everything so far survive a power cut. Call it before a checkpoint counts as written."""

    def finish(self, status: str, timeout: float) -> int:
        """Ends the run (FINISHED, FAILED, KILLED); returns how many records weren't delivered within ``timeout`` seconds."""
        ...

    @property
    def mlflow_run_id(self) -> str | None:
        """The MLflow run, once the server has told."""
        ...

    def url(self) -> str | None:
        """The run's page, if a server has one."""


class NullTracker:
    """Records nothing."""

    mlflow_run_id: str | None = None

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
        """Does nothing."""

    def metrics(self, step: int, values: Mapping[str, float]) -> None:
        """Does nothing."""

    def tags(self, values: Mapping[str, str]) -> None:
        """Does nothing."""

    def artifact(self, path: str | Path, folder: str = "") -> None:
        """Does nothing."""

    def model(self, name: str, files: Sequence[Path], about: Mapping[str, Any]) -> None:
        """Does nothing."""

    def flush(self) -> None:
        """Does nothing."""

    def finish(self, status: str, timeout: float) -> int:
        """Nothing is undelivered."""
        return 0

    def url(self) -> str | None:
        """There is no page."""
        return None
