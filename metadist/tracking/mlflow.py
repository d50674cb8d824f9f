"""Write records to a local spool and deliver them to MLflow."""

from __future__ import annotations

import getpass
import logging
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from metadist.core.errors import ConfigError
from metadist.core.text import without_passwords
from metadist.tracking.base import STATUSES, Tracker
from metadist.tracking.delivery import Delivery
from metadist.tracking.spool import Spool, read_json, write_json

logger = logging.getLogger(__name__)


class MLflowTracker(Tracker):
    """Record into a local spool; a background thread delivers the spool to MLflow."""

    def __init__(
        self, spool: str | Path, *, tracking_uri: str, experiment: str, runs_root: str | Path, interval: float = 2.0
    ) -> None:
        self.folder = Path(spool)
        self.tracking_uri = tracking_uri
        self.experiment = experiment
        self.runs_root = Path(runs_root).resolve()
        self.interval = interval
        self._spool: Spool | None = None
        self._delivery: Delivery | None = None

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
        """Begin or resume ``run_id``: the same MLflow run, after the undelivered records of an earlier attempt."""
        if {"'", "`", '"'} & set(run_id + (parent or "")):
            raise ConfigError(
                f"run_id {run_id!r}, parent {parent!r}: quotes are not allowed; expected an id without them"
            )
        spool = Spool(self.folder)
        before = read_json(self.folder / "run.json")
        acked = read_json(self.folder / "acked.json")
        identity = {
            "run_id": run_id,
            "name": name,
            "parent": parent or before.get("parent"),
            "mlflow_run_id": mlflow_run_id or before.get("mlflow_run_id"),
            "experiment": self.experiment,
            "tracking_uri": without_passwords(self.tracking_uri),
            "runs_root": str(self.runs_root),
            "start_ms": before.get("start_ms") or time.time_ns() // 1_000_000,
            "tail_lost": bool(before.get("tail_lost") or spool.damaged or acked.get("offset", 0) > spool.end),
        }
        try:
            write_json(self.folder / "run.json", identity)
        except OSError as error:  # a full disk; on a resume the old file serves
            logger.warning("%s: %s", self.folder / "run.json", error)
        spool.status("RUNNING")
        spool.set_params(params)
        spool.set_tags({"mlflow.user": _user(), **tags})
        self._spool = spool
        self._delivery = Delivery(self.folder, self.tracking_uri, identity=identity, interval=self.interval)
        self._delivery.start()

    def metrics(self, step: int, values: Mapping[str, float]) -> None:
        """Append the points to the spool."""
        self._opened().metrics(step, values)

    def tags(self, values: Mapping[str, str]) -> None:
        """Append the tags to the spool."""
        self._opened().set_tags(values)

    def dataset(self, name: str, digest: str, source: str, about: Mapping[str, str]) -> None:
        """Append the data set to the spool; MLflow shows it as an input of the run."""
        self._opened().dataset(name, digest, source, about)

    def artifact(self, path: str | Path, folder: str = "") -> None:
        """Copy the file into the spool."""
        self._opened().artifact(Path(path), folder)

    def model(self, name: str, files: Sequence[Path], about: Mapping[str, Any]) -> None:
        """Copy the files into the spool; the delivery makes an MLflow model from them."""
        self._opened().model(name, files, about)

    def flush(self) -> None:
        """Sync the spool to disk."""
        self._opened().flush()

    def finish(self, status: str, timeout: float) -> int:
        """Record the end and wait for delivery; ``replay`` can deliver the remaining records later."""
        if status not in STATUSES:
            raise ValueError(f"status {status!r} is not one of {', '.join(STATUSES)}")
        if self._spool is None or self._delivery is None:
            return 0
        spool, delivery = self._spool, self._delivery
        spool.status(status)
        spool.close()
        self._spool = None
        left = delivery.drain(spool.records, timeout) + spool.lost
        if left:
            logger.warning("%d records are not in MLflow yet; they wait in %s", left, self.folder)
        return left

    @property
    def mlflow_run_id(self) -> str | None:
        """The id of the MLflow run, or None where neither this attempt nor an earlier one knows it yet."""
        return (
            self._delivery.mlflow_run_id
            if self._delivery
            else read_json(self.folder / "acked.json").get("mlflow_run_id")
        )

    def url(self) -> str | None:
        """Return the run's page on an MLflow server; None for a local file, which needs ``metadist ui``."""
        delivery = self._delivery
        if delivery is None or delivery.mlflow_run_id is None or not self.tracking_uri.startswith("http"):
            return None
        server = without_passwords(self.tracking_uri).rpartition("@")
        base = self.tracking_uri.split("://")[0] + "://" + server[2] if server[1] else self.tracking_uri
        return f"{base.rstrip('/')}/#/experiments/{delivery.experiment_id}/runs/{delivery.mlflow_run_id}"

    def _opened(self) -> Spool:
        if self._spool is None:
            raise RuntimeError("the tracker is not started or has finished already; call start first")
        return self._spool


def _user() -> str:
    try:
        return getpass.getuser()
    except (KeyError, OSError):  # the uid of a container may have no name
        return "unknown"
