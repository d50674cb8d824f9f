"""Sizes of tasks in a config: a number, or a range that each group of tasks draws a number from."""

from __future__ import annotations

from typing import Union

Size = Union[int, tuple[int, int]]
"""A number, or the first and the last number of a range: 5 or [5, 20]."""


def bounds(size: Size) -> tuple[int, int]:
    """Return the smallest and the largest number of ``size``."""
    return size if isinstance(size, tuple) else (size, size)


def shown_size(size: Size | None) -> str:
    """Return ``size`` as a config writes it."""
    return str(list(size) if isinstance(size, tuple) else size)
