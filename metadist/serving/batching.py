"""Dynamic batching: requests that could be computed together wait for each other, but never longer than a bound."""

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
"""(key, items of that key) → a result per item; an Exception among the results is that item's own."""


class _Waiting(NamedTuple):
    item: Any
    future: Future[Any]
    since: float


@dataclass
class Counts:
    batches: int = 0
    items: int = 0
    largest: int = 0
    milliseconds: deque[float] = field(default_factory=lambda: deque(maxlen=1024))


class Batcher:
    """One thread computes; items of one key form a batch of ``largest`` at most. The oldest item's group goes first.

    A group waits up to ``patience`` seconds to fill up, and only where the last batch had company: a lone caller, who sends the
    next request after the answer, never waits.
    """

    def __init__(self, compute: Compute, *, largest: int = 64, patience: float = 0.002) -> None:
        self._compute, self.largest, self.patience = compute, largest, patience
        self._groups: dict[Hashable, deque[_Waiting]] = {}
        self._condition, self._closed, self._company = threading.Condition(), False, False
        self.counts = Counts()
        self._thread = threading.Thread(target=self._run, name="batcher", daemon=True)
        self._thread.start()

    def submit(self, key: Hashable, item: Any) -> Future[Any]:
        """A future that ``cancel`` takes out of the queue again, as long as it waits there."""
        future: Future[Any] = Future()
        with self._condition:
            if self._closed:
                raise RuntimeError("the batcher is closed")
            self._groups.setdefault(key, deque()).append(_Waiting(item, future, time.monotonic()))
            self._condition.notify()
        return future

    def close(self) -> None:
        """What waits is cancelled, what computes ends first."""
        with self._condition:
            self._closed = True
            for group in self._groups.values():
                for waiting in group:
                    waiting.future.cancel()
            self._groups.clear()
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
                if not self._groups:
                    self._condition.wait()
                    continue
                key, group = min(self._groups.items(), key=lambda kv: kv[1][0].since)
                left = group[0].since + self.patience - time.monotonic()
                if self._company and len(group) < self.largest and left > 0:
                    self._condition.wait(left)
                    continue
                taken = [group.popleft() for _ in range(min(len(group), self.largest))]
                if not group:
                    del self._groups[key]
                self._company = len(taken) > 1 or bool(self._groups)
                return key, taken

    def _answer(self, key: Any, running: list[_Waiting]) -> None:
        try:
            results: Sequence[Any] = self._compute(key, [w.item for w in running])
        except Exception as error:
            results = [error] * len(running)
        now = time.monotonic()
        counts = self.counts
        counts.batches, counts.items, counts.largest = (
            counts.batches + 1,
            counts.items + len(running),
            max(counts.largest, len(running)),
        )
        for waiting, result in zip(running, results, strict=True):
            counts.milliseconds.append((now - waiting.since) * 1000)
            if isinstance(result, Exception):
                waiting.future.set_exception(result)
            else:
                waiting.future.set_result(result)
