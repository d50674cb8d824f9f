"""The exceptions of the package, and helpers for their messages."""

from __future__ import annotations

import difflib
import math
from collections.abc import Iterable


class MetadistError(Exception):
    """An error that the user can fix (exit code 2). The message names the key, the value, the expected values and the
    remedy."""


class ConfigError(MetadistError):
    """The configuration is unreadable, has an unknown key, a wrong type or an impossible combination."""


class DataError(MetadistError):
    """A data set is missing, incomplete, or does not match its hash."""


class CheckpointError(MetadistError):
    """A checkpoint is missing or damaged, or belongs to another model or format."""


class WorkerError(MetadistError):
    """No worker is available, or a shard cannot be computed."""


class CompilerError(WorkerError):
    """A worker cannot compile shards: no compiler, one that does not work, or a wrong graph. ``reason`` says which."""

    def __init__(self, message: str, reason: str = "") -> None:
        super().__init__(message)
        self.reason = reason

    def __reduce__(self) -> tuple[type[CompilerError], tuple[str, str]]:
        return (type(self), (str(self), self.reason))


class NonFiniteError(MetadistError):
    """A task produced NaN or Inf. ``tasks`` are the indices of these tasks in the meta-batch."""

    def __init__(self, message: str, tasks: tuple[int, ...] = ()) -> None:
        super().__init__(message)
        self.tasks = tasks

    def __reduce__(self) -> tuple[type[NonFiniteError], tuple[str, tuple[int, ...]]]:
        # Exception's own __reduce__ would lose ``tasks`` when the error crosses a process boundary.
        return (type(self), (str(self), self.tasks))


def one_of(key: str, value: object, allowed: Iterable[str]) -> None:
    """Raise ConfigError unless ``value`` is in ``allowed``. For Python callers: YAML is also checked by type."""
    if value not in (choices := tuple(allowed)):
        raise ConfigError(f"{key}: '{value}' is not one of {', '.join(choices)}{nearest(str(value), choices)}")


def at_least(lowest: int, **values: float | None) -> None:
    """Raise ConfigError where a value, named by its key, is below ``lowest``. None is allowed."""
    for key, value in values.items():
        if value is not None and value < lowest:
            raise ConfigError(f"{key}: {value} is below {lowest}")


def within(low: float, below: float, **values: float | None) -> None:
    """Raise ConfigError where a value, named by its key, is NaN or not in [``low``, ``below``). None is allowed."""
    for key, value in values.items():
        if value is not None and not low <= value < below:
            expected = (
                f"a finite number of {low:g} or more" if below == math.inf else f"a number in [{low:g}, {below:g})"
            )
            raise ConfigError(f"{key}: {value} is not {expected}")


def nearest(word: str, allowed: Iterable[str]) -> str:
    """Return ``"; did you mean 'x'?"`` for the most similar word in ``allowed``, or an empty string."""
    match = difflib.get_close_matches(word, list(allowed), n=1, cutoff=0.6)
    return f"; did you mean '{match[0]}'?" if match else ""


def first_line(error: Exception) -> str:
    """Return the type and the first line of the message of ``error``."""
    return f"{type(error).__name__}: {error}".partition("\n")[0]
