"""Compute simultaneous requests together. A request waits for others only up to a time limit."""

from __future__ import annotations

import logging
import threading
import time
from collections import deque
from collections.abc import Callable, Hashable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field
from typing import Any, NamedTuple

log = logging.getLogger(__name__)

Compute = Callable[[Any, Sequence[Any]], Sequence[Any]]
"""(key, items of that key) → one result for each item. An ``Exception`` among the results fails only its own item."""


class _Waiting(NamedTuple):
    item: Any
    future: Future[Any]
    since: float


@dataclass
class Counts:
    """Statistics of a batcher; ``milliseconds`` from submission to result, of the last 1,024 items."""

    batches: int = 0
    items: int = 0
    largest: int = 0
    milliseconds: deque[float] = field(default_factory=lambda: deque(maxlen=1024))


class Batcher:
    """Computes in one thread. Items of one key form a batch of at most ``largest``; the key of the oldest item is next.

    A batch waits up to ``max_wait`` seconds for more items, and only if there were other items at the last batch: a
    single caller, who sends the next request after the answer, never waits.
    """

    def __init__(self, compute: Compute, *, largest: int = 64, max_wait: float = 0.002) -> None:
        self._compute, self.largest, self.max_wait = compute, largest, max_wait
        self._queues: dict[Hashable, deque[_Waiting]] = {}
        self._condition, self._closed, self._had_others = threading.Condition(), False, False
        self.counts = Counts()
        self._thread = threading.Thread(target=self._run, name="batcher", daemon=True)
        self._thread.start()

    def submit(self, key: Hashable, item: Any) -> Future[Any]:
        """Return the future of the item's result. ``Future.cancel`` removes an item that still waits."""
        future: Future[Any] = Future()
        with self._condition:
            if self._closed:
                raise RuntimeError("the batcher is closed")
            self._queues.setdefault(key, deque()).append(_Waiting(item, future, time.monotonic()))
            self._condition.notify()
        return future

    def close(self) -> None:
        """Cancel the waiting items, and wait for the running batch."""
        with self._condition:
            self._closed = True
            for queue in self._queues.values():
                for waiting in queue:
                    waiting.future.cancel()
            self._queues.clear()
            self._condition.notify()
        self._thread.join()

    def _run(self) -> None:
        while (taken := self._take()) is not None:
            key, waiting = taken
            running = [w for w in waiting if w.future.set_running_or_notify_cancel()]
            if running:
                self._answer(key, running)

    def _take(self) -> tuple[Any, list[_Waiting]] | None:
        with self._condition:
            while True:
                if self._closed:
                    return None
                if not self._queues:
                    self._condition.wait()
                    continue
                key, queue = min(self._queues.items(), key=lambda kv: kv[1][0].since)
                left = queue[0].since + self.max_wait - time.monotonic()
                if self._had_others and len(queue) < self.largest and left > 0:
                    self._condition.wait(left)
                    continue
                taken = [queue.popleft() for _ in range(min(len(queue), self.largest))]
                if not queue:
                    del self._queues[key]
                self._had_others = len(taken) > 1 or bool(self._queues)
                return key, taken

    def _answer(self, key: Any, running: list[_Waiting]) -> None:
        try:
            results: Sequence[Any] = self._compute(key, [w.item for w in running])
        except Exception as error:
            results = [error] * len(running)
        now = time.monotonic()
        counts = self.counts
        counts.batches += 1
        counts.items += len(running)
        counts.largest = max(counts.largest, len(running))
        for waiting, result in zip(running, results, strict=True):
            counts.milliseconds.append((now - waiting.since) * 1000)
            if isinstance(result, Exception):
                waiting.future.set_exception(result)
            else:
                waiting.future.set_result(result)
