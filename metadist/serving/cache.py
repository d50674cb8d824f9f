"""Adapted parameters under handles, the least recently used ones evicted when a byte budget is spent."""

from __future__ import annotations

import logging
import secrets
import threading
from collections import OrderedDict
from collections.abc import Callable
from typing import Any, Generic, NamedTuple, TypeVar

T = TypeVar("T")
log = logging.getLogger(__name__)


class Kept(NamedTuple, Generic[T]):
    value: T
    bytes: int


class Handles(Generic[T]):
    """Who knows a handle may use it: handles can't be guessed, and nothing lists them."""

    #: whether the first eviction is worth a warning
    tells = True

    def __init__(self, budget: int) -> None:
        self.budget, self.bytes, self.evictions = budget, 0, 0
        self._kept: OrderedDict[str, Kept[T]] = OrderedDict()
        self._lock = threading.Lock()

    def __len__(self) -> int:
        return len(self._kept)

    def put(self, value: T, bytes: int, handle: str | None = None) -> str | None:
        """Its handle, a new one by default; None where the value alone exceeds the budget."""
        if bytes > self.budget:
            return None
        handle = handle or secrets.token_urlsafe(18)
        with self._lock:
            first = self.evictions == 0
            self.bytes -= self._kept.pop(handle, Kept(None, 0)).bytes
            self._kept[handle] = Kept(value, bytes)
            self.bytes += bytes
            while self.bytes > self.budget:
                _, old = self._kept.popitem(last=False)
                self.bytes -= old.bytes
                self.evictions += 1
        if first and self.evictions and self.tells:
            log.warning(
                "the budget of %.1f MiB for adapted parameters is spent: the least recently used are evicted from now on; "
                "--budget-mib raises it",
                self.budget / 2**20,
            )
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

    def counts(self) -> dict[str, int]:
        return {
            "handles": len(self),
            "handle_bytes": self.bytes,
            "budget_bytes": self.budget,
            "evictions": self.evictions,
        }


class Shelf(Handles[Any]):
    """Handles that several replicas share: it holds them packed, and says who is evicted."""

    def fetch(self, handle: str, has_it: bool) -> tuple[bool, Any]:
        """Whether the handle is valid; and what it stands for, unless the caller has it."""
        value = self.get(handle)
        return value is not None, None if has_it else value


class SharedHandles(Handles[T]):
    """One replica's: the shelf decides, and what was used here lately is here unpacked.

    ``call(method, *arguments)`` reaches the shelf.
    """

    tells = False

    def __init__(
        self, budget: int, call: Callable[..., Any], pack: Callable[[T], Any], unpack: Callable[[Any], tuple[T, int]]
    ) -> None:
        super().__init__(budget)
        self._call, self._pack, self._unpack = call, pack, unpack

    def put(self, value: T, bytes: int, handle: str | None = None) -> str | None:
        handle = self._call("put", self._pack(value), bytes)
        return None if handle is None else super().put(value, bytes, handle)

    def get(self, handle: str) -> T | None:
        value = super().get(handle)
        valid, packed = self._call("fetch", handle, value is not None)
        if not valid:
            super().forget(handle)
            return None
        if value is not None:
            return value
        value, bytes = self._unpack(packed)
        super().put(value, bytes, handle)
        return value

    def forget(self, handle: str) -> bool:
        super().forget(handle)
        return self._call("forget", handle)

    def counts(self) -> dict[str, int]:
        return self._call("counts")
