"""Deliver a spool to MLflow from a background thread, and survive all failures of MLflow.

Delivery is at least once and idempotent: metrics carry their original timestamps (MLflow drops a metric that it already
has), and every other record is overwritten by the same value. The position in ``acked.json`` moves only after success.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from metadist.core.text import without_passwords
from metadist.tracking.mlflow_run import RunStore
from metadist.tracking.spool import Steps, parse, read_json, read_lines, write_json

logger = logging.getLogger(__name__)

FIRST_PAUSE, LONGEST_PAUSE, LONGEST_PAUSE_AT_END = 1.0, 60.0, 2.0


class Delivery(threading.Thread):
    """Deliver one spool folder until stopped. Of the methods that the driver calls, only ``drain`` waits.

    After a failure the thread pauses for 1, 2, 4 … 60 s. One folder has one deliverer: the second one waits for the
    first (the thread of an earlier attempt that hangs in a request, or ``metadist ui``).
    """

    def __init__(self, folder: Path, tracking_uri: str, *, identity: Mapping[str, Any], interval: float = 2.0) -> None:
        super().__init__(name=f"mlflow-delivery-{Path(folder).name}", daemon=True)
        self.folder = Path(folder)
        self.uri = tracking_uri
        self.interval = interval
        self._spool = self.folder / "spool.jsonl"
        self._acked = self.folder / "acked.json"
        self._lock = FileLock(str(self.folder / "delivery.lock"), thread_local=False)
        self._identity = identity  # the content of run.json
        self._position = read_json(self._acked)
        self._store: RunStore | None = None
        self._opened = False
        self._tail_rechecked = False
        #: The points that MLflow has, in the rare cases in which the position does not tell which points to skip.
        self._on_server: dict[str, Steps] | None = None
        self._failures = 0
        self._draining = False
        self._stopping = False
        self._wake = threading.Event()
        self._progress = threading.Condition()

    @property
    def mlflow_run_id(self) -> str | None:
        """The id of the MLflow run, or None before the first delivery."""
        return self._position.get("mlflow_run_id")

    @property
    def experiment_id(self) -> str | None:
        """The id of the MLflow experiment, or None before the first delivery."""
        return self._position.get("experiment_id")

    def delivered(self) -> int:
        """Return the number of records that MLflow has."""
        return self._position.get("records", 0)

    def drain(self, records: int, timeout: float) -> int:
        """Wait until ``records`` records are delivered, at most ``timeout`` seconds; return the undelivered records.

        The thread ends after its current request.
        """
        deadline = time.monotonic() + timeout
        self._draining = True
        self._wake.set()
        with self._progress:
            self._progress.wait_for(lambda: self.delivered() >= records or not self.is_alive(), timeout)
        self._stopping = True
        self._wake.set()
        self.join(max(0.0, deadline - time.monotonic()))  # then the folder is free for the next deliverer
        return max(0, records - self.delivered())

    def run(self) -> None:
        """Deliver, pause, repeat."""
        try:
            while not self._stopping:
                self._wake.clear()
                self._wait(self._round())
        finally:
            self._lock.release()
            with self._progress:
                self._progress.notify_all()

    def _wait(self, pause: float) -> None:
        if not self._stopping and pause > 0:
            self._wake.wait(pause)

    def _round(self) -> float:
        """Deliver one chunk; return the pause in seconds."""
        try:
            if not self._owns_folder():
                return 0.5
            more = self._deliver()
        except Exception as error:  # stores, database drivers, networks and disks raise many types: pause, try again
            self._opened = False
            longest = LONGEST_PAUSE_AT_END if self._draining else LONGEST_PAUSE
            pause = min(longest, FIRST_PAUSE * 2**self._failures)
            if not self._failures:
                logger.warning(
                    "MLflow at %s fails: %s. Training continues; the records wait in %s",
                    without_passwords(self.uri),
                    without_passwords(" ".join(str(error).split()))[:300] or type(error).__name__,
                    self.folder,
                )
            self._failures = min(self._failures + 1, 20)
            return pause
        if self._failures:
            logger.warning("MLflow at %s works again", without_passwords(self.uri))
        self._failures = 0
        if more:
            return 0.0
        return 0.02 if self._draining else self.interval

    def _owns_folder(self) -> bool:
        if not self._lock.is_locked:
            try:
                self._lock.acquire(timeout=0)
            except Timeout:
                return False
            self._position = read_json(self._acked)  # the previous deliverer may have changed the file
        return True

    def _deliver(self) -> bool:
        if not self._opened:
            self._open()
        lines = list(read_lines(self._spool, self._position["offset"]))
        if not lines:
            return False
        self._send([record for record in map(parse, lines) if record is not None])
        self._ack(
            offset=self._position["offset"] + sum(map(len, lines)),
            records=self._position["records"] + len(lines),
        )
        return True

    def _open(self) -> None:
        if self._store is None:
            self._store = RunStore(self.uri, self._identity["experiment"], Path(self._identity["runs_root"]))
        known = self._position.get("mlflow_run_id")
        run_id = self._store.open(self._identity, known)
        position = {"offset": 0, "records": 0, "recheck": False, **self._position}
        if run_id != known:  # a new run, or another store: deliver the whole spool
            position.update(offset=0, records=0, recheck=self._store.adopted)
        if self._identity.get("tail_lost") and not self._tail_rechecked:
            # After a power cut the spool may lack points that MLflow has, and the resumed driver records them again.
            position.update(offset=0, records=0, recheck=True)
            self._tail_rechecked = True
        if position["recheck"] and self._on_server is None:
            self._on_server = {}
            for key, step in self._store.history():
                self._on_server.setdefault(key, Steps()).add(step)
        self._ack(**position | {"mlflow_run_id": run_id, "experiment_id": self._store.experiment_id})
        self._opened = True

    def _ack(self, **changes: Any) -> None:
        position = self._position | changes
        write_json(self._acked, position)
        with self._progress:
            self._position = position
            self._progress.notify_all()

    def _send(self, records: list[dict[str, Any]]) -> None:
        from mlflow.exceptions import MlflowException

        assert self._store is not None
        if self._on_server is not None:
            records = [r for r in records if not self._on_server_already(r)]
        batch = [r for r in records if r["kind"] in ("metric", "param", "tag")]
        try:
            self._log(batch)
        except MlflowException as error:
            if error.error_code not in ("INVALID_PARAMETER_VALUE", "BAD_REQUEST"):
                raise
            self._opened = False
            self._open()  # MLflow reports a deleted run in the same way as a bad record
            self._log_accepted(batch)
        for record in {r["key"]: r for r in records if r["kind"] == "dataset"}.values():
            self._store.log_dataset(record["key"], record["value"])
        for (folder, name), record in {(r["value"], r["key"]): r for r in records if r["kind"] == "artifact"}.items():
            path = self.folder / "files" / folder / name
            if path.exists():
                self._store.log_artifact(path, folder)
            else:
                self._reject(record, "its file does not exist any more")
        for record in {r["key"]: r for r in records if r["kind"] == "model"}.values():
            try:
                self._store.log_model(record["key"], self.folder / "models" / record["key"], record["value"])
            except MlflowException as error:
                if error.error_code not in ("INVALID_PARAMETER_VALUE", "BAD_REQUEST", "FEATURE_DISABLED"):
                    raise
                self._reject(record, without_passwords(str(error)))
        for record in [r for r in records if r["kind"] == "status"][-1:]:
            if record["value"] != "RUNNING":
                self._store.delete_twins(self._identity["run_id"])
            self._store.set_status(record["value"], record["timestamp_ms"])

    def _log(self, records: list[dict[str, Any]]) -> None:
        assert self._store is not None
        if records:
            self._store.log(
                [r for r in records if r["kind"] == "metric"],
                [(r["key"], r["value"]) for r in records if r["kind"] == "param"],
                {r["key"]: r["value"] for r in records if r["kind"] == "tag"},
            )

    def _log_accepted(self, records: list[dict[str, Any]]) -> None:
        """Log a batch without the records that MLflow refuses: halve the batch until each of them is alone."""
        from mlflow.exceptions import MlflowException

        try:
            self._log(records)
        except MlflowException as error:
            if error.error_code not in ("INVALID_PARAMETER_VALUE", "BAD_REQUEST"):
                raise
            if len(records) == 1:
                self._reject(records[0], without_passwords(str(error)))
                return
            middle = len(records) // 2
            self._log_accepted(records[:middle])
            self._log_accepted(records[middle:])

    def _on_server_already(self, record: dict[str, Any]) -> bool:
        assert self._on_server is not None
        return record["kind"] == "metric" and record["step"] in self._on_server.get(record["key"], ())

    def _reject(self, record: dict[str, Any], reason: str) -> None:
        logger.warning("MLflow refuses %s %r permanently: %s", record["kind"], record["key"], reason[:300])
        with open(self.folder / "rejected.jsonl", "a", encoding="utf-8") as file:
            file.write(f"{record}\n")
