"""Commands for a run while it trains, the status of the run, and the interface of a run that obeys commands."""

from __future__ import annotations

import uuid
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from typing import Any, Protocol

from metadist.core.errors import ConfigError, MetadistError, one_of

#: command → whether it takes a value
COMMANDS = {
    "pause": False,
    "resume": False,
    "checkpoint": False,
    "set_meta_batch_size": True,
    "set_workers": True,
    "stop": False,
}
#: the commands that change the final parameters of a run; a resumed run obeys them again
CHANGES_PARAMETERS = ("set_meta_batch_size",)
#: the largest value of a command; larger than any useful value, and small enough that products do not overflow
MAX_VALUE = 1 << 24


class CommandRefusedError(MetadistError):
    """The run refuses a command, with the reason, and trains as before."""


@dataclass(frozen=True)
class Command:
    """A command for a run.

    The sender chooses ``id``: a command that is sent twice under one id is obeyed once. ``role`` belongs to
    ``set_workers``. Raises ``ConfigError`` for an unknown name, a missing or superfluous value, or a wrong id.
    """

    name: str
    value: int | None = None
    role: str = "learner"
    id: str = field(default_factory=lambda: uuid.uuid4().hex)

    def __post_init__(self) -> None:
        one_of("command", self.name, COMMANDS)
        if COMMANDS[self.name] and self.value is None:
            raise ConfigError(f"command {self.name}: a value is missing; expected a whole number")
        if not COMMANDS[self.name] and self.value is not None:
            raise ConfigError(f"command {self.name}: the command takes no value, got {self.value}")
        if self.value is not None and not 1 <= self.value <= MAX_VALUE:
            raise ConfigError(f"{self.name.removeprefix('set_')}: {self.value} is not between 1 and {MAX_VALUE}")
        if not 1 <= len(self.id) <= 64 or not self.id.isascii() or not self.id.isprintable():
            raise ConfigError("command id: expected 1 to 64 printable ASCII characters")

    def __str__(self) -> str:
        role = f"{self.role}s, " if self.name == "set_workers" and self.role != "learner" else ""
        return self.name if self.value is None else f"{self.name.removeprefix('set_')} = {role}{self.value}"


@dataclass(frozen=True)
class CommandResult:
    """The result of a command. ``meta_step``: it took effect before this meta-step; None while the command waits."""

    meta_step: int | None
    message: str


@dataclass(frozen=True)
class Snapshot:
    """One event of a run: ``kind`` is ``step``, ``validation`` or ``note``. ``values`` are the figures of the event."""

    kind: str
    meta_step: int
    values: Mapping[str, float] = field(default_factory=dict)
    message: str = ""
    time: float = 0.0


@dataclass(frozen=True)
class Status:
    """The state of a run.

    ``phase``: starting, training, paused or finishing (the loop has ended). ``asked`` and ``there``: requested and
    present workers by role. ``values``: the metrics of the newest meta-step. ``commands``: the newest obeyed commands,
    as the command log records them. ``waiting``: the commands for the next meta-step.
    """

    run_id: str
    run_dir: str
    phase: str
    meta_step: int
    meta_steps: int
    meta_batch_size: int
    checkpoint: int | None
    asked: Mapping[str, int]
    there: Mapping[str, int]
    tasks_per_second: float
    values: Mapping[str, float]
    validation: Mapping[str, float]
    commands: Sequence[Mapping[str, Any]]
    waiting: Sequence[str]
    pid: int
    host: str
    started: float


class Subscription(Protocol):
    """The unread snapshots of one watcher. The queue is bounded: a slow watcher loses the oldest snapshots."""

    dropped: int

    def next(self, timeout: float) -> list[Snapshot]:
        """Return the snapshots since the last call, or an empty list after ``timeout`` seconds without one.

        Raises ``EOFError`` when the run has ended.
        """
        ...


class Steerable(Protocol):
    """A run that obeys commands. Any thread may call the methods; no method delays training."""

    def submit(self, command: Command, timeout: float) -> CommandResult:
        """Submit a command for the next meta-step and wait up to ``timeout`` seconds until it takes effect.

        Raises ``CommandRefusedError`` or ``ConfigError`` with the reason if the run refuses the command.
        """
        ...

    def status(self) -> Status:
        """Return the current state of the run."""
        ...

    def watch(self) -> AbstractContextManager[Subscription]:
        """Subscribe to the snapshots of the run for the duration of the block."""
        ...
