"""What a driver sees of experiment tracking: calls that return at once, whatever the server does."""

from __future__ import annotations

import getpass
import logging
import math
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

from metadist.core.errors import ConfigError
from metadist.tracking.delivery import Delivery
from metadist.tracking.spool import Spool, legal_key, read_json, write_json
from metadist.tracking.store import require_mlflow, resolve_uri, sqlite_path, without_password

logger = logging.getLogger(__name__)

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


class MLflowTracker:
    """Records into a local spool, which a background thread delivers to MLflow."""

    def __init__(self, spool: str | Path, *, tracking_uri: str, experiment: str, runs_root: str | Path, interval: float = 2.0) -> None:
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
        """Begins or resumes ``run_id``: the same MLflow run, after whatever an earlier attempt left undelivered."""
        if {"'", "`", '"'} & set(run_id + (parent or "")):
            raise ConfigError(f"run_id {run_id!r}, parent {parent!r}: quotes are not allowed")
        spool = Spool(self.folder)
        before = read_json(self.folder / "run.json")
        acked = read_json(self.folder / "acked.json")
        identity = {
            "run_id": run_id,
            "name": name,
            "parent": parent or before.get("parent"),
            "mlflow_run_id": mlflow_run_id or before.get("mlflow_run_id"),
            "experiment": self.experiment,
            "tracking_uri": without_password(self.tracking_uri),
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
        """One append to a local file."""
        self._opened().metrics(step, values)

    def tags(self, values: Mapping[str, str]) -> None:
        """One append to a local file."""
        self._opened().set_tags(values)

    def artifact(self, path: str | Path, folder: str = "") -> None:
        """Copies the file into the spool."""
        self._opened().artifact(Path(path), folder)

    def model(self, name: str, files: Sequence[Path], about: Mapping[str, Any]) -> None:
        """Copies the files into the spool; the delivery makes the model of them."""
        self._opened().model(name, files, about)

    def flush(self) -> None:
        """Syncs the spool to disk."""
        self._opened().flush()

    def finish(self, status: str, timeout: float) -> int:
        """Records the end and waits for delivery; what is left then can be delivered later with ``replay``."""
        if status not in STATUSES:
            raise ValueError(f"status {status!r} is none of {', '.join(STATUSES)}")
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
        """The MLflow run, once the server has told (now or in an earlier attempt)."""
        return self._delivery.mlflow_run_id if self._delivery else read_json(self.folder / "acked.json").get("mlflow_run_id")

    def url(self) -> str | None:
        """The run's page on an MLflow server; None for a local file, which needs ``metadist ui``."""
        delivery = self._delivery
        if delivery is None or delivery.mlflow_run_id is None or not self.tracking_uri.startswith("http"):
            return None
        server = without_password(self.tracking_uri).rpartition("@")
        base = self.tracking_uri.split("://")[0] + "://" + server[2] if server[1] else self.tracking_uri
        return f"{base.rstrip('/')}/#/experiments/{delivery.experiment_id}/runs/{delivery.mlflow_run_id}"

    def _opened(self) -> Spool:
        if self._spool is None:
            raise RuntimeError("the tracker is not started, or finished")
        return self._spool


def make_tracker(uri: str | None, *, spool: str | Path, experiment: str, runs_root: str | Path, interval: float = 2.0) -> Tracker:
    """The tracker for ``tracking.uri``: ``none``, ``auto`` (``MLFLOW_TRACKING_URI``, else a SQLite file under ``runs_root``) or
    any MLflow tracking URI. ConfigError if it needs MLflow and that isn't installed."""
    if uri == "none":
        return NullTracker()
    require_mlflow()
    tracking_uri = resolve_uri(uri, Path(runs_root))
    if tracking_uri.startswith("sqlite") and sqlite_path(tracking_uri) is None:
        raise ConfigError(f"tracking.uri={tracking_uri} names no file; write sqlite:////absolute/path/mlflow.db")
    return MLflowTracker(spool, tracking_uri=tracking_uri, experiment=experiment, runs_root=runs_root, interval=interval)


def log_group(
    tracker: Tracker,
    *,
    run_id: str,
    name: str,
    results: Mapping[int, Sequence[Mapping[str, float]]],
    params: Mapping[str, object] | None = None,
    tags: Mapping[str, str] | None = None,
    status: str = "FINISHED",
    timeout: float = 30.0,
) -> int:
    """Records several seeds' results on their parent run: ``<key>/mean`` and ``<key>/sd`` (sample SD) for every key of each step.

    ``run_id`` is what the children gave as ``parent``; ``results`` maps a step to one mapping per seed. The first values count
    here too, so let the id name the seeds. Returns the number of undelivered records.
    """
    tracker.start(run_id=run_id, name=name, params=params or {}, tags=tags or {})
    for step, seeds in sorted(results.items()):
        tracker.metrics(step, mean_sd(seeds))
    return tracker.finish(status, timeout)


def mean_sd(seeds: Sequence[Mapping[str, float]]) -> dict[str, float]:
    """``<key>/mean`` and ``<key>/sd`` over the seeds that have the key; one seed has no SD."""
    summary: dict[str, float] = {}
    for key in dict.fromkeys(key for seed in seeds for key in seed):
        values = [float(seed[key]) for seed in seeds if key in seed]
        key = legal_key(key)[:245]
        mean = summary[f"{key}/mean"] = sum(values) / len(values)
        if len(values) > 1:
            summary[f"{key}/sd"] = math.sqrt(sum((value - mean) ** 2 for value in values) / (len(values) - 1))
    return summary


def undelivered(spool: str | Path) -> int:
    """How many records of a spool folder MLflow doesn't have yet."""
    path = Path(spool) / "spool.jsonl"
    if not path.exists():
        return 0
    with open(path, "rb") as file:
        file.seek(read_json(Path(spool) / "acked.json").get("offset", 0))
        return sum(chunk.count(b"\n") for chunk in iter(lambda: file.read(1 << 20), b""))


def replay(spool: str | Path, *, tracking_uri: str | None = None, timeout: float = 60.0) -> int:
    """Delivers what an earlier process left in a spool folder; returns how many records are still left.

    ``tracking_uri`` is needed only where the recorded one had a password, which isn't kept.
    """
    folder = Path(spool)
    identity = read_json(folder / "run.json")
    left = undelivered(folder)
    if not identity or not left:
        return left
    require_mlflow()
    uri = tracking_uri or identity["tracking_uri"]
    if ":***@" in uri:
        uri = resolve_uri("auto", Path(identity["runs_root"]))
    delivery = Delivery(folder, uri, identity=identity)
    already = delivery.delivered()
    delivery.start()
    delivery.drain(already + left, timeout)
    return undelivered(folder)


def _user() -> str:
    try:
        return getpass.getuser()
    except (KeyError, OSError):  # a container's uid without a name
        return "unknown"
