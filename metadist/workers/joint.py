"""Two executors as one: workers of the cluster (or this process) and workers from outside serve the same scheduler."""

from __future__ import annotations

import time
from collections.abc import Collection
from typing import Any, Protocol

from metadist.core.round import Event, Executor, Failed, Finished, OutputKey, Shard
from metadist.core.state import State
from metadist.workers.numerics import Numerics
from metadist.workers.remote.executor import OutsideExecutor
from metadist.workers.remote.messages import Content

#: seconds between looks at one executor while the other one waits, where shards are under way in both
GLANCE = 0.01


class Sharing(Executor, Protocol):
    """An executor that can hand its kept outputs to another one, and take that one's."""

    def lacking(self, shard: Shard) -> tuple[OutputKey, ...]: ...

    def hold(self, round: int) -> None:
        """Keep this round's θ, since outputs come from it, though they lie elsewhere."""
        ...

    def output(self, key: OutputKey) -> tuple[Shard, Content] | None: ...

    def adopt(self, shard: Shard, content: Content) -> None: ...


class JointExecutor:
    """``inside`` (Ray actors, or this process) beside ``outside``. A shard goes to whoever serves its role, has what it needs and
    has the most room per worker; one that failed or was lost goes to the other side if that has room.

    Kept outputs stay on the side that made them until a shard on the other side needs one; then they pass through the driver: from
    outside into Ray's object store, from Ray to an outside worker as they are sent. ``roles`` are those that ``inside`` serves.
    """

    def __init__(self, inside: Any, outside: OutsideExecutor, roles: Collection[str], numerics: Numerics) -> None:
        self._inside: Sharing = inside
        self._outside = outside
        self._roles, self._numerics = roles, numerics
        #: who computes what
        self._asked: dict[tuple[Shard, int], Sharing] = {}
        #: of this meta-step: who failed last
        self._failed: dict[Shard, Sharing] = {}
        self.plan = inside.plan
        #: not where this process computes, which hears nobody meanwhile
        self.blocks = inside.blocks

    def _serving(self, role: str) -> list[Sharing]:
        return [*([self._inside] if role in self._roles else []), self._outside]

    def publish(self, meta_step: int, round: int, state: State) -> int:
        if round == 0:
            self._failed.clear()
        return self._inside.publish(meta_step, round, state) + self._outside.publish(meta_step, round, state)

    def capacity(self, role: str) -> int:
        return sum(max(0, e.capacity(role)) for e in self._serving(role))

    def submit(self, shard: Shard, attempt: int) -> None:
        room = {e: e.capacity(shard.role) / self._count(e, shard.role) for e in self._serving(shard.role)}
        chosen = max(
            room, key=lambda e: (room[e] > 0, self._failed.get(shard) is not e, -len(e.lacking(shard)), room[e])
        )
        for key in chosen.lacking(shard):
            for other in (self._inside, self._outside):
                found = None if other is chosen else other.output(key)
                if found is not None:
                    chosen.adopt(*found)
        self._asked[shard, attempt] = chosen
        chosen.submit(shard, attempt)  # who reports what is still missing

    @staticmethod
    def _count(executor: Sharing, role: str) -> int:
        """This process serves roles that it doesn't call itself by."""
        return max(1, sum(about["role"] == role for about in executor.workers().values()))

    def cancel(self, shard: Shard, attempt: int) -> None:
        executor = self._asked.pop((shard, attempt), None)
        if executor is not None:
            executor.cancel(shard, attempt)

    def wait(self, timeout: float) -> list[Event]:
        """Neither side keeps the other one waiting: while both compute, each is looked at in turn."""
        deadline = time.monotonic() + timeout
        while True:
            inside_busy = any(e is self._inside for e in self._asked.values())
            left = max(0.0, deadline - time.monotonic())
            events = self._outside.wait(0.0 if inside_busy else min(left, 0.25))
            if not events:
                events = self._inside.wait(min(left, GLANCE if self._outside.busy else 0.25) if inside_busy else 0.0)
            if events or time.monotonic() >= deadline:
                return [self._noted(event) for event in events]

    def _noted(self, event: Event) -> Event:
        executor = self._asked.pop((event.shard, event.attempt), None)
        if isinstance(event, Finished) and event.shard.keeps:
            for each in (self._inside, self._outside):
                each.hold(event.shard.round)
        if isinstance(event, Failed) and executor is not None and event.kind != "missing":
            self._failed.update(dict.fromkeys(event.shard.each(), executor))
        return event

    def cannot_resize(self, role: str, count: int) -> str | None:
        return (self._inside if role in self._roles else self._outside).cannot_resize(role, count)

    def resize(self, role: str, count: int) -> None:
        """Workers from outside come and go by themselves."""
        self._inside.resize(role, count)

    def shortage(self) -> str:
        return f"{self._inside.shortage()}; {self._outside.shortage()}"

    def workers(self) -> dict[str, dict[str, Any]]:
        return self._numerics.of_run({**self._inside.workers(), **self._outside.workers()})

    def kill_busy(self) -> str | None:
        return self._inside.kill_busy()

    def close(self) -> None:
        """``outside`` is whoever's who opened its desk."""
        self._inside.close()
