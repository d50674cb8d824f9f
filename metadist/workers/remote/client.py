"""The worker's side of ``metadist.work.v1``: one conversation with a driver, from Hello to Dismissed."""

from __future__ import annotations

import json
import os
import platform
import queue
import threading
from collections.abc import Callable, Iterator
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
    engine_of,
    failure_message,
    lease_of,
    terms_of,
)
from metadist.workers.remote.messages import Answer, Bench, Dismissal, Lease

__all__ = ["ServiceError", "connect", "converse", "passing", "wait_until_ready"]

#: beats for every lease's length: two may get lost
BEATS = 4
#: for what is still to be sent when a worker stops: a result, over a slow line
LAST_WORDS_SECONDS = 60.0
#: what ended the driver's side of the conversation
_END = object()


def wait_until_ready(channel: grpc.Channel, seconds: float, stopped: Callable[[], bool]) -> bool:
    """Whether the driver can be reached within so many seconds; gRPC tries with its own growing pauses."""
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
    """Whether the connection is at fault, which may be there again later."""
    return error.code in (
        grpc.StatusCode.UNAVAILABLE,
        grpc.StatusCode.CANCELLED,
        grpc.StatusCode.DEADLINE_EXCEEDED,
    ) and "TLS handshake" not in str(error)


class _Outbox:
    """What goes to the driver: messages, in the order in which they were put there, and beats where there are none."""

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
    channel: grpc.Channel,
    address: str,
    *,
    name: str,
    role: str,
    process: str,
    versions: dict[str, str],
    bench: Bench,
    say: Callable[[str], None],
    stopped: Callable[[], bool],
) -> Dismissal | None:
    """Work for the driver until it says that it is over, and return how; None where ``stopped`` ended it: the shard that was being
    computed is finished and sent, what waited is given back.

    Raises ServiceError where the connection fails, and MetadistError where this machine can't do what the run asks.
    """
    outbox, inbox = _Outbox(), queue.SimpleQueue[Any]()
    hello = pb.Hello(name=name, role=role, host=platform.node(), pid=os.getpid(), versions=versions, process=process)
    outbox.put(pb.FromWorker(hello=hello))
    with calling(address):
        answers = work_pb2_grpc.WorkStub(channel).Join(iter(outbox))
    reader = threading.Thread(target=_receive, args=(answers, inbox), name="lease-reader", daemon=True)
    reader.start()
    try:
        return _Conversation(outbox, inbox, address, bench, say, stopped).run()
    except KeyboardInterrupt:
        outbox.put(pb.FromWorker(goodbye=pb.Goodbye(reason="it was interrupted by its user")))
        raise
    finally:
        outbox.close()
        reader.join(LAST_WORDS_SECONDS)  # the driver ends its side when it has heard the last word
        answers.cancel()


def _receive(answers: Any, inbox: queue.SimpleQueue[Any]) -> None:
    """Messages, and leases with their frames, until the driver's side ends: then that, or what went wrong."""
    try:
        for message in answers:
            if message.WhichOneof("message") != "lease":
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
        self,
        outbox: _Outbox,
        inbox: queue.SimpleQueue[Any],
        address: str,
        bench: Bench,
        say: Callable[[str], None],
        stopped: Callable[[], bool],
    ) -> None:
        self._outbox, self._inbox, self._address = outbox, inbox, address
        self._bench, self._say, self._stopped = bench, say, stopped
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
            what = item.WhichOneof("message")
            if what == "dismissed":
                return Dismissal(item.dismissed.reason, item.dismissed.then)
            try:
                self._obey(what, item)
            except MetadistError as error:
                self._outbox.put(pb.FromWorker(goodbye=pb.Goodbye(reason=f"it can't work for this run: {error}")))
                raise

    def _next(self) -> Any:
        """The next message or lease; None when it is time to stop."""
        while not self._stopped():
            try:
                item = self._inbox.get(timeout=0.2)
            except queue.Empty:
                continue
            if item is _END:
                raise ServiceError(
                    f"{self._address}: the driver ended the conversation without a word", grpc.StatusCode.UNAVAILABLE
                )
            if isinstance(item, grpc.RpcError):
                with calling(self._address):
                    raise item
            if isinstance(item, Exception):
                raise ServiceError(f"{self._address}: what the driver sent makes no sense ({item})")
            return item
        return None

    def _obey(self, what: str, item: pb.ToWorker) -> None:
        if what == "terms":
            terms = terms_of(item.terms)
            self._outbox.beat_seconds = terms.lease_seconds / BEATS
            self._outbox.put(pb.FromWorker(beat=pb.Beat()))
            self._say(f"joined run {terms.run} as {terms.worker}; building its learner")
            device, about = self._bench.start(terms)
            self._outbox.put(pb.FromWorker(described=pb.Described(device=json.dumps(device), about=json.dumps(about))))
        elif what == "engine":
            order = engine_of(item.engine)
            if order.engine.compile:
                self._say("compiling…")
            about = self._bench.configure(order)
            self._outbox.put(pb.FromWorker(configured=pb.Configured(about=json.dumps(about))))
            self._say(f"ready on {about['fingerprint']['device']} (numerics {about['fingerprint']['id']})")

    def _compute(self, lease: Lease) -> None:
        shard, token = lease.call.shard, lease.call.token
        answer = self._bench.compute(lease)
        if isinstance(answer, Answer):
            self._outbox.stream(answer_messages(token, answer))
            before, self._shards = self._shards, self._shards + shard.leaves
            if before == 0 or before // 100 < self._shards // 100:
                self._say(
                    f"{self._shards} shard{'s' if self._shards > 1 else ''} computed, the last of meta-step {shard.meta_step}"
                )
        else:
            self._outbox.put(failure_message(token, answer))
            self._say(f"{shard}: {answer.kind}: {answer.message}")
