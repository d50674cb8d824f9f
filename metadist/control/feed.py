"""What can be seen of a run from outside: the newest figures, and feeds for those who watch. Nobody who looks holds it up."""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from typing import Any

from metadist.control.commands import Sight
from metadist.core.round import Report
from metadist.training.observers import Observer

#: what a slow watcher may have unread
KEPT = 256


class _Feed:
    """One watcher's unread sights; the oldest go where it is too slow."""

    def __init__(self, first: Sight | None) -> None:
        self._unread: deque[Sight] = deque([first] if first else [], maxlen=KEPT)
        self._changed, self._over = threading.Condition(), False
        self.dropped = 0

    def put(self, sight: Sight) -> None:
        with self._changed:
            self.dropped += len(self._unread) == KEPT
            self._unread.append(sight)
            self._changed.notify()

    def end(self) -> None:
        with self._changed:
            self._over = True
            self._changed.notify()

    def next(self, timeout: float) -> list[Sight]:
        with self._changed:
            if not self._unread and not self._over:
                self._changed.wait(timeout)
            if self._over and not self._unread:
                raise EOFError
            taken = list(self._unread)
            self._unread.clear()
            return taken


class Board(Observer):
    """A display (of ``metadist.training.loop``) that shows everything to another one and keeps what is newest."""

    def __init__(self, display: Observer) -> None:
        self._display = display
        self._lock = threading.Lock()
        self._feeds: list[_Feed] = []
        self.newest: Sight | None = None
        self.validation: Mapping[str, float] = {}
        self.tasks_per_second = 0.0

    def step(self, meta_step: int, report: Report, tasks_per_second: float) -> None:
        self._display.step(meta_step, report, tasks_per_second)
        self.tasks_per_second = tasks_per_second
        self._show(Sight("step", meta_step, {**report, "tasks_per_second": tasks_per_second}, time=time.time()))

    def evaluated(self, meta_step: int, evaluation: Any) -> None:
        self._display.evaluated(meta_step, evaluation)
        self.validation = {"meta_step": meta_step, evaluation.metric: evaluation.score, "ci95": evaluation.score_ci95}
        values = {k: v for k, v in self.validation.items() if k != "meta_step"}
        self._show(Sight("validation", meta_step, values, time=time.time()))

    def note(self, message: str) -> None:
        self._display.note(message)
        self._show(Sight("note", self.newest.meta_step if self.newest else 0, message=message, time=time.time()))

    def _show(self, sight: Sight) -> None:
        if sight.kind == "step":
            self.newest = sight
        with self._lock:
            for feed in self._feeds:
                feed.put(sight)

    @contextmanager
    def watch(self) -> Iterator[_Feed]:
        feed = _Feed(self.newest)
        with self._lock:
            self._feeds.append(feed)
        try:
            yield feed
        finally:
            with self._lock, suppress(ValueError):
                self._feeds.remove(feed)

    def close(self) -> None:
        """The run is over: watchers get what they haven't read, then the end."""
        with self._lock:
            for feed in self._feeds:
                feed.end()
            self._feeds.clear()
