"""A worker from outside, as the driver knows it: what it is to be told, what it holds, and the leases that it has."""

from __future__ import annotations

import queue
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from metadist.config.groups import WorkerGroup
from metadist.core.round import Shard
from metadist.workers.remote.messages import Answer, Applicant, Call, Failure, Message, Terms

#: how many bytes a result may have beside those of θ, and a kept output
RESULT_SLACK, OUTPUT_BYTES = 64 << 20, 1 << 30

Report = Callable[["Seat", str, tuple[Any, ...]], None]


@dataclass(eq=False)
class Seat:
    """What the transport calls (from its own threads) is passed on to the driver's thread by ``report``, which reads it in ``wait``."""

    applicant: Applicant
    terms: Terms
    group: WorkerGroup
    report: Report
    theta_bytes: int
    messages: queue.SimpleQueue[Message] = field(default_factory=queue.SimpleQueue)
    #: by token. The driver's thread alone changes it
    leases: dict[int, Call] = field(default_factory=dict)
    last_heard: float = field(default_factory=time.monotonic)
    device: Any = None
    about: dict[str, Any] | None = None
    told_engine: bool = False
    #: whether a result of its was ever counted: only such a worker's death can blame a shard
    proven: bool = False
    version: int = 0
    holds: set[int] = field(default_factory=set)
    #: shards of this meta-step that it could not compute
    failed_at: set[Shard] = field(default_factory=set)

    @property
    def name(self) -> str:
        return self.terms.worker

    @property
    def ready(self) -> bool:
        return self.about is not None

    # What the transport calls -----------------------------------------------------------------------------------------

    def heard(self) -> None:
        self.last_heard = time.monotonic()

    def next(self, timeout: float) -> Message | None:
        try:
            return self.messages.get(timeout=timeout)
        except queue.Empty:
            return None

    def largest(self, token: int) -> tuple[int, int] | None:
        call = self.leases.get(token)
        return None if call is None else (self.theta_bytes + RESULT_SLACK, OUTPUT_BYTES if call.shard.keeps else 0)

    def described(self, device: Mapping[str, Any], about: Mapping[str, Any]) -> None:
        self.report(self, "described", (device, about))

    def configured(self, about: Mapping[str, Any]) -> None:
        self.report(self, "configured", (about,))

    def finished(self, token: int, answer: Answer) -> None:
        self.report(self, "finished", (token, answer))

    def failed(self, token: int, failure: Failure) -> None:
        self.report(self, "failed", (token, failure))

    def unsent(self, token: int, position: int, reason: str) -> None:
        self.report(self, "unsent", (token, position, reason))

    def left(self, reason: str, guilty: bool = False) -> None:
        self.report(self, "left", (reason, guilty))
