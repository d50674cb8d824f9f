"""The messages between a driver and its remote workers, independent of the transport."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, Union

from metadist.core.engine import Engine
from metadist.core.round import OutputKey
from metadist.workers.calls import Call, Content


@dataclass(frozen=True)
class Applicant:
    """A worker that wants to join.

    ``versions``: of metadist, torch and python. ``process`` is an id of the worker's process: a reconnecting process
    has the same id.
    """

    name: str
    role: str
    host: str
    pid: int
    versions: Mapping[str, str]
    process: str


@dataclass(frozen=True)
class Terms:
    """The driver's answer to an accepted applicant: its name, and the config from which it builds its own learner.

    ``config`` is a YAML document. The leases of a worker end when the driver receives nothing from it for
    ``lease_seconds``.
    """

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
    """A call, with θ and the needed outputs (in the order of ``call.needs``); None where the worker holds them."""

    call: Call
    theta: Content | None = None
    outputs: tuple[Content | None, ...] = ()


@dataclass(frozen=True)
class Fetch:
    """Asks for the output that the lease ``token`` made, and that the worker holds."""

    token: int


@dataclass(frozen=True)
class Dismissal:
    """The end of a worker's work: the run is ``over``, the worker is ``refused``, or it may come ``again``."""

    reason: str
    then: Literal["over", "refused", "again"]


@dataclass(frozen=True)
class Computed:
    """A computed shard: the frames, in parts, of its result and of the output that it keeps.

    States of particles stay with the worker: ``output`` is None then.
    """

    result: Sequence[Any]
    output: Sequence[Any] | None = None


@dataclass(frozen=True)
class Failure:
    """The reason why a lease has no answer.

    ``kind`` is ``rejected``, ``error`` or ``missing`` as in ``Failed``; ``unable`` where this worker can't compute
    the shard and another worker may; ``returned`` where the worker gave the lease back before it computed.
    """

    kind: str
    message: str
    tasks: tuple[int, ...] = ()
    detail: str = ""
    missing: tuple[OutputKey, ...] = ()


Message = Union[Configure, Lease, Fetch, Dismissal]


class DismissedError(Exception):
    """The driver does not accept an applicant."""

    def __init__(self, dismissal: Dismissal) -> None:
        super().__init__(dismissal.reason)
        self.dismissal = dismissal
