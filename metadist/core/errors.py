"""Errors that are the user's to mend (one line, exit code 2) and errors that name a worker and a task."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class MetadistError(Exception):
    """Something the user can mend. The message names the key, the value, what was expected and what to do."""


class ConfigError(MetadistError):
    """The configuration is unreadable, has an unknown key, a wrong type or an impossible combination."""


class DataError(MetadistError):
    """A data set is missing, incomplete or not what its hash says."""


class CheckpointError(MetadistError):
    """A checkpoint is missing, damaged, or of another model or format."""


class WorkerError(MetadistError):
    """No workers are to be had, or a shard can't be computed."""


class NonFiniteError(MetadistError):
    """A task produced NaN or Inf. ``tasks`` are the indices of the offending tasks in the meta-batch."""

    def __init__(self, message: str, tasks: tuple[int, ...] = ()) -> None:
        super().__init__(message)
        self.tasks = tasks

    def __reduce__(self):  # keeps ``tasks`` when the error crosses a process boundary
        return (type(self), (str(self), self.tasks))


def one_of(key: str, value: object, allowed: Iterable[str]) -> None:
    """Raise ConfigError where ``value`` is none of ``allowed``: what YAML checks by type, for those who write Python."""
    if value not in (choices := tuple(allowed)):
        raise ConfigError(f"{key}: '{value}' is not one of {', '.join(choices)}{nearest(str(value), choices)}")


def at_least(lowest: int, **values: float | None) -> None:
    """Raise ConfigError where a value, named by its key, is below ``lowest``. None is allowed."""
    for key, value in values.items():
        if value is not None and value < lowest:
            raise ConfigError(f"{key}: {value} is below {lowest}")


def nearest(word: str, allowed: Iterable[str]) -> str:
    """``"; did you mean 'x'?"`` for the nearest spelling in ``allowed``, or an empty string."""
    match = difflib.get_close_matches(word, list(allowed), n=1, cutoff=0.6)
    return f"; did you mean '{match[0]}'?" if match else ""


def first_line(error: Exception) -> str:
    return f"{type(error).__name__}: {error}".partition("\n")[0]
