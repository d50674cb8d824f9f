"""Caches of adapted parameters under random handles, with a budget of bytes and eviction of the least recently used."""

from __future__ import annotations

import logging
import secrets
import threading
from collections import OrderedDict
from collections.abc import Callable
from typing import Any, Generic, NamedTuple, TypeVar

T = TypeVar("T")
log = logging.getLogger(__name__)


class _Item(NamedTuple, Generic[T]):
    value: T
    bytes: int


class HandleCache(Generic[T]):
    """Values under handles. A handle authorises its use: handles are unguessable, and no method lists them."""

    #: whether the first eviction logs a warning
    warns = True

    def __init__(self, budget: int) -> None:
        self.budget, self.bytes, self.evictions = budget, 0, 0
        self._items: OrderedDict[str, _Item[T]] = OrderedDict()
        self._lock = threading.Lock()

    def __len__(self) -> int:
        return len(self._items)

    def put(self, value: T, bytes: int, handle: str | None = None) -> str | None:
        """Store a value and return its handle (by default a new one), or None if the value exceeds the budget."""
        if bytes > self.budget:
            return None
        handle = handle or secrets.token_urlsafe(18)
        with self._lock:
            first = self.evictions == 0
            self.bytes -= self._items.pop(handle, _Item(None, 0)).bytes
            self._items[handle] = _Item(value, bytes)
            self.bytes += bytes
            while self.bytes > self.budget:
                _, old = self._items.popitem(last=False)
                self.bytes -= old.bytes
                self.evictions += 1
        if first and self.evictions and self.warns:
            log.warning(
                "the budget of %.1f MiB for adapted parameters is full: the least recently used are evicted from now "
                "on; raise it by --budget-mib",
                self.budget / 2**20,
            )
        return handle

    def get(self, handle: str) -> T | None:
        """Return the value and mark it as used, or return None for an unknown handle."""
        with self._lock:
            item = self._items.get(handle)
            if item is None:
                return None
            self._items.move_to_end(handle)
            return item.value

    def forget(self, handle: str) -> bool:
        """Remove a value; return whether the handle was valid."""
        with self._lock:
            item = self._items.pop(handle, None)
            self.bytes -= item.bytes if item else 0
            return item is not None

    def counts(self) -> dict[str, int]:
        """Return the numbers of handles, bytes and evictions, and the budget."""
        return {
            "handles": len(self),
            "handle_bytes": self.bytes,
            "budget_bytes": self.budget,
            "evictions": self.evictions,
        }


class SharedCache(HandleCache[Any]):
    """The cache that several replicas share. It holds packed values and decides which handles are evicted."""

    def fetch(self, handle: str, has_value: bool) -> tuple[bool, Any]:
        """Return whether the handle is valid, and its packed value unless the caller has the value."""
        value = self.get(handle)
        return value is not None, None if has_value else value


class ReplicaCache(HandleCache[T]):
    """The cache of one replica: unpacked copies of recently used values of the ``SharedCache``.

    ``call(method, *arguments)`` calls a method of the shared cache. Every access asks it whether the handle is valid.
    """

    warns = False

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
