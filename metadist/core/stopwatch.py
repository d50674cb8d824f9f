"""Measure a worker's seconds by name, without a clock among the parameters of every function."""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar

_running: ContextVar[defaultdict[str, float] | None] = ContextVar("stopwatch", default=None)


@contextmanager
def timing() -> Iterator[defaultdict[str, float]]:
    """Collect the seconds that ``spent`` measures during this block: name → seconds.

    On a GPU they are the seconds of the calls, which can return before the work is done.
    """
    seconds: defaultdict[str, float] = defaultdict(float)
    token = _running.set(seconds)
    try:
        yield seconds
    finally:
        _running.reset(token)


@contextmanager
def spent(name: str) -> Iterator[None]:
    """Add the seconds of this block to ``name``; do nothing outside of ``timing``."""
    seconds = _running.get()
    if seconds is None:
        yield
        return
    began = time.perf_counter()
    try:
        yield
    finally:
        seconds[name] += time.perf_counter() - began
