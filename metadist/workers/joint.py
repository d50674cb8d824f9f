"""Two executors as one: the driver's own workers (Ray actors or this process) and remote ones serve one scheduler."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Collection
from typing import Any

from metadist.core.round import Event, Failed, Finished, HasEngine, Shard
from metadist.core.state import State
from metadist.workers.kept_outputs import KeepingExecutor
from metadist.workers.numerics import Numerics
from metadist.workers.remote.executor import RemoteExecutor

#: seconds to wait for one executor before looking at the other, while shards are in progress in both
SWITCH_SECONDS = 0.01

Side = KeepingExecutor[Any, Any]


class JointExecutor:
    """Give each shard to ``own`` workers or to ``remote`` ones.

    A shard goes to the side that serves its role and has the most room per worker. The side that holds more of the
    outputs that the shard needs goes first. A shard that failed or was lost goes to the other side where that has
    room. Kept outputs stay on the side that made them until a shard on the other side needs one; then they pass
    through the driver: remote ones into Ray's object store, Ray's to a remote worker while its lease is sent.
    ``roles`` are those that ``own`` serves.
    """

    def __init__(self, own: Side, remote: RemoteExecutor, roles: Collection[str], numerics: Numerics) -> None:
        self._own, self._remote = own, remote
        self._roles, self._numerics = roles, numerics
        #: the side of each attempt in progress
        self._asked: dict[tuple[Shard, int], Side] = {}
        #: of this meta-step: the side that failed last at a shard
        self._failed: dict[Shard, Side] = {}
        self.plan: HasEngine | None = own.plan
        #: not where this process computes: it receives no results meanwhile
        self.blocks = own.blocks

    def _serving(self, role: str) -> list[Side]:
        return [*([self._own] if role in self._roles else []), self._remote]

    def publish(self, meta_step: int, round: int, state: State) -> int:
        if round == 0:
            self._failed.clear()
        return self._own.publish(meta_step, round, state) + self._remote.publish(meta_step, round, state)

    def release(self, meta_step: int) -> None:
        self._own.release(meta_step)
        self._remote.release(meta_step)

    def capacity(self, role: str) -> int:
        return sum(max(0, side.capacity(role)) for side in self._serving(role))

    def near(self, shard: Shard) -> bool:
        return any(side.near(shard) for side in self._serving(shard.role))

    def submit(self, shard: Shard, attempt: int) -> None:
        room = {e: e.capacity(shard.role) / self._count(e, shard.role) for e in self._serving(shard.role)}
        chosen = max(
            room, key=lambda e: (room[e] > 0, self._failed.get(shard) is not e, -len(e.lacking(shard)), room[e])
        )
        for key in chosen.lacking(shard):
            for other in (self._own, self._remote):
                found = None if other is chosen else other.output(key)
                if found is not None:
                    # Where the worker that holds an output has died, the chosen side reports that it is missing.
                    with contextlib.suppress(LookupError):
                        chosen.adopt(*found)
        self._asked[shard, attempt] = chosen
        chosen.submit(shard, attempt)  # reports the outputs that are still missing

    @staticmethod
    def _count(side: Side, role: str) -> int:
        """Return how many workers serve ``role``. This process counts as one for every role that it serves."""
        return max(1, sum(about["role"] == role for about in side.workers().values()))

    def cancel(self, shard: Shard, attempt: int) -> None:
        side = self._asked.pop((shard, attempt), None)
        if side is not None:
            side.cancel(shard, attempt)

    def wait(self, timeout: float) -> list[Event]:
        """Return the events of both sides. While both compute, they are polled in turn: neither waits for the other."""
        deadline = time.monotonic() + timeout
        while True:
            own_busy = any(side is self._own for side in self._asked.values())
            left = max(0.0, deadline - time.monotonic())
            events = self._remote.wait(0.0 if own_busy else min(left, 0.25))
            if not events:
                events = self._own.wait(min(left, SWITCH_SECONDS if self._remote.busy else 0.25) if own_busy else 0.0)
            if events or time.monotonic() >= deadline:
                return [self._noted(event) for event in events]

    def _noted(self, event: Event) -> Event:
        side = self._asked.pop((event.shard, event.attempt), None)
        if isinstance(event, Finished) and event.shard.keeps:
            for each in (self._own, self._remote):
                each.hold(event.shard)
        if isinstance(event, Failed) and side is not None and event.kind != "missing":
            self._failed.update(dict.fromkeys(event.shard.each(), side))
        return event

    def cannot_resize(self, role: str, count: int) -> str | None:
        return (self._own if role in self._roles else self._remote).cannot_resize(role, count)

    def resize(self, role: str, count: int) -> None:
        """Resize the driver's own workers; remote workers are started and ended on their machines."""
        self._own.resize(role, count)

    def shortage(self) -> str:
        return f"{self._own.shortage()}; {self._remote.shortage()}"

    def workers(self) -> dict[str, dict[str, Any]]:
        return self._numerics.of_run({**self._own.workers(), **self._remote.workers()})

    def kill_busy(self) -> str | None:
        return self._own.kill_busy()

    def close(self) -> None:
        """Close the driver's own workers. The remote executor is closed by its creator."""
        self._own.close()
