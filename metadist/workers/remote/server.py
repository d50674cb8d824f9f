"""The driver's side of ``metadist.work.v1``: a call per worker, between the desk and the wire."""

from __future__ import annotations

import threading
from collections.abc import Iterator
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
    terms_message,
)
from metadist.workers.remote.messages import Answer, Configure, Desk, Dismissal, DismissedError, Lease, Seat

__all__ = ["Leases", "add_to_server"]

add_to_server = work_pb2_grpc.add_WorkServicer_to_server


class Leases(work_pb2_grpc.WorkServicer):
    """Everything that a worker sends is bounded and checked for its place in the conversation before the desk hears of it."""

    def __init__(self, desk: Desk) -> None:
        self._desk = desk

    def Join(self, requests: Iterator[pb.FromWorker], context: Any) -> Iterator[pb.ToWorker]:
        first = next(requests, None)
        if first is None or first.WhichOneof("message") != "hello":
            raise Refused(grpc.StatusCode.INVALID_ARGUMENT, "a worker begins with Hello")
        try:
            seat = self._desk.join(applicant_of(first.hello))
        except DismissedError as error:
            yield _dismissed(error.dismissal)
            return
        problems: list[Refused] = []
        reader = threading.Thread(target=self._read, args=(requests, seat, problems), name="lease-reader", daemon=True)
        reader.start()
        context.add_callback(lambda: seat.left("its connection broke", guilty=True))
        yield pb.ToWorker(terms=terms_message(seat.terms))
        while context.is_active():
            ended = not reader.is_alive()  # before the look at its problems: the last it does is to leave one
            message = seat.next(0.25)
            if problems:
                raise problems[0]
            if message is None and ended:
                return
            if isinstance(message, Dismissal):
                yield _dismissed(message)
                return
            if isinstance(message, Configure):
                yield pb.ToWorker(engine=engine_message(message))
            elif isinstance(message, Lease):
                yield from _sent(message, seat)

    def _read(self, requests: Iterator[pb.FromWorker], seat: Seat, problems: list[Refused]) -> None:
        try:
            _listen(requests, seat)
        except Refused as error:
            seat.left(f"it was cut off: {error}")
            problems.append(error)
        except GarbledError as error:
            seat.left(f"it sent what makes no sense: {error}")
            problems.append(Refused(grpc.StatusCode.INVALID_ARGUMENT, str(error)))
        except Exception as error:  # gRPC's own, of a connection that broke; the call's end says so, too
            seat.left(f"its connection broke ({type(error).__name__})", guilty=True)
        else:
            seat.left("its connection ended without a goodbye", guilty=True)


def _sent(lease: Lease, seat: Seat) -> Iterator[pb.ToWorker]:
    """A lease with the frames that go with it, fetched first: one that can't be had is the driver's to mend."""
    theta = None if lease.theta is None else lease.theta()
    outputs = []
    for position, content in enumerate(lease.outputs):
        try:
            outputs.append(None if content is None else content())
        except Exception as error:  # whatever the place where it lies may fail with
            seat.unsent(
                lease.call.token, position, f"an output that it needs can't be fetched ({type(error).__name__})"
            )
            return
    yield from lease_messages(lease.call, theta, outputs)


def _listen(requests: Iterator[pb.FromWorker], seat: Seat) -> None:
    for message in requests:
        seat.heard()
        kind = message.WhichOneof("message")
        if kind == "described":
            seat.described(facts(message.described.device), facts(message.described.about))
        elif kind == "configured":
            seat.configured(facts(message.configured.about))
        elif kind == "result":
            _take_result(message.result, requests, seat)
        elif kind == "failure":
            seat.failed(message.failure.token, failure_of(message.failure))
        elif kind == "goodbye":
            seat.left(" ".join(message.goodbye.reason.split())[:200] or "it said goodbye")
        elif kind != "beat":
            raise GarbledError(f"{kind or 'an empty message'} out of place")


def _take_result(result: pb.Result, requests: Iterator[pb.FromWorker], seat: Seat) -> None:
    """Its chunks. Those of a lease that has ended are read past: the worker could not know."""
    largest = seat.largest(result.token)
    sizes = [result.result_bytes] + ([result.output_bytes] if result.HasField("output_bytes") else [])
    for size, most in zip(sizes, largest or (1 << 31, 1 << 31)):
        if not 0 <= size <= most:
            raise Refused(
                grpc.StatusCode.RESOURCE_EXHAUSTED, f"a frame of {size} bytes; this shard's has {most} at most"
            )
    arriving = Arriving(sizes, keep=largest is not None)
    while not arriving.complete:
        message = next(requests, None)
        if message is None or message.WhichOneof("message") != "chunk":
            raise GarbledError("the chunks of a result end before it is whole")
        seat.heard()
        arriving.take(message.chunk.data)
    if largest is not None:
        seat.finished(result.token, Answer(*arriving.frames))


def _dismissed(dismissal: Dismissal) -> pb.ToWorker:
    return pb.ToWorker(dismissed=pb.Dismissed(reason=dismissal.reason[:2000], then=dismissal.then))
