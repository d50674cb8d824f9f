"""Publish the progress of a run to its display and to watchers in other processes. No watcher delays training."""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress

from metadist.control.commands import Snapshot, Subscription
from metadist.core.round import Report
from metadist.learners.evaluation import Evaluation
from metadist.training.observers import Observer

#: snapshots that a slow watcher may leave unread
QUEUE_LENGTH = 256


class _Queue:
    """The unread snapshots of one watcher; a full queue drops the oldest."""

    def __init__(self, first: Snapshot | None) -> None:
        self._unread: deque[Snapshot] = deque([first] if first else [], maxlen=QUEUE_LENGTH)
        self._changed, self._ended = threading.Condition(), False
        self.dropped = 0

    def put(self, snapshot: Snapshot) -> None:
        with self._changed:
            self.dropped += len(self._unread) == QUEUE_LENGTH
            self._unread.append(snapshot)
            self._changed.notify()

    def end(self) -> None:
        with self._changed:
            self._ended = True
            self._changed.notify()

    def next(self, timeout: float) -> list[Snapshot]:
        with self._changed:
            if not self._unread and not self._ended:
                self._changed.wait(timeout)
            if self._ended and not self._unread:
                raise EOFError
            taken = list(self._unread)
            self._unread.clear()
            return taken


class Feed(Observer):
    """Forwards every event to ``display`` and to all watchers, and stores the newest figures."""

    def __init__(self, display: Observer) -> None:
        self._display = display
        self._lock = threading.Lock()
        self._queues: list[_Queue] = []
        self.newest: Snapshot | None = None
        self.validation: Mapping[str, float] = {}
        self.tasks_per_second = 0.0

    def step(self, meta_step: int, report: Report, tasks_per_second: float) -> None:
        self._display.step(meta_step, report, tasks_per_second)
        self.tasks_per_second = tasks_per_second
        self._publish(Snapshot("step", meta_step, {**report, "tasks_per_second": tasks_per_second}, time=time.time()))

    def evaluated(self, meta_step: int, evaluation: Evaluation) -> None:
        self._display.evaluated(meta_step, evaluation)
        self.validation = {"meta_step": meta_step, evaluation.metric: evaluation.score, "ci95": evaluation.score_ci95}
        if evaluation.left_out:
            self.validation = {**self.validation, "left_out": evaluation.left_out}
        values = {k: v for k, v in self.validation.items() if k != "meta_step"}
        self._publish(Snapshot("validation", meta_step, values, time=time.time()))

    def testing(self, tasks: int) -> None:
        self._display.testing(tasks)

    def note(self, message: str) -> None:
        self._display.note(message)
        meta_step = self.newest.meta_step if self.newest else 0
        self._publish(Snapshot("note", meta_step, message=message, time=time.time()))

    def _publish(self, snapshot: Snapshot) -> None:
        if snapshot.kind == "step":
            self.newest = snapshot
        with self._lock:
            for queue in self._queues:
                queue.put(snapshot)

    @contextmanager
    def watch(self) -> Iterator[Subscription]:
        """Subscribe to all snapshots from the newest on, for the duration of the block."""
        queue = _Queue(self.newest)
        with self._lock:
            self._queues.append(queue)
        try:
            yield queue
        finally:
            with self._lock, suppress(ValueError):
                self._queues.remove(queue)

    def close(self) -> None:
        """End all subscriptions: watchers receive their unread snapshots, then ``EOFError``."""
        with self._lock:
            for queue in self._queues:
                queue.end()
            self._queues.clear()
