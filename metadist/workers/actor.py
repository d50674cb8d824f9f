"""A worker inside a process of its own: it decodes θ and needed outputs once, computes shards, and encodes results."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import pyarrow as pa
from torch import Tensor

from metadist.core.engine import Engine
from metadist.core.round import Shard
from metadist.core.state import Records
from metadist.learners.base import Learner
from metadist.wire.codec import (
    RejectedError,
    ResultHeader,
    ThetaHeader,
    decode_output,
    decode_theta,
    output_parts,
    result_parts,
)
from metadist.wire.error_feedback import ErrorFeedback
from metadist.workers.calls import Call, MissingError
from metadist.workers.copies import code_here
from metadist.workers.worker import Worker


@dataclass(frozen=True)
class ActorSettings:
    """Name, role and resources of one worker.

    ``places`` are environment variables (``METADIST_DATA``, …) that apply where the worker's machine does not set its
    own. ``modules`` are those that the config names; the worker reports the hashes of its copies.
    """

    name: str
    role: str = "learner"
    device: str = "auto"
    gpus: float = 0.0
    threads: int = 1
    places: Mapping[str, str] = field(default_factory=dict)
    modules: tuple[str, ...] = ()


class Actor:
    """A worker in a process of its own. θ arrives as a view of the object store and is decoded once per version."""

    def __init__(self, learner: Learner, settings: ActorSettings) -> None:
        self._learner, self._settings = learner, settings

    def start(self) -> dict[str, Any]:
        """Load the data, and return the facts about this worker, with its device under ``describes``."""
        settings = self._settings
        for variable, path in settings.places.items():
            os.environ.setdefault(variable, path)
        self._worker = Worker(
            self._learner,
            name=settings.name,
            device=settings.device,
            gpus=settings.gpus,
            threads=settings.threads,
        )
        self._version = 0
        self._theta: dict[str, Tensor] = {}
        #: token → output, with the shard that kept it here or elsewhere: every output is decoded once
        self._outputs: dict[int, tuple[Shard, Records]] = {}
        self._since = 0
        self._feedback = ErrorFeedback(self._learner.slots)
        self._copies = {"modules": code_here(settings.modules), "data_sha256": self._learner.data_sha256}
        return {"role": settings.role, "describes": self._worker.describe(), **self._worker.about(), **self._copies}

    def configure(self, engine: Engine, seed: int) -> dict[str, Any]:
        """Compute with ``engine``, and return the facts about this worker then."""
        return {"role": self._settings.role, **self._worker.configure(engine, seed), **self._copies}

    def compute(self, call: Call, theta: list[pa.Buffer] | None, *outputs: list[pa.Buffer] | None) -> Any:
        """Compute the shard of ``call``, and return the frame of its result in parts.

        For a shard that keeps its output, return the frames of both. ``theta`` and ``outputs`` (in the order of
        ``call.needs``) are None where an earlier call brought them.
        """
        shard, slots = call.shard, self._worker.learner.slots
        for key, counted in call.settled or ():
            self._feedback.settle(key, counted)
        if call.since != self._since:
            self._outputs = {t: kept for t, kept in self._outputs.items() if kept[0].meta_step >= call.since}
            self._since = call.since
        self._take_theta(call, theta)
        inputs = [self._taken(name, token, parts) for (name, token), parts in zip(call.needs, outputs)]
        result, output, stats = self._worker.compute(shard, self._theta, inputs)
        if call.settled is not None and not isinstance(result, Records) and result.slots:
            result = self._feedback.round((shard, call.attempt), result)
        wire = "exact" if call.settled is None else "bfloat16"
        header = ResultHeader(shard, call.attempt, self._worker.name, stats)
        parts = result_parts(result, slots, header, wire)
        if output is None:
            return parts
        self._outputs[call.token] = (shard, output)
        return parts, output_parts(output, header)

    def held(self, token: int) -> list[pa.Buffer] | None:
        """Return the frame of an output that lies here, in parts; None where it does not. Any thread may call it."""
        if token not in (outputs := self._outputs):
            return None
        shard, output = outputs[token]
        return output_parts(output, ResultHeader(shard, 0, self._worker.name))

    def _take_theta(self, call: Call, theta: list[pa.Buffer] | None) -> None:
        if call.version == self._version or not call.version:
            return
        if theta is None:
            raise RejectedError(f"theta {call.version} did not arrive")
        header = ThetaHeader(call.shard.run, call.shard.meta_step, call.shard.round)
        self._theta = decode_theta(theta, self._worker.learner.slots, header, self._worker.device)
        self._version = call.version

    def _taken(self, shard: Shard, token: int, parts: list[pa.Buffer] | None) -> Records:
        """Return the output of ``shard`` that the call ``token`` made."""
        if parts is not None:
            try:
                self._outputs[token] = (shard, decode_output(parts, shard, self._worker.device))
            except RejectedError as error:
                raise MissingError(f"the output of {shard} was refused: {error}", (shard.key,)) from error
        if token not in self._outputs:
            raise MissingError(f"the output of {shard} did not arrive")
        return self._outputs[token][1]
