"""Keep a local, append-only record of a run: the source from which MLflow is filled.

A spool folder holds::

    run.json        the run's identity and its destination (written by the driver)
    spool.jsonl     one record per line: seq, kind (metric | param | tag | dataset | artifact | model | status), key,
                    value, step, timestamp_ms
    models/         the files of models that are to be logged, by name
    files/          copies of the artifacts, by destination: a later version replaces an earlier one
    acked.json      the delivered position and the id of the MLflow run (written by the deliverer)
    rejected.jsonl  the records that MLflow refused permanently, if any

An append is one ``write`` to the page cache, so a SIGKILL of the driver loses nothing; after ``flush`` the records
survive a power cut as well. Metrics are unique by (key, step): *the first value counts*, so a resumed driver can repeat
steps.
"""

from __future__ import annotations

import json
import logging
import math
import os
import posixpath
import re
import shutil
import time
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from metadist.core.errors import MetadistError

logger = logging.getLogger(__name__)

MAX_KEY = 250
MAX_PARAM = 6000
MAX_TAG = 8000
MAX_PENDING = 4 << 20  # bytes kept in memory while the disk is full
_ILLEGAL = re.compile(r"[^\w/. \-]")  # MLflow also takes ':', but not on Windows, and a store may be there


def legal_key(key: str) -> str:
    """Return a key that MLflow accepts: replace illegal characters by ``_``, normalise the path, cut a long key."""
    key = posixpath.normpath(_ILLEGAL.sub("_", key).strip("/"))
    if key.startswith("."):  # "." and ".." would be folders in a file store
        key = "_" + key
    return key[:MAX_KEY]


