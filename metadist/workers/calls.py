"""One call of an executor to a worker in another process."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from metadist.core.round import OutputKey, Shard

Settled = list[tuple[tuple[Shard, int], bool]]
"""(shard, attempt) of earlier contributions, and whether they were summed."""
Content = Callable[[], Sequence[Any]]
"""Returns a frame in parts. The content may have to be fetched; the call raises where that fails."""


@dataclass(frozen=True)
class Call:
    """One attempt at a shard. ``version`` names θ; ``token`` names this call and the output that the shard keeps.

    ``needs``: the shards whose outputs the shard needs, each with the token of the call that made the output.
    ``since``: the oldest meta-step with outputs that a worker must still hold.
    ``settled``: whether earlier contributions of the worker were summed, where contributions travel in half
    precision; else None.
    """

    shard: Shard
    attempt: int
    version: int
    token: int
    needs: tuple[tuple[Shard, int], ...] = ()
    settled: Settled | None = None
    since: int = 0


class MissingError(Exception):
    """An output that a shard needs did not arrive whole. The outputs ``keys`` must be computed again."""

    def __init__(self, message: str, keys: tuple[OutputKey, ...] = ()) -> None:
        super().__init__(message)
        self.keys = keys

    def __reduce__(self) -> Any:
        return type(self), (str(self), self.keys)
