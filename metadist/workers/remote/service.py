"""The driver's side of ``metadist.work.v1``: one call per worker, between gRPC and the worker's session."""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Iterator, Sequence
from typing import Any

import grpc

from metadist.rpc.endpoint import Refused
from metadist.workers.remote import work_pb2 as pb
from metadist.workers.remote import work_pb2_grpc
from metadist.workers.remote.codec import (
    Arriving,
    GarbledError,
    applicant_of,
    engine_message,
    facts,
    failure_of,
    lease_messages,
    one_line,
    terms_message,
)
from metadist.workers.remote.messages import Computed, Configure, Dismissal, DismissedError, Fetch, Lease, Message
from metadist.workers.remote.server import Server
from metadist.workers.remote.session import OUTPUT_BYTES, Session

__all__ = ["Leases", "add_to_server"]

add_to_server = work_pb2_grpc.add_WorkServicer_to_server


class Leases(work_pb2_grpc.WorkServicer):
    """Bound every message of a worker, and check its place in the conversation, before the session receives it."""

    def __init__(self, server: Server) -> None:
        self._server = server

    def Join(self, requests: Iterator[pb.FromWorker], context: Any) -> Iterator[pb.ToWorker]:
        first = next(requests, None)
        if first is None or first.WhichOneof("message") != "hello":
            raise Refused(grpc.StatusCode.INVALID_ARGUMENT, "a worker begins with Hello")
        try:
            session = self._server.join(applicant_of(first.hello))
        except DismissedError as error:
            yield _dismissed(error.dismissal)
            return
        problems: list[Refused] = []
        reader = threading.Thread(
            target=self._read, args=(requests, session, problems), name="lease-reader", daemon=True
        )
        reader.start()
        context.add_callback(lambda: session.left("its connection broke", guilty=True))
        yield pb.ToWorker(terms=terms_message(session.terms))
        later = deque[Message]()
        while context.is_active():
            ended = not reader.is_alive()  # before the look at ``problems``, which the reader fills last
            message = later.popleft() if later else session.next(0.25)
            if problems:
                raise problems[0]
            if message is None and ended:
                return
            if isinstance(message, Dismissal):
                yield _dismissed(message)
                return
            if isinstance(message, Configure):
                yield pb.ToWorker(engine=engine_message(message))
            elif isinstance(message, Fetch):
                yield pb.ToWorker(fetch=pb.Fetch(token=message.token))
            elif isinstance(message, Lease):
                yield from _sent(message, session, later)

    def _read(self, requests: Iterator[pb.FromWorker], session: Session, problems: list[Refused]) -> None:
        try:
            _listen(requests, session)
        except Refused as error:
            session.left(f"its connection was refused: {error}")
            problems.append(error)
        except GarbledError as error:
            session.left(f"it sent an invalid message: {error}")
            problems.append(Refused(grpc.StatusCode.INVALID_ARGUMENT, str(error)))
        except Exception as error:  # gRPC raises its own errors for a broken connection
            session.left(f"its connection broke ({type(error).__name__})", guilty=True)
        else:
            session.left("its connection ended without a goodbye", guilty=True)


def _sent(lease: Lease, session: Session, later: deque[Message]) -> Iterator[pb.ToWorker]:
    """Yield the messages of a lease and of its frames.

    The frames are fetched first. Where one can't be fetched, the lease is reported as unsent. Meanwhile the worker is
    asked for outputs that others wait for: two workers may need each other's. ``later`` receives other messages.
    """
    theta = None if lease.theta is None else lease.theta()
    outputs: list[Sequence[Any] | None] = []
    fetching = threading.Thread(target=_fetch, args=(lease, session, outputs), name="output-reader", daemon=True)
    fetching.start()
    fetching.join(0.001)
    while fetching.is_alive():
        message = session.next(0.01)
        if isinstance(message, Fetch):
            yield pb.ToWorker(fetch=pb.Fetch(token=message.token))
        elif message is not None:
            later.append(message)
    if len(outputs) == len(lease.outputs):
        yield from lease_messages(lease.call, theta, outputs)


def _fetch(lease: Lease, session: Session, outputs: list[Sequence[Any] | None]) -> None:
    """Append the frames of the outputs that the lease needs to ``outputs``, or report the lease as unsent."""
    for position, content in enumerate(lease.outputs):
        try:
            outputs.append(None if content is None else content())
        except Exception as error:  # the store of the output raises its own errors
            reason = f"an output that it needs can't be fetched ({type(error).__name__})"
            session.unsent(lease.call.token, position, reason)
            return


def _listen(requests: Iterator[pb.FromWorker], session: Session) -> None:
    for message in requests:
        session.heard()
        kind = message.WhichOneof("message")
        if kind == "described":
            session.described(facts(message.described.device), facts(message.described.about))
        elif kind == "configured":
            session.became_ready(facts(message.configured.about))
        elif kind == "result":
            _take_result(message.result, requests, session)
        elif kind == "failure":
            session.failed(message.failure.token, failure_of(message.failure))
        elif kind == "held":
            _take_held(message.held, requests, session)
        elif kind == "goodbye":
            session.left(one_line(message.goodbye.reason, 200) or "it said goodbye")
        elif kind != "beat":
            raise GarbledError(f"{kind or 'an empty message'} out of place")


def _take_result(result: pb.Result, requests: Iterator[pb.FromWorker], session: Session) -> None:
    """Read the chunks of a result. Chunks of a lease that has ended are skipped, since the worker can't know."""
    largest = session.largest(result.token)
    sizes = [result.result_bytes] + ([result.output_bytes] if result.HasField("output_bytes") else [])
    for size, most in zip(sizes, largest or (1 << 31, 1 << 31)):
        if not 0 <= size <= most:
            raise Refused(
                grpc.StatusCode.RESOURCE_EXHAUSTED, f"a frame of {size} bytes; this shard's has {most} at most"
            )
    arriving = Arriving(sizes, keep=largest is not None)
    _take_chunks(arriving, requests, session)
    if largest is not None:
        session.finished(result.token, Computed(*arriving.frames))


def _take_held(held: pb.Held, requests: Iterator[pb.FromWorker], session: Session) -> None:
    """Read the chunks of an output that was fetched."""
    if not session.expects(held.token):
        raise GarbledError(f"the output {held.token}, which nobody asked for")
    if not held.HasField("bytes"):
        session.brought(held.token, None)
        return
    if not 0 <= held.bytes <= OUTPUT_BYTES:
        raise Refused(grpc.StatusCode.RESOURCE_EXHAUSTED, f"an output of {held.bytes} bytes; at most {OUTPUT_BYTES}")
    arriving = Arriving([held.bytes])
    _take_chunks(arriving, requests, session)
    session.brought(held.token, arriving.frames[0])


def _take_chunks(arriving: Arriving, requests: Iterator[pb.FromWorker], session: Session) -> None:
    while not arriving.complete:
        message = next(requests, None)
        if message is None or message.WhichOneof("message") != "chunk":
            raise GarbledError("the chunks of a frame end before it is whole")
        session.heard()
        arriving.take(message.chunk.data)


def _dismissed(dismissal: Dismissal) -> pb.ToWorker:
    return pb.ToWorker(dismissed=pb.Dismissed(reason=dismissal.reason[:2000], then=dismissal.then))
