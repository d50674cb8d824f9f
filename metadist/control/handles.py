"""Adapted parameters under handles, the least recently used ones evicted when a byte budget is spent."""

from __future__ import annotations

import logging
import secrets
import threading
from collections import OrderedDict
from typing import Generic, NamedTuple, TypeVar

T = TypeVar("T")
log = logging.getLogger(__name__)


class Kept(NamedTuple, Generic[T]):
    value: T
    bytes: int


class Handles(Generic[T]):
    """Who knows a handle may use it: handles can't be guessed, and nothing lists them."""

    def __init__(self, budget: int) -> None:
        self.budget, self.bytes, self.evictions = budget, 0, 0
        self._kept: OrderedDict[str, Kept[T]] = OrderedDict()
        self._lock = threading.Lock()

    def __len__(self) -> int:
        return len(self._kept)

    def put(self, value: T, bytes: int) -> str | None:
        """A new handle; None where the value alone exceeds the budget."""
        if bytes > self.budget:
            return None
        handle = secrets.token_urlsafe(18)
        with self._lock:
            first = self.evictions == 0
            self._kept[handle] = Kept(value, bytes)
            self.bytes += bytes
            while self.bytes > self.budget:
                _, old = self._kept.popitem(last=False)
                self.bytes -= old.bytes
                self.evictions += 1
        if first and self.evictions:
            log.warning("the budget of %.1f MiB for adapted parameters is spent: the least recently used are evicted from now on; "
                        "--budget-mib raises it", self.budget / 2**20)  # fmt: skip
        return handle

    def get(self, handle: str) -> T | None:
        with self._lock:
            kept = self._kept.get(handle)
            if kept is None:
                return None
            self._kept.move_to_end(handle)
            return kept.value

    def forget(self, handle: str) -> bool:
        with self._lock:
            kept = self._kept.pop(handle, None)
            self.bytes -= kept.bytes if kept else 0
            return kept is not None
