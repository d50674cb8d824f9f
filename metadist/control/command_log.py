"""The command log of a run: every command, with the meta-step before which it takes effect, written ahead of its effect.

``RUN_DIR/commands.jsonl`` has one command a line, each with its own checksum. On a local disk a line is appended and synced; an
object store can't append, so there the (short) log is put whole. What a checkpoint was trained under stands in its manifest too.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import platform
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from metadist.control.commands import CHANGES_PARAMETERS, Command
from metadist.core.errors import CheckpointError, MetadistError
from metadist.storage.store import Store, sync_directory, why

log = logging.getLogger(__name__)

NAME = "commands.jsonl"


@dataclass(frozen=True)
class Entry:
    """A command that took effect before ``meta_step`` (0-based) was computed."""

    seq: int
    meta_step: int
    command: Command
    time: float = 0.0
    by: str = ""

    def as_dict(self) -> dict[str, Any]:
        c = self.command
        value = {} if c.value is None else {"value": c.value}
        role = {"role": c.role} if c.name == "set_workers" else {}
        return {
            "seq": self.seq,
            "meta_step": self.meta_step,
            "command": c.name,
            **value,
            **role,
            "id": c.id,
            "time": self.time,
            "by": self.by,
        }

    @classmethod
    def of(cls, fields: Mapping[str, Any]) -> Entry:
        command = Command(fields["command"], fields.get("value"), fields.get("role", "learner"), fields["id"])
        return cls(int(fields["seq"]), int(fields["meta_step"]), command, float(fields["time"]), str(fields["by"]))


class CommandLog:
    """One driver writes, and holds a lock of the run meanwhile; any process may read. ``copy``: a local file that shows the log
    where the run directory is not local."""

    def __init__(self, run_dir: str, copy: Path | None = None) -> None:
        self._store = Store(run_dir)
        self.local = self._store.local
        self.path: Path | None = Path(self._store.path(NAME)) if self.local else copy
        self.where = self._store.path(NAME) if self.local else f"{run_dir.rstrip('/')}/{NAME}"
        self.entries: list[Entry] = []
        #: of those that change the parameters: what holds, by meta-step
        self._valid: list[Entry] = []
        self._lines: list[bytes] = []
        self._read()

    def _read(self) -> None:
        try:
            data = self._store.read(NAME)
        except FileNotFoundError:
            return
        except Exception as error:
            raise MetadistError(f"{self.where} can't be read: {why(error)}") from error
        *whole, last = data.split(b"\n")  # nothing comes last, where the last line ends as it should
        lines = [line + b"\n" for line in whole]
        ended = next((line for line in (last + b"\n", last[:-1] + b"\n") if last and _parsed(line)), None)
        if ended is not None:  # all there but for its end
            lines, last = [*lines, ended], b""
            self._put(b"".join(lines))
        for number, line in enumerate([*lines, last] if last else lines, 1):
            entry = _parsed(line)
            if entry is not None and (not self.entries or entry.seq > self.entries[-1].seq):
                self._add(entry, line)
            elif line is last and not _holds_a_record(line):
                # Written ahead: what was not written whole never took effect.
                log.warning(
                    "%s: cutting off a torn last line of %d bytes; its command never took effect", self.where, len(line)
                )
                self._put(b"".join(self._lines))
            else:
                raise CheckpointError(
                    f"{self.where}, line {number} is damaged, and its command did take effect; restore the file from a copy, or "
                    f"remove the line to go on without the command (the parameters then differ from those of an unbroken run)"
                )

    def append(self, command: Command, meta_step: int) -> Entry:
        """Safe on disk when this returns. MetadistError where it can't be written: then the command must not take effect."""
        number = self.entries[-1].seq + 1 if self.entries else 1
        entry = Entry(number, meta_step, command, round(time.time(), 3), f"{platform.node()}:{os.getpid()}")
        line = _line(entry)
        try:
            if self.local:
                self._append(line)
            else:
                self._put(b"".join([*self._lines, line]))
        except Exception as error:
            raise MetadistError(
                f"the command can't be recorded in {self.where}: {why(error)}; it has no effect"
            ) from error
        self._add(entry, line)
        return entry

    def _add(self, entry: Entry, line: bytes) -> None:
        """The newest order wins: one given at meta-step 12 (of a run that was resumed there) takes back those that an earlier
        attempt was given at 12 and later."""
        self.entries.append(entry)
        self._lines.append(line)
        if entry.command.name in CHANGES_PARAMETERS:
            self._valid = [e for e in self._valid if e.meta_step < entry.meta_step] + [entry]

    def history(self, before: int | None = None) -> list[dict[str, Any]]:
        """The commands that made the parameters what they are, of meta-steps below ``before``: what a checkpoint's manifest holds."""
        return [
            {"meta_step": e.meta_step, "command": e.command.name, "value": e.command.value}
            for e in self._valid
            if before is None or e.meta_step < before
        ]

    def _append(self, line: bytes) -> None:
        path = Path(self._store.path(NAME))
        path.parent.mkdir(parents=True, exist_ok=True)
        descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
        try:
            end = os.fstat(descriptor).st_size
            try:
                if os.write(descriptor, line) != len(line):
                    raise OSError("the disk is full")
                os.fsync(descriptor)
                if not end:
                    sync_directory(path.parent)
            except OSError:
                os.ftruncate(descriptor, end)  # no half of a line, and none that took no effect
                raise
        finally:
            os.close(descriptor)

    def _put(self, data: bytes) -> None:
        self._store.write(NAME, data)
        if self.path is not None and not self.local:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            self.path.write_bytes(data)

    def value_at(self, name: str, meta_step: int) -> int | None:
        """What ``name`` was last set to, for the meta-step ``meta_step``."""
        return next(
            (e.command.value for e in reversed(self._valid) if e.command.name == name and e.meta_step <= meta_step),
            None,
        )

    def obeyed(self, id: str) -> Entry | None:
        return next((e for e in self.entries if e.command.id == id), None)

    def reconcile(self, recorded: Sequence[Mapping[str, Any]], meta_step: int) -> str | None:
        """Hold the log against what the checkpoint of ``meta_step`` was trained under.

        Commands that the log has lost come back from the manifest (returns a note for the user). Commands that the checkpoint was
        not trained under can't be true: CheckpointError.
        """
        mine, theirs = self.history(meta_step), [dict(c) for c in recorded]
        if mine == theirs:
            return None
        lost = theirs[len(mine) :]
        later = [c for c in self.history() if lost and c["meta_step"] >= lost[0]["meta_step"]]
        if theirs[: len(mine)] != mine or later:
            raise CheckpointError(
                f"{self.where} and the checkpoint of meta-step {meta_step} contradict each other: the log has {_told(mine)}, the checkpoint was "
                f"trained under {_told(theirs)}. Put the log of this run back, remove the lines that are not its, or remove that checkpoint to go "
                "on from an older one"
            )
        for c in lost:
            self.append(Command(c["command"], c["value"]), c["meta_step"])
        return f"{self.where} had lost {_told(lost)}; taken from the checkpoint of meta-step {meta_step}"


def _told(commands: Sequence[Mapping[str, Any]]) -> str:
    return ", ".join(f"{c['command']} {c['value']} at meta-step {c['meta_step']}" for c in commands) or "no command"


def _checksum(fields: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(fields, sort_keys=True).encode()).hexdigest()[:16]


def _line(entry: Entry) -> bytes:
    fields = entry.as_dict()
    return json.dumps({**fields, "check": _checksum(fields)}).encode() + b"\n"


def _parsed(line: bytes) -> Entry | None:
    """None where the line is torn or damaged."""
    try:
        fields = json.loads(line) if line.endswith(b"\n") else {}
        check = fields.pop("check", None)
        return Entry.of(fields) if check == _checksum(fields) else None
    except (ValueError, TypeError, AttributeError, KeyError, MetadistError):
        return None


def _holds_a_record(tail: bytes) -> bool:
    """Whether a last line without its end is more than one that was cut short: lines that lost what stood between them."""
    try:
        _, end = json.JSONDecoder().raw_decode(tail.decode("utf-8", "replace"))
        return end < len(tail)
    except ValueError:
        return False
