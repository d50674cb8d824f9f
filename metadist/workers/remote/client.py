"""The worker's side of ``metadist.work.v1``: one conversation with a driver, from Hello to Dismissed."""

from __future__ import annotations

import json
import queue
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import grpc

from metadist.core.errors import MetadistError
from metadist.rpc.endpoint import ServiceError, calling, connect
from metadist.workers.remote import work_pb2 as pb
from metadist.workers.remote import work_pb2_grpc
from metadist.workers.remote.codec import (
    Arriving,
    announced,
    answer_messages,
    applicant_message,
    engine_of,
    failure_message,
    held_messages,
    lease_of,
    terms_of,
)
from metadist.workers.remote.messages import Applicant, Computed, Dismissal, Lease
from metadist.workers.remote.runner import Runner

__all__ = ["ServiceError", "Shell", "connect", "converse", "passing", "wait_until_ready"]

#: beats in the length of a lease: two may get lost
BEATS = 4
#: seconds to send the last messages when a worker stops: a result may take long over a slow line
LAST_MESSAGES_SECONDS = 60.0
#: stands in the inbox for the end of the driver's side
_END = object()


@dataclass(frozen=True)
class Shell:
    """The worker's user: ``say`` shows a message; ``stopped`` returns True once the worker should stop."""

    say: Callable[[str], None]
    stopped: Callable[[], bool]


def wait_until_ready(channel: grpc.Channel, seconds: float, stopped: Callable[[], bool]) -> bool:
    """Return whether the driver can be reached within ``seconds``; gRPC tries with growing pauses of its own."""
    ready = grpc.channel_ready_future(channel)
    try:
        for _ in range(max(1, int(seconds / 0.5))):
            try:
                ready.result(timeout=0.5)
                return True
            except grpc.FutureTimeoutError:
                if stopped():
                    return False
        return False
    finally:
        ready.cancel()


def passing(error: ServiceError) -> bool:
    """Return whether the error is one of the connection, which may work again later."""
    return error.code in (
        grpc.StatusCode.UNAVAILABLE,
        grpc.StatusCode.CANCELLED,
        grpc.StatusCode.DEADLINE_EXCEEDED,
    ) and "TLS handshake" not in str(error)


class _Outbox:
    """Messages for the driver in the order of ``put`` and ``stream``, and beats while there are none."""

    def __init__(self) -> None:
        self._queue: queue.SimpleQueue[Iterator[pb.FromWorker] | None] = queue.SimpleQueue()
        self.beat_seconds = 5.0

    def put(self, *messages: pb.FromWorker) -> None:
        self._queue.put(iter(messages))

    def stream(self, messages: Iterator[pb.FromWorker]) -> None:
        self._queue.put(messages)

    def close(self) -> None:
        self._queue.put(None)

    def __iter__(self) -> Iterator[pb.FromWorker]:
        while True:
            try:
                messages = self._queue.get(timeout=self.beat_seconds)
            except queue.Empty:
                yield pb.FromWorker(beat=pb.Beat())
                continue
            if messages is None:
                return
            yield from messages


def converse(
    channel: grpc.Channel, address: str, applicant: Applicant, runner: Runner, shell: Shell
) -> Dismissal | None:
    """Work for the driver at ``address`` until it dismisses this worker, and return the dismissal.

    Return None where the user stopped the worker: the shard in progress is finished and sent, waiting leases are
    given back. Raises ServiceError where the connection fails, and MetadistError where this machine can't do what the
    run asks.
    """
    outbox, inbox = _Outbox(), queue.SimpleQueue[Any]()
    outbox.put(pb.FromWorker(hello=applicant_message(applicant)))
    with calling(address):
        answers = work_pb2_grpc.WorkStub(channel).Join(iter(outbox))
    reader = threading.Thread(target=_receive, args=(answers, inbox, outbox, runner), name="lease-reader", daemon=True)
    reader.start()
    try:
        return _Conversation(outbox, inbox, address, runner, shell).run()
    except KeyboardInterrupt:
        outbox.put(pb.FromWorker(goodbye=pb.Goodbye(reason="it was interrupted by its user")))
        raise
    finally:
        outbox.close()
        reader.join(LAST_MESSAGES_SECONDS)  # the driver ends its side when it has received the last message
        answers.cancel()


