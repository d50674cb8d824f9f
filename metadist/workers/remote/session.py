"""One remote worker at the driver: the messages for it, the outputs that it holds, and its leases."""

from __future__ import annotations

import queue
import time
from collections import defaultdict, deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Union

from metadist.config.groups import WorkerGroup
from metadist.core.round import Shard
from metadist.workers.calls import Call
from metadist.workers.remote.messages import Applicant, Computed, Failure, Fetch, Message, Terms

#: the bytes that a result may have in addition to those of θ, and the bytes of a kept output
RESULT_SLACK, OUTPUT_BYTES = 64 << 20, 1 << 30


@dataclass(eq=False)
class Session:
    """A remote worker's session. The transport's threads call its methods, and all of them return immediately.

    ``report`` passes the worker's messages on to the driver's thread, which alone changes ``leases`` and the fields
    below it.
    """

    applicant: Applicant
    terms: Terms
    group: WorkerGroup
    report: Callable[[Session, str, tuple[Any, ...]], None]
    theta_bytes: int
    messages: queue.SimpleQueue[Message] = field(default_factory=queue.SimpleQueue)
    last_heard: float = field(default_factory=time.monotonic)
    #: token → call
    leases: dict[int, Call] = field(default_factory=dict)
    device: Any = None
    about: dict[str, Any] | None = None
    #: whether the engine was sent to it
    configured: bool = False
    #: whether one of its results was counted: only then its death can blame a shard
    proven: bool = False
    version: int = 0
    holds: set[int] = field(default_factory=set)
    #: shards of this meta-step at which it failed
    failed_at: set[Shard] = field(default_factory=set)
    #: whether the session has ended
    ended: bool = False
    #: token → where each answer to a fetch is expected
    _fetches: defaultdict[int, deque[queue.SimpleQueue[Sequence[Any] | None]]] = field(
        default_factory=lambda: defaultdict(deque)
    )

    @property
    def name(self) -> str:
        return self.terms.worker

    @property
    def ready(self) -> bool:
        return self.about is not None

    def fetch(self, token: int) -> Sequence[Any]:
        """Return the frame of an output that the worker holds, in parts. Any thread may call it.

        Raises LookupError where the worker has left, is silent, or does not hold the output.
        """
        answer = queue.SimpleQueue[Union[Sequence[Any], None]]()
        self._fetches[token].append(answer)
        self.messages.put(Fetch(token))
        while not self.ended and time.monotonic() - self.last_heard < self.terms.lease_seconds:
            try:
                frame = answer.get(timeout=0.1)
            except queue.Empty:
                continue
            if frame is None:
                break
            return frame
        raise LookupError(f"{self.name} does not hold the output any more")

    # For the transport ------------------------------------------------------------------------------------------------

    def heard(self) -> None:
        """Note that the worker is alive."""
        self.last_heard = time.monotonic()

    def next(self, timeout: float) -> Message | None:
        """Return the next message for the worker; None after ``timeout`` seconds without one."""
        try:
            return self.messages.get(timeout=timeout)
        except queue.Empty:
            return None

    def largest(self, token: int) -> tuple[int, int] | None:
        """Return the bytes that the result and the output of a lease may have; None where the lease has ended."""
        call = self.leases.get(token)
        return None if call is None else (self.theta_bytes + RESULT_SLACK, OUTPUT_BYTES if call.shard.keeps else 0)

    def described(self, device: Mapping[str, Any], about: Mapping[str, Any]) -> None:
        self.report(self, "described", (device, about))

    def became_ready(self, about: Mapping[str, Any]) -> None:
        self.report(self, "configured", (about,))

    def finished(self, token: int, answer: Computed) -> None:
        self.report(self, "finished", (token, answer))

    def expects(self, token: int) -> bool:
        """Return whether the output ``token`` was asked for."""
        return bool(self._fetches.get(token))

    def brought(self, token: int, frame: Sequence[Any] | None) -> None:
        """Pass on an output that was fetched; None where the worker does not hold it."""
        self._fetches[token].popleft().put(frame)
        if not self._fetches[token]:
            del self._fetches[token]

    def failed(self, token: int, failure: Failure) -> None:
        self.report(self, "failed", (token, failure))

    def unsent(self, token: int, position: int, reason: str) -> None:
        """Report that a lease was not sent, since the output at ``position`` of its needs could not be fetched."""
        self.report(self, "unsent", (token, position, reason))

    def left(self, reason: str, guilty: bool = False) -> None:
        """Report that the worker is gone; ``guilty`` where the shard that it computed may be the reason."""
        self.ended = True
        self.report(self, "left", (reason, guilty))
