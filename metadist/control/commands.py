"""Steering a run while it trains: commands as data, and what a control plane may ask of the run that obeys them."""

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
#: those that change the parameters that a run ends with; a resumed run obeys them again
CHANGES_PARAMETERS = ("set_meta_batch_size",)
#: more than a run could want, and less than what overflows
MOST = 1 << 24


class RefusedError(MetadistError):
    """A command that the run does not obey, and why. The run goes on as before."""


@dataclass(frozen=True)
class Command:
    """``id`` is the giver's: a command that is sent twice under one id is obeyed once. ``role`` goes with ``set_workers``."""

    name: str
    value: int | None = None
    role: str = "learner"
    id: str = field(default_factory=lambda: uuid.uuid4().hex)

    def __post_init__(self) -> None:
        one_of("command", self.name, COMMANDS)
        if COMMANDS[self.name] != (self.value is not None):
            raise ConfigError(
                f"command {self.name}: {'a value is missing' if COMMANDS[self.name] else f'{self.value} where no value goes'}"
            )
        if self.value is not None and not 1 <= self.value <= MOST:
            raise ConfigError(f"{self.name.removeprefix('set_')}: {self.value} is not between 1 and {MOST}")
        if not 1 <= len(self.id) <= 64 or not self.id.isascii() or not self.id.isprintable():
            raise ConfigError("command id: expected 1 to 64 printable ASCII characters")

    def __str__(self) -> str:
        role = f"{self.role}s, " if self.name == "set_workers" and self.role != "learner" else ""
        return self.name if self.value is None else f"{self.name.removeprefix('set_')} = {role}{self.value}"


@dataclass(frozen=True)
class Answer:
    """What became of a command. ``meta_step``: before which one it took effect; None while it waits for the next."""

    meta_step: int | None
    message: str


@dataclass(frozen=True)
class Sight:
    """What a run did at one moment: a meta-step, a validation or a note, with its figures."""

    kind: str
    meta_step: int
    values: Mapping[str, float] = field(default_factory=dict)
    message: str = ""
    time: float = 0.0


@dataclass(frozen=True)
class Standing:
    """Where a run stands. ``phase``: starting, training, paused, finishing (the loop is over). ``asked`` and ``there``: workers
    by role. ``commands``: the newest ones obeyed, as their log has them. ``waiting``: those for the next meta-step."""

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


class Feed(Protocol):
    """What one watcher hasn't seen yet. Bounded: of a reader that is too slow the oldest are dropped, and training never waits."""

    dropped: int

    def next(self, timeout: float) -> list[Sight]:
        """What came since the last call; empty after ``timeout`` seconds without any. Raises ``EOFError`` when the run is over."""
        ...


class Steerable(Protocol):
    """A run that obeys commands. Every method may be called from any thread and none holds training up."""

    def submit(self, command: Command, timeout: float) -> Answer:
        """Hand a command over and wait for at most ``timeout`` seconds until it takes effect, at the next meta-step.

        Raises ``RefusedError`` or ``ConfigError`` with the reason where it is not obeyed.
        """
        ...

    def standing(self) -> Standing: ...

    def watch(self) -> AbstractContextManager[Feed]: ...
