"""Sizes of tasks in a config: a number, or a range that each group of tasks draws a number from."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Union

import torch

from metadist.core.errors import ConfigError
from metadist.core.random import TaskKey, integers

Size = Union[int, tuple[int, int]]
"""A number, or the first and the last number of a range: 5 or [5, 20]."""


def bounds(size: Size) -> tuple[int, int]:
    """Return the smallest and the largest number of ``size``."""
    return size if isinstance(size, tuple) else (size, size)


def shown_size(size: Size | None) -> str:
    """Return ``size`` as a config writes it."""
    return str(list(size) if isinstance(size, tuple) else size)


def varies(*sizes: Size | None) -> bool:
    """Return whether one of ``sizes`` is a range."""
    return any(isinstance(size, tuple) for size in sizes)


def check_size(key: str, size: Size | None, least: int) -> None:
    """Raise ConfigError for a number below ``least``, or a range that begins above its end; ``key`` names it."""
    low, high = bounds(least if size is None else size)
    if low < least:
        raise ConfigError(f"{key} = {shown_size(size)}: must be at least {least}")
    if low > high:
        raise ConfigError(f"{key} = {shown_size(size)}: begins above its end; write [{high}, {low}]")


def drawn(keys: TaskKey, same_size: int, sizes: Sequence[Size]) -> list[int]:
    """Return the numbers that the tasks of ``keys``, of one group of ``same_size`` tasks, have within ``sizes``."""
    if not varies(*sizes):
        return [bounds(size)[0] for size in sizes]
    (words,) = keys.group(same_size).to(torch.device("cpu")).words(sizes=len(sizes))
    first = words.reshape(-1, len(sizes))[0]
    limits = map(bounds, sizes)
    return [low + int(integers(word, high - low + 1)) for word, (low, high) in zip(first, limits)]
