"""What an executor asks of a worker in another process, and what workers from outside are told: words that both ends share."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, Protocol, Union

from metadist.core.engine import Engine
from metadist.core.round import OutputKey, Shard

#: (shard, attempt) of contributions, and whether they were summed
Settled = list[tuple[tuple[Shard, int], bool]]
Content = Callable[[], Sequence[Any]]
"""Gives a frame in parts. It may have to be fetched, and raises where that fails."""


@dataclass(frozen=True)
class Call:
    """One attempt at a shard, as the driver asks for it. ``version`` names θ; ``token`` this call, and the output that it keeps.

    ``needs``: the shards whose outputs it needs, each with the token of the call that made it. ``settled``: what became of
    earlier contributions, where they travel in half precision; None where they don't.
    """

    shard: Shard
    attempt: int
    version: int
    token: int
    needs: tuple[tuple[Shard, int], ...] = ()
    settled: Settled | None = None


class MissingError(Exception):
    """An output that a shard needs did not arrive whole. ``keys`` are those to be computed anew."""

    def __init__(self, message: str, keys: tuple[OutputKey, ...] = ()) -> None:
        super().__init__(message)
        self.keys = keys

    def __reduce__(self) -> Any:
        return type(self), (str(self), self.keys)


# Workers from outside -------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Applicant:
    """Who wants to work. ``versions``: of metadist, torch and python. ``process`` tells one that comes back from another one."""

    name: str
    role: str
    host: str
    pid: int
    versions: Mapping[str, str]
    process: str


@dataclass(frozen=True)
class Terms:
    """What a worker from outside builds its own learner from. ``config`` is a YAML document; ``worker`` the name it goes by;
    nothing may be heard of it for ``lease_seconds``, or its leases end."""

    worker: str
    role: str
    run: str
    config: str
    device: str
    threads: int
    lease_seconds: float


@dataclass(frozen=True)
class Configure:
    """The engine that the run's workers compute with."""

    engine: Engine
    seed: int


@dataclass(frozen=True)
class Lease:
    """A call with what the worker doesn't hold yet of θ and of the needed outputs (in the order of ``call.needs``)."""

    call: Call
    theta: Content | None = None
    outputs: tuple[Content | None, ...] = ()


@dataclass(frozen=True)
class Dismissal:
    """The end of a worker's work: the run is ``over``, the worker is ``refused``, or it may come ``again``."""

    reason: str
    then: Literal["over", "refused", "again"]


@dataclass(frozen=True)
class Answer:
    """A computed shard: the frames, in parts, of its result and of the output that it keeps."""

    result: Sequence[Any]
    output: Sequence[Any] | None = None


Message = Union[Configure, Lease, Dismissal]


class DismissedError(Exception):
    """An applicant is not taken, or a worker not any more."""

    def __init__(self, dismissal: Dismissal) -> None:
        super().__init__(dismissal.reason)
        self.dismissal = dismissal


class Seat(Protocol):
    """A worker's place at the driver. Everything returns at once and may be called from any thread."""

    @property
    def terms(self) -> Terms: ...

    def heard(self) -> None: ...

    def next(self, timeout: float) -> Message | None:
        """What the worker is to be told next; None after ``timeout`` seconds without."""
        ...

    def described(self, device: Mapping[str, Any], about: Mapping[str, Any]) -> None: ...

    def configured(self, about: Mapping[str, Any]) -> None: ...

    def largest(self, token: int) -> tuple[int, int] | None:
        """How many bytes the result and the output of a lease may have; None where the lease has ended."""
        ...

    def finished(self, token: int, answer: Answer) -> None: ...

    def failed(self, token: int, failure: Failure) -> None: ...

    def unsent(self, token: int, position: int, reason: str) -> None:
        """The output at ``position`` of a lease's needs could not be fetched; the lease was not sent."""
        ...

    def left(self, reason: str, guilty: bool = False) -> None:
        """The worker is gone; ``guilty`` where what it computed may be why."""
        ...


class Desk(Protocol):
    """Where workers from outside come in."""

    def join(self, applicant: Applicant) -> Seat:
        """Raises DismissedError."""
        ...


@dataclass(frozen=True)
class Failure:
    """Why a lease came to nothing: ``rejected``, ``error`` or ``missing`` as in ``Failed``; ``unable`` where this worker can't compute
    it and another may; ``returned`` where it was given back unbegun."""

    kind: str
    message: str
    tasks: tuple[int, ...] = ()
    detail: str = ""
    missing: tuple[OutputKey, ...] = ()


class Bench(Protocol):
    """The worker's own side: what builds a learner and computes. Raises MetadistError where it can't."""

    def start(self, terms: Terms) -> tuple[dict[str, Any], dict[str, Any]]:
        """What a plan must know of its device, and what it says about itself."""
        ...

    def configure(self, order: Configure) -> dict[str, Any]: ...

    def compute(self, lease: Lease) -> Answer | Failure: ...