def _receive(answers: Any, inbox: queue.SimpleQueue[Any], outbox: _Outbox, runner: Runner) -> None:
    """Put messages, and leases with their frames, into the inbox; at the end ``_END`` or the error.

    What is fetched is answered here: the main thread may be busy with a shard.
    """
    try:
        for message in answers:
            kind = message.WhichOneof("message")
            if kind == "fetch":
                outbox.stream(held_messages(message.fetch.token, runner.held(message.fetch.token)))
                continue
            if kind != "lease":
                inbox.put(message)
                continue
            arriving = Arriving(announced(message.lease))
            while not arriving.complete:
                arriving.take(next(answers).chunk.data)
            inbox.put(lease_of(message.lease, arriving.frames))
        inbox.put(_END)
    except Exception as error:
        inbox.put(error)


class _Conversation:
    def __init__(
        self, outbox: _Outbox, inbox: queue.SimpleQueue[Any], address: str, runner: Runner, shell: Shell
    ) -> None:
        self._outbox, self._inbox, self._address = outbox, inbox, address
        self._runner, self._say, self._stopped = runner, shell.say, shell.stopped
        self._shards = 0

    def run(self) -> Dismissal | None:
        while True:
            item = self._next()
            if item is None:
                self._outbox.put(pb.FromWorker(goodbye=pb.Goodbye(reason="it was stopped by its user")))
                return None
            if isinstance(item, Lease):
                self._compute(item)
                continue
            kind = item.WhichOneof("message")
            if kind == "dismissed":
                return Dismissal(item.dismissed.reason, item.dismissed.then)
            try:
                self._obey(kind, item)
            except MetadistError as error:
                self._outbox.put(pb.FromWorker(goodbye=pb.Goodbye(reason=f"it can't work for this run: {error}")))
                raise

    def _next(self) -> Any:
        """Return the next message or lease; None when it is time to stop."""
        while not self._stopped():
            try:
                item = self._inbox.get(timeout=0.2)
            except queue.Empty:
                continue
            if item is _END:
                raise ServiceError(
                    f"{self._address}: the driver ended the conversation without a reason", grpc.StatusCode.UNAVAILABLE
                )
            if isinstance(item, grpc.RpcError):
                with calling(self._address):
                    raise item
            if isinstance(item, Exception):
                raise ServiceError(f"{self._address}: the driver sent an invalid message ({item})")
            return item
        return None

    def _obey(self, kind: str, item: pb.ToWorker) -> None:
        if kind == "terms":
            terms = terms_of(item.terms)
            self._outbox.beat_seconds = terms.lease_seconds / BEATS
            self._outbox.put(pb.FromWorker(beat=pb.Beat()))
            self._say(f"joined run {terms.run} as {terms.worker}; building its learner")
            device, about = self._runner.start(terms)
            self._outbox.put(pb.FromWorker(described=pb.Described(device=json.dumps(device), about=json.dumps(about))))
        elif kind == "engine":
            order = engine_of(item.engine)
            if order.engine.compile:
                self._say("compiling…")
            about = self._runner.configure(order)
            self._outbox.put(pb.FromWorker(configured=pb.Configured(about=json.dumps(about))))
            self._say(f"ready on {about['fingerprint']['device']} (numerics {about['fingerprint']['id']})")

    def _compute(self, lease: Lease) -> None:
        shard, token = lease.call.shard, lease.call.token
        answer = self._runner.compute(lease)
        if not isinstance(answer, Computed):
            self._outbox.put(failure_message(token, answer))
            self._say(f"{shard}: {answer.kind}: {answer.message}")
            return
        self._outbox.stream(answer_messages(token, answer))
        before, self._shards = self._shards, self._shards + shard.leaves
        if before == 0 or before // 100 < self._shards // 100:
            count = f"{self._shards} shard{'s' if self._shards > 1 else ''}"
            self._say(f"{count} computed, the last of meta-step {shard.meta_step}")
