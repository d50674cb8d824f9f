"""Translate leases and their answers to messages of ``metadist.work.v1`` and back, and check untrusted messages."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict
from typing import Any

from metadist.core.computation import computation_of
from metadist.core.engine import Engine
from metadist.core.round import OutputKey, Shard
from metadist.core.text import printable
from metadist.workers.calls import Call, Content
from metadist.workers.remote import work_pb2 as pb
from metadist.workers.remote.messages import Applicant, Computed, Configure, Failure, Lease, Terms

CHUNK_BYTES = 1 << 20
#: limits on the facts about a device or a worker, on messages for people, and on tracebacks
FACTS_CHARACTERS, MESSAGE_CHARACTERS, DETAIL_CHARACTERS = 128 << 10, 2000, 20_000

_SHARD = (
    "run",
    "meta_step",
    "round",
    "index",
    "start",
    "count",
    "seed",
    "split",
    "key_step",
    "role",
    "keeps",
    "leaf",
)


class GarbledError(Exception):
    """A message is valid protobuf, but its content is invalid or out of place."""


# Frames ---------------------------------------------------------------------------------------------------------------


def size_of(parts: Iterable[Any]) -> int:
    return sum(memoryview(p).nbytes for p in parts)


def chunks(frames: Iterable[Sequence[Any]]) -> Iterator[pb.Chunk]:
    """Yield the bytes of the frames one after another. Every frame begins in a new chunk."""
    for parts in frames:
        for part in parts:
            view = memoryview(part).cast("B")
            for start in range(0, len(view), CHUNK_BYTES):
                yield pb.Chunk(data=bytes(view[start : start + CHUNK_BYTES]))


class Arriving:
    """Collect the chunks of frames whose ``sizes`` were announced. Memory is used only for chunks that have arrived.

    Without ``keep`` the chunks are counted and dropped.
    """

    def __init__(self, sizes: Sequence[int], keep: bool = True) -> None:
        self.frames: list[list[bytes]] = [[] for _ in sizes]
        self._left, self._keep = list(sizes), keep
        self._at = 0
        self._skip()

    @property
    def complete(self) -> bool:
        return self._at == len(self._left)

    def take(self, data: bytes) -> None:
        expected = 0 if self.complete else self._left[self._at]
        if not 0 < len(data) <= expected:
            raise GarbledError(f"a chunk of {len(data)} bytes; expected {expected} at most")
        if self._keep:
            self.frames[self._at].append(data)
        self._left[self._at] -= len(data)
        self._skip()

    def _skip(self) -> None:
        while not self.complete and self._left[self._at] == 0:
            self._at += 1


# Facts ----------------------------------------------------------------------------------------------------------------


def facts(text: str) -> dict[str, Any]:
    """Return a JSON object of plain values and of objects of plain values. Raises GarbledError for any other text."""
    if len(text) > FACTS_CHARACTERS:
        raise GarbledError(f"{len(text)} characters of facts; expected {FACTS_CHARACTERS} at most")
    try:
        found = json.loads(text)
    except (ValueError, RecursionError):
        raise GarbledError("the facts are no JSON") from None
    if not isinstance(found, dict):
        raise GarbledError("the facts are no JSON object")
    for value in found.values():
        for inner in value.values() if isinstance(value, dict) else [value]:
            if not isinstance(inner, (str, int, float, bool, type(None))):
                raise GarbledError("the facts are no plain values")
    return {printable(name): _cleaned(value) for name, value in found.items()}


def _cleaned(value: Any) -> Any:
    """Return JSON data with the control characters of all texts as escapes: they are logged and shown."""
    if isinstance(value, dict):
        return {printable(name): _cleaned(inner) for name, inner in value.items()}
    return printable(value) if isinstance(value, str) else value


def applicant_message(applicant: Applicant) -> pb.Hello:
    return pb.Hello(**asdict(applicant))


def applicant_of(hello: pb.Hello) -> Applicant:
    versions = {printable(k[:40]): printable(v[:80]) for k, v in list(hello.versions.items())[:16]}
    name, role, host, process = map(printable, (hello.name, hello.role, hello.host[:255], hello.process[:64]))
    return Applicant(name, role, host, hello.pid, versions, process)


def one_line(text: str, characters: int) -> str:
    """Return the first characters of a text from outside in one line, with control characters as escapes."""
    return printable(" ".join(text.split()))[:characters]


def terms_message(terms: Terms) -> pb.Terms:
    return pb.Terms(**asdict(terms))


def terms_of(message: pb.Terms) -> Terms:
    names = ("worker", "role", "run", "config", "device", "threads", "lease_seconds")
    return Terms(**{n: getattr(message, n) for n in names})


def engine_message(order: Configure) -> pb.Engine:
    return pb.Engine(**asdict(order.engine), seed=order.seed)


def engine_of(message: pb.Engine) -> Configure:
    names = ("compile", "differentiation", "hessian", "precision", "deterministic")
    chunk = message.chunk if message.HasField("chunk") else None
    return Configure(Engine(**{n: getattr(message, n) for n in names}, chunk=chunk), message.seed)


# Leases ---------------------------------------------------------------------------------------------------------------


def _key_message(key: OutputKey) -> pb.OutputKey:
    return pb.OutputKey(meta_step=key[0], round=key[1], shard=key[2])


def _key_of(message: pb.OutputKey) -> OutputKey:
    return message.meta_step, message.round, message.shard


def shard_message(shard: Shard) -> pb.Shard:
    values = {n: getattr(shard, n) for n in _SHARD}
    arguments = json.dumps(sorted(shard.computation.arguments().items()))
    needs = [_key_message(k) for k in shard.needs]
    return pb.Shard(**values, function=shard.function, settings=arguments, needs=needs)


def shard_of(message: pb.Shard) -> Shard:
    """Return the shard of a message. GarbledError where its computation is unknown or has other arguments."""
    try:
        computation = computation_of(message.function, dict(json.loads(message.settings or "[]")))
    except (TypeError, ValueError) as error:
        raise GarbledError(f"shard {message.index}: {error}") from error
    values = {n: getattr(message, n) for n in _SHARD}
    return Shard(**values, computation=computation, needs=tuple(map(_key_of, message.needs)))


def lease_messages(
    call: Call, theta: Sequence[Any] | None, outputs: Sequence[Sequence[Any] | None]
) -> Iterator[pb.ToWorker]:
    lease = pb.Lease(token=call.token, shard=shard_message(call.shard), attempt=call.attempt, version=call.version)
    lease.since = call.since
    if theta is not None:
        lease.theta_bytes = size_of(theta)
    for (shard, token), parts in zip(call.needs, outputs):
        lease.needs.add(shard=shard_message(shard), token=token, bytes=None if parts is None else size_of(parts))
    yield pb.ToWorker(lease=lease)
    for chunk in chunks([parts for parts in (theta, *outputs) if parts is not None]):
        yield pb.ToWorker(chunk=chunk)


def announced(lease: pb.Lease) -> list[int]:
    """Return the size in bytes of each frame that follows a lease."""
    theta = [lease.theta_bytes] if lease.HasField("theta_bytes") else []
    return theta + [need.bytes for need in lease.needs if need.HasField("bytes")]


def lease_of(message: pb.Lease, frames: Sequence[Sequence[bytes]]) -> Lease:
    call = Call(
        shard_of(message.shard),
        message.attempt,
        message.version,
        message.token,
        tuple((shard_of(need.shard), need.token) for need in message.needs),
        since=message.since,
    )
    arrived = iter(frames)
    theta = next(arrived) if message.HasField("theta_bytes") else None
    outputs = [next(arrived) if need.HasField("bytes") else None for need in message.needs]
    return Lease(call, _content(theta), tuple(map(_content, outputs)))


def _content(frame: Sequence[bytes] | None) -> Content | None:
    return None if frame is None else lambda: frame


# Answers --------------------------------------------------------------------------------------------------------------


def answer_messages(token: int, answer: Computed) -> Iterator[pb.FromWorker]:
    frames = [answer.result] + ([answer.output] if answer.output is not None else [])
    output_bytes = None if answer.output is None else size_of(answer.output)
    yield pb.FromWorker(result=pb.Result(token=token, result_bytes=size_of(answer.result), output_bytes=output_bytes))
    for chunk in chunks(frames):
        yield pb.FromWorker(chunk=chunk)


def held_messages(token: int, output: Sequence[Any] | None) -> Iterator[pb.FromWorker]:
    yield pb.FromWorker(held=pb.Held(token=token, bytes=None if output is None else size_of(output)))
    for chunk in chunks([] if output is None else [output]):
        yield pb.FromWorker(chunk=chunk)


def failure_message(token: int, failure: Failure) -> pb.FromWorker:
    return pb.FromWorker(
        failure=pb.Failure(
            token=token,
            kind=failure.kind,
            message=failure.message[:MESSAGE_CHARACTERS],
            tasks=failure.tasks,
            detail=failure.detail[-DETAIL_CHARACTERS:],
            missing=[_key_message(k) for k in failure.missing],
        )
    )


def failure_of(message: pb.Failure) -> Failure:
    return Failure(
        printable(message.kind),
        one_line(message.message, MESSAGE_CHARACTERS),
        tuple(message.tasks[:4096]),
        printable(message.detail[-DETAIL_CHARACTERS:], keep="\n\t"),
        tuple(_key_of(k) for k in message.missing[:4096]),
    )
