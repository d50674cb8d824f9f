"""Record the commands of a run: each command, with the meta-step before which it takes effect, before it takes effect.

``RUN_DIR/commands.jsonl`` has one command a line, each line with its own checksum. Every write replaces the whole
(short) file through ``storage.store``; on a local disk that is atomic and synced. Each checkpoint's manifest repeats
the commands that the checkpoint was trained under.

Versions before this one appended single lines, so a killed driver could leave a torn last line. Such a line never took
effect: it is ignored, and the next write drops it.
"""

from __future__ import annotations

import contextlib
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
from metadist.storage.store import Store, why

log = logging.getLogger(__name__)

NAME = "commands.jsonl"


@dataclass(frozen=True)
class LoggedCommand:
    """A command that took effect before ``meta_step`` (0-based) was computed; ``by`` is the driver, as HOST:PID."""

    seq: int
    meta_step: int
    command: Command
    time: float = 0.0
    by: str = ""

    def as_dict(self) -> dict[str, Any]:
        """Return the fields of the log's line, without the checksum."""
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
    def of(cls, fields: Mapping[str, Any]) -> LoggedCommand:
        """Return the command of a line's fields; ``KeyError``, ``TypeError`` or ``ValueError`` for wrong ones."""
        command = Command(fields["command"], fields.get("value"), fields.get("role", "learner"), fields["id"])
        return cls(int(fields["seq"]), int(fields["meta_step"]), command, float(fields["time"]), str(fields["by"]))


