"""An executor that fails on purpose: it wraps a real executor and disturbs chosen attempts.

The idea is that of torchft's tests, where an object around the real thing injects failures at chosen places.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

from metadist.core.round import Event, Executor, Failed, Finished, Result, Shard
from metadist.core.state import State

Where = Callable[[Shard], bool]


class Fault:
    """A disturbance of one attempt. The default methods disturb nothing."""

    def submit(self, executor: Executor, shard: Shard, attempt: int) -> Event | None:
        """Submit the attempt to ``executor``, or return the event that replaces the attempt."""
        executor.submit(shard, attempt)
        return None

    def receive(self, event: Event) -> tuple[Event, float]:
        """Return ``event`` as the scheduler shall see it, and the seconds to hold it back."""
        return event, 0.0


@dataclass(frozen=True)
class Lose(Fault):
    """The attempt reaches no worker; the scheduler hears that its worker was lost. ``guilty``: the shard is blamed."""

    guilty: bool = False

    def submit(self, executor: Executor, shard: Shard, attempt: int) -> Event | None:
        return Failed(shard, attempt, "faulty", "lost", "lost on purpose", guilty=self.guilty)


@dataclass(frozen=True)
class Kill(Fault):
    """A busy worker is killed right after the submission; ``killed`` receives its name (None where none was busy)."""

    killed: list[str | None] = field(default_factory=list)

    def submit(self, executor: Executor, shard: Shard, attempt: int) -> Event | None:
        executor.submit(shard, attempt)
        self.killed.append(executor.kill_busy())
        return None


@dataclass(frozen=True)
class Delay(Fault):
    """The result arrives ``seconds`` late."""

    seconds: float

    def receive(self, event: Event) -> tuple[Event, float]:
        return event, self.seconds


@dataclass(frozen=True)
class Corrupt(Fault):
    """The result arrives as ``change`` makes it."""

    change: Callable[[Result], Result]

    def receive(self, event: Event) -> tuple[Event, float]:
        return (replace(event, result=self.change(event.result)) if isinstance(event, Finished) else event), 0.0


@dataclass(frozen=True)
class Act(Fault):
    """``action(executor, shard)`` runs right after the submission. Its exceptions reach the scheduler's caller."""

    action: Callable[[Any, Shard], object]

    def submit(self, executor: Executor, shard: Shard, attempt: int) -> Event | None:
        executor.submit(shard, attempt)
        self.action(executor, shard)
        return None


@dataclass
class _Rule:
    where: Where
    fault: Fault
    #: how many more attempts it disturbs; None: all of them
    left: int | None


class FaultyExecutor:
    """Wrap ``executor``: all calls reach it, except for the attempts that ``fail_at`` disturbs.

    ``FaultyExecutor(executor).fail_at(lambda shard: shard.index == 2, Lose()).fail_at(…)``
    """

    def __init__(self, executor: Executor) -> None:
        self.inner = executor
        self.plan, self.blocks = executor.plan, executor.blocks
        self._rules: list[_Rule] = []
        self._disturbed: dict[tuple[Shard, int], Fault] = {}
        #: events with the time (of ``time.monotonic``) before which the scheduler does not see them
        self._held: list[tuple[float, Event]] = []

    def fail_at(self, where: Where, fault: Fault, times: int | None = 1) -> FaultyExecutor:
        """Disturb the next ``times`` attempts (None: all) at shards for which ``where`` holds; return this executor.

        Of several faults for a shard the first that is not used up disturbs an attempt.
        """
        self._rules.append(_Rule(where, fault, times))
        return self

    def _fault_for(self, shard: Shard) -> Fault | None:
        for rule in self._rules:
            if rule.left != 0 and rule.where(shard):
                rule.left = None if rule.left is None else rule.left - 1
                return rule.fault
        return None

    # The protocol -----------------------------------------------------------------------------------------------------

    def publish(self, meta_step: int, round: int, state: State) -> int:
        return self.inner.publish(meta_step, round, state)

    def release(self, meta_step: int) -> None:
        self.inner.release(meta_step)

    def capacity(self, role: str) -> int:
        return self.inner.capacity(role)

    def near(self, shard: Shard) -> bool:
        return self.inner.near(shard)

    def submit(self, shard: Shard, attempt: int) -> None:
        fault = self._fault_for(shard)
        if fault is None:
            self.inner.submit(shard, attempt)
            return
        event = fault.submit(self.inner, shard, attempt)
        if event is None:
            self._disturbed[shard, attempt] = fault
        else:
            self._held.append((0.0, event))

    def cancel(self, shard: Shard, attempt: int) -> None:
        self.inner.cancel(shard, attempt)

    def wait(self, timeout: float) -> list[Event]:
        deadline = min([time.monotonic() + timeout, *(due for due, _ in self._held)])
        for event in self.inner.wait(max(0.0, deadline - time.monotonic())):
            fault = self._disturbed.pop((event.shard, event.attempt), None)
            event, seconds = (event, 0.0) if fault is None else fault.receive(event)
            self._held.append((time.monotonic() + seconds, event))
        now = time.monotonic()
        ready = [event for due, event in self._held if due <= now]
        self._held = [(due, event) for due, event in self._held if due > now]
        return ready

    def shortage(self) -> str:
        return self.inner.shortage()

    def workers(self) -> dict[str, dict[str, Any]]:
        return self.inner.workers()

    def kill_busy(self) -> str | None:
        return self.inner.kill_busy()

    def cannot_resize(self, role: str, count: int) -> str | None:
        return self.inner.cannot_resize(role, count)

    def resize(self, role: str, count: int) -> None:
        self.inner.resize(role, count)

    def close(self) -> None:
        self.inner.close()
