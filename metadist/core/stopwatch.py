"""Where a worker's seconds go, by name, without every function between handing a clock on."""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar

_running: ContextVar[defaultdict[str, float] | None] = ContextVar("stopwatch", default=None)


@contextmanager
def timing() -> Iterator[defaultdict[str, float]]:
    """Name → seconds that ``spent`` measures meanwhile. On a GPU: of the calls, which may return before the work is done."""
    seconds: defaultdict[str, float] = defaultdict(float)
    token = _running.set(seconds)
    try:
        yield seconds
    finally:
        _running.reset(token)


@contextmanager
def spent(name: str) -> Iterator[None]:
    """The seconds of this block are ``name``'s; nothing where nobody is timing."""
    seconds = _running.get()
    if seconds is None:
        yield
        return
    began = time.perf_counter()
    try:
        yield
    finally:
        seconds[name] += time.perf_counter() - began