def write_json(path: Path, value: Mapping[str, Any]) -> None:
    """Replace ``path`` atomically, without fsync: these files can only be out of date, and delivery repairs that."""
    temporary = path.with_name(f"{path.name}.{os.getpid()}.tmp")
    try:
        temporary.write_text(json.dumps(value, indent=1), encoding="utf-8")
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def read_json(path: Path) -> dict[str, Any]:
    """Return the object in the file ``path``; an empty dict where the file is missing or damaged."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (FileNotFoundError, ValueError):
        return {}
    return value if isinstance(value, dict) else {}


class Steps:
    """An exact set of step numbers as arithmetic runs ``[first, stride, last]``.

    Evenly spaced steps take constant memory.

    The largest step alone would need less memory, but a late, out-of-order point would then count as a duplicate.
    """

    __slots__ = ("_largest", "_runs")

    def __init__(self) -> None:
        self._runs: list[list[int]] = []
        self._largest = -(1 << 62)

    def __contains__(self, step: int) -> bool:
        return step <= self._largest and any(
            first <= step <= last and (step - first) % stride == 0 for first, stride, last in self._runs
        )

    def __len__(self) -> int:
        return sum((last - first) // stride + 1 for first, stride, last in self._runs)

    def add(self, step: int) -> bool:
        """Add ``step``; return False if the set has it already."""
        if step in self:
            return False
        self._largest = max(self._largest, step)
        if self._runs:
            run = self._runs[-1]
            first, stride, last = run
            if first == last and step > last:
                run[1:] = step - first, step
                return True
            if step == last + stride:
                run[2] = step
                return True
        self._runs.append([step, 1, step])
        return True


class Spool:
    """The writer of a spool folder: one at a time; a full disk raises no error.

    Opening cuts off a torn last line and reads which (key, step) pairs the spool has.
    """

    def __init__(self, folder: Path, *, lock_timeout: float = 5.0) -> None:
        self.folder = Path(folder)
        self.folder.mkdir(parents=True, exist_ok=True)
        self.path = self.folder / "spool.jsonl"
        self._lock = FileLock(str(self.folder / "writer.lock"), thread_local=False)
        try:
            self._lock.acquire(timeout=lock_timeout)
        except Timeout:
            raise MetadistError(
                f"{self.folder} is being written by another process; stop the other process of this run first"
            ) from None
        self.steps: dict[str, Steps] = {}
        self.params: dict[str, str] = {}
        self.tags: dict[str, str] = {}
        self.records = 0  # records in the file and in ``_pending``
        self.lost = 0  # records that were dropped because the disk stayed full
        self._pending = bytearray()
        self._failing = False
        self._file = os.open(self.path, os.O_RDWR | os.O_CREAT | os.O_APPEND, 0o644)
        self.damaged = 0  # lines that were skipped
        self.end = self._load()

    def metrics(self, step: int, values: Mapping[str, float], timestamp_ms: int | None = None) -> None:
        """Append the values whose (key, step) is new.

        MLflow's SQL stores turn ±Inf into ±1.8e308, which makes every axis unreadable. Therefore an infinity is
        recorded as NaN, and a second metric ``<key>_nonfinite`` records its sign, ±1. NaN is recorded as NaN.
        """
        now = timestamp_ms or time.time_ns() // 1_000_000
        step = int(step)
        new: list[dict[str, Any]] = []
        for key, value in values.items():
            key, value = legal_key(key), float(value)
            if math.isinf(value):
                self._metric(new, f"{key[: MAX_KEY - 10]}_nonfinite", step, math.copysign(1.0, value), now)
                value = math.nan
            self._metric(new, key, step, value, now)
        if new:
            self._append(new)

    def _metric(self, new: list[dict[str, Any]], key: str, step: int, value: float, now: int) -> None:
        seen = self.steps.get(key)
        if seen is None:
            seen = self.steps[key] = Steps()
        if seen.add(step):
            # "NaN" as a string: a bare NaN is no JSON, and float() reads both
            recorded: float | str = "NaN" if math.isnan(value) else value
            new.append({"kind": "metric", "key": key, "value": recorded, "step": step, "timestamp_ms": now})

    def set_params(self, params: Mapping[str, object]) -> None:
        """Append the params that are new or have changed."""
        self._set("param", self.params, params, MAX_PARAM)

    def set_tags(self, tags: Mapping[str, object]) -> None:
        """Append the tags that are new or have changed."""
        self._set("tag", self.tags, tags, MAX_TAG)

    def _set(self, kind: str, known: dict[str, str], given: Mapping[str, object], limit: int) -> None:
        now = time.time_ns() // 1_000_000
        new = []
        for key, value in given.items():
            key, text = legal_key(key), str(value)
            if len(text) > limit:
                text = text[: limit - 1] + "…"
            if known.get(key) != text:
                known[key] = text
                new.append({"kind": kind, "key": key, "value": text, "timestamp_ms": now})
        if new:
            self._append(new)

    def dataset(self, name: str, digest: str, source: str, about: Mapping[str, str]) -> None:
        """Append a data set; a resumed run repeats it, and MLflow keeps one of equal name and digest."""
        value = {"digest": digest, "source": source, "about": dict(about)}
        now = time.time_ns() // 1_000_000
        self._append([{"kind": "dataset", "key": name, "value": value, "timestamp_ms": now}])

    def artifact(self, source: Path, folder: str = "") -> None:
        """Copy the file ``source`` into the spool; it is delivered as ``folder/<its name>``."""
        source = Path(source)
        folder = posixpath.normpath(folder) if folder else ""
        if folder.startswith(("/", "..")):
            raise ValueError(f"artifact folder {folder!r} is outside the run; expected a relative path without '..'")
        target = self.folder / "files" / folder / source.name
        temporary = target.with_name(f".{target.name}.{os.getpid()}.tmp")
        try:
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(source, temporary)
            os.replace(temporary, target)
        except OSError as error:
            logger.warning("artifact %s is not recorded: %s", source, error)
            temporary.unlink(missing_ok=True)
            return
        now = time.time_ns() // 1_000_000
        self._append([{"kind": "artifact", "key": source.name, "value": folder, "timestamp_ms": now}])

    def model(self, name: str, files: Iterable[Path], about: Mapping[str, Any]) -> None:
        """Copy the files of a model into the spool; it is logged as the MLflow model ``name``."""
        target = self.folder / "models" / name
        try:
            target.mkdir(parents=True, exist_ok=True)
            for source in files:
                shutil.copyfile(source, target / source.name)
        except OSError as error:
            logger.warning("model %s is not recorded: %s", name, error)
            return
        self._append(
            [{"kind": "model", "key": name, "value": dict(about), "timestamp_ms": time.time_ns() // 1_000_000}]
        )

    def status(self, status: str) -> None:
        """Append the run's status: RUNNING, FINISHED, FAILED or KILLED."""
        now = time.time_ns() // 1_000_000
        self._append([{"kind": "status", "key": "status", "value": status, "timestamp_ms": now}])

    def flush(self, fsync: bool = True) -> None:
        """Write the pending records; with ``fsync`` the spool then survives a power cut."""
        self._write()
        if fsync:
            try:
                os.fsync(self._file)
            except OSError as error:
                self._disk_failed(error)

    def close(self) -> None:
        """Flush, close the file and release the writer's lock."""
        if self._file < 0:
            return
        self.flush()
        os.close(self._file)
        self._file = -1
        self._lock.release()

    def _append(self, records: list[dict[str, Any]]) -> None:
        if len(self._pending) > MAX_PENDING:
            self._write()
        if len(self._pending) > MAX_PENDING:
            self.lost += len(records)
            return
        for record in records:
            line = json.dumps({"seq": self.records, **record}, ensure_ascii=False, separators=(",", ":"))
            self._pending += line.encode("utf-8", "replace") + b"\n"
            self.records += 1
        self._write()

    def _write(self) -> None:
        if not self._pending:
            return
        try:
            written = 0
            with memoryview(self._pending) as view:
                while written < len(view):
                    written += os.write(self._file, view[written:])
        except OSError as error:
            os.ftruncate(self._file, self.end)  # neither the deliverer nor the next attempt may read half a line
            self._disk_failed(error)
            return
        self.end += len(self._pending)
        self._pending.clear()
        if self._failing:
            self._failing = False
            logger.warning("%s: the disk takes data again; %d records were lost", self.path, self.lost)

    def _disk_failed(self, error: OSError) -> None:
        if not self._failing:
            self._failing = True
            logger.warning("%s: %s; training continues, and the records wait in memory", self.path, error)

    def _load(self) -> int:
        end = 0
        with open(self.path, "rb") as file:
            for line in file:
                if not line.endswith(b"\n"):
                    logger.warning("%s: cutting off a torn last line of %d bytes", self.path, len(line))
                    os.ftruncate(self._file, end)
                    break
                end += len(line)
                self.records += 1
                record = parse(line)
                if record is None:
                    self.damaged += 1
                    logger.warning("%s: line %d is damaged and is skipped", self.path, self.records)
                elif record["kind"] == "metric":
                    self.steps.setdefault(record["key"], Steps()).add(record["step"])
                elif record["kind"] == "param":
                    self.params[record["key"]] = record["value"]
                elif record["kind"] == "tag":
                    self.tags[record["key"]] = record["value"]
        return end


def parse(line: bytes) -> dict[str, Any] | None:
    """Return the record of a line, or None where the line is damaged (a power cut may leave zeros)."""
    try:
        record = json.loads(line)
        return record if isinstance(record, dict) and "kind" in record and "key" in record else None
    except ValueError:
        return None


def read_lines(path: Path, offset: int, limit: int = 1000, size: int = 1 << 19) -> Iterator[bytes]:
    """Yield at most ``limit`` whole lines and about ``size`` bytes from ``offset`` on, without an unfinished line."""
    if not path.exists():
        return
    with open(path, "rb") as file:
        file.seek(offset)
        taken = 0
        for _ in range(limit):
            line = file.readline()
            if not line.endswith(b"\n") or taken > size:
                return
            taken += len(line)
            yield line