class CommandLog:
    """The command log of one run. One driver writes and holds the run's lock; any process may read.

    ``copy``: a local file that receives the same bytes where the run directory is not local.

    Raises ``MetadistError`` if the log cannot be read, ``CheckpointError`` if a line of it is damaged.
    """

    def __init__(self, run_dir: str, copy: Path | None = None) -> None:
        self._store = Store(run_dir)
        self.local = self._store.local
        self.path: Path | None = Path(self._store.path(NAME)) if self.local else copy
        self.where = self._store.path(NAME) if self.local else f"{run_dir.rstrip('/')}/{NAME}"
        self.entries: list[LoggedCommand] = []
        #: the commands in force that change the parameters, by meta-step
        self._valid: list[LoggedCommand] = []
        self._lines: list[bytes] = []
        self._read()

    def _read(self) -> None:
        try:
            data = self._store.read(NAME)
        except FileNotFoundError:
            return
        except Exception as error:
            raise MetadistError(f"{self.where} can't be read: {why(error)}") from error
        *lines, tail = data.split(b"\n")  # the tail is empty unless the last line lacks its end
        for number, line in enumerate(lines, 1):
            self._add_line(number, line + b"\n")
        if not tail:
            return
        # A last line may lack its end, or have a wrong byte there: the checksum decides.
        line = next((end for end in (tail + b"\n", tail[:-1] + b"\n") if _parsed(end)), tail)
        if line is not tail or _holds_a_record(tail):
            self._add_line(len(lines) + 1, line)
        else:
            log.warning(
                "%s: ignoring a torn last line of %d bytes; its command never took effect", self.where, len(tail)
            )

    def _add_line(self, number: int, line: bytes) -> None:
        entry = _parsed(line)
        if entry is None or (self.entries and entry.seq <= self.entries[-1].seq):
            raise CheckpointError(
                f"{self.where}, line {number} is damaged, and its command did take effect; restore the file from a "
                "copy, or remove the line to continue without the command (the parameters then differ from those of an "
                "uninterrupted run)"
            )
        self._add(entry, line)

    def append(self, command: Command, meta_step: int) -> LoggedCommand:
        """Record a command; it is stored and synced when this returns.

        Raises ``MetadistError`` if the log cannot be written: the command must not take effect then.
        """
        number = self.entries[-1].seq + 1 if self.entries else 1
        entry = LoggedCommand(number, meta_step, command, round(time.time(), 3), f"{platform.node()}:{os.getpid()}")
        line = _line(entry)
        try:
            self._write([*self._lines, line])
        except Exception as error:
            self._undo()
            raise MetadistError(
                f"the command can't be recorded in {self.where}: {why(error)}; it has no effect"
            ) from error
        self._add(entry, line)
        return entry

    def _add(self, entry: LoggedCommand, line: bytes) -> None:
        """Add a command. The newest one wins: a command at meta-step 12 of a resumed run cancels those that an earlier
        attempt recorded at 12 and later."""
        self.entries.append(entry)
        self._lines.append(line)
        if entry.command.name in CHANGES_PARAMETERS:
            self._valid = [e for e in self._valid if e.meta_step < entry.meta_step] + [entry]

    def history(self, before: int | None = None) -> list[dict[str, Any]]:
        """Return the commands that shaped the parameters, of meta-steps below ``before``, as a manifest holds them."""
        return [
            {"meta_step": e.meta_step, "command": e.command.name, "value": e.command.value}
            for e in self._valid
            if before is None or e.meta_step < before
        ]

    def _write(self, lines: Sequence[bytes]) -> None:
        data = b"".join(lines)
        self._store.write(NAME, data)
        if self.path is not None and not self.local:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            self.path.write_bytes(data)

    def _undo(self) -> None:
        """Put the last content back: a write that raised (while it synced, on the network) may have succeeded."""
        with contextlib.suppress(Exception):
            if self._lines:
                self._write(self._lines)
            else:
                self._store.remove(NAME)

    def value_at(self, name: str, meta_step: int) -> int | None:
        """Return the value that the command ``name`` last set for ``meta_step``; None if there is none."""
        return next(
            (e.command.value for e in reversed(self._valid) if e.command.name == name and e.meta_step <= meta_step),
            None,
        )

    def obeyed(self, id: str) -> LoggedCommand | None:
        """Return the recorded command that has this id, if any."""
        return next((e for e in self.entries if e.command.id == id), None)

    def reconcile(self, recorded: Sequence[Mapping[str, Any]], meta_step: int) -> str | None:
        """Compare the log with ``recorded``, the commands that the checkpoint of ``meta_step`` was trained under.

        Restore commands that the log has lost and return a note for the user; return None if both are equal. Raises
        ``CheckpointError`` if the log has commands that the checkpoint was not trained under.
        """
        mine, theirs = self.history(meta_step), [dict(c) for c in recorded]
        if mine == theirs:
            return None
        lost = theirs[len(mine) :]
        later = [c for c in self.history() if lost and c["meta_step"] >= lost[0]["meta_step"]]
        if theirs[: len(mine)] != mine or later:
            raise CheckpointError(
                f"{self.where} and the checkpoint of meta-step {meta_step} contradict each other: the log has "
                f"{_listed(mine)}, the checkpoint was trained under {_listed(theirs)}. Restore this run's log, remove "
                "the lines of other runs, or remove that checkpoint to continue from an older one"
            )
        for c in lost:
            self.append(Command(c["command"], c["value"]), c["meta_step"])
        return f"{self.where} had lost {_listed(lost)}; restored from the checkpoint of meta-step {meta_step}"


def _listed(commands: Sequence[Mapping[str, Any]]) -> str:
    return ", ".join(f"{c['command']} {c['value']} at meta-step {c['meta_step']}" for c in commands) or "no command"


def _checksum(fields: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(fields, sort_keys=True).encode()).hexdigest()[:16]


def _line(entry: LoggedCommand) -> bytes:
    fields = entry.as_dict()
    return json.dumps({**fields, "check": _checksum(fields)}).encode() + b"\n"


def _parsed(line: bytes) -> LoggedCommand | None:
    """Return the command of a line; None if the line is torn or damaged."""
    try:
        fields = json.loads(line) if line.endswith(b"\n") else {}
        check = fields.pop("check", None)
        return LoggedCommand.of(fields) if check == _checksum(fields) else None
    except (ValueError, TypeError, AttributeError, KeyError, MetadistError):
        return None


def _holds_a_record(tail: bytes) -> bool:
    """Return whether a last line without its end holds a whole record and more, such as two records whose separating
    line end was damaged."""
    try:
        _, end = json.JSONDecoder().raw_decode(tail.decode("utf-8", "replace"))
        return end < len(tail)
    except ValueError:
        return False
