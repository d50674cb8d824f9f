"""What runs inside an actor: θ and needed outputs decoded once, shards computed, results and kept outputs framed."""

from __future__ import annotations

import os
from typing import Any

import pyarrow as pa
from torch import Tensor

from metadist.core.engine import Engine
from metadist.core.round import Shard
from metadist.core.state import Records
from metadist.learners.base import Learner
from metadist.wire.codec import RejectedError, decode_output, decode_theta, output_parts, result_parts
from metadist.wire.error_feedback import ErrorFeedback
from metadist.workers.remote.messages import Call, MissingError
from metadist.workers.worker import Worker


class Actor:
    """A worker inside an actor. θ arrives as a zero-copy view of the object store and is decoded once per version."""

    def __init__(
        self,
        learner: Learner,
        name: str,
        role: str,
        device: str,
        gpus: float,
        threads: int,
        places: dict[str, str],
    ) -> None:
        self._arguments = (learner, name, role, device, gpus, threads)
        self._places = places

    def start(self) -> dict[str, Any]:
        learner, name, role, device, gpus, threads = self._arguments
        for variable, path in self._places.items():
            os.environ.setdefault(variable, path)  # a node that knows better has its own
        self._worker = Worker(learner, name=name, device=device, gpus=gpus, threads=threads)
        self._version = 0
        self._theta: dict[str, Tensor] = {}
        #: by token: what this meta-step's shards kept here or needed, so that no epoch decodes it again
        self._outputs: dict[int, Records] = {}
        self._meta_step = -1
        self._feedback = ErrorFeedback(learner.slots)
        return {"role": role, "describes": self._worker.describe(), **self._worker.about()}

    def configure(self, engine: Engine, seed: int) -> dict[str, Any]:
        return {"role": self._arguments[2], **self._worker.configure(engine, seed)}

    def compute(self, call: Call, theta: list[pa.Buffer] | None, *outputs: list[pa.Buffer] | None) -> Any:
        """The result's frame in parts; with a shard that keeps its output, that and the output's. ``theta`` and ``outputs`` (in
        the order of ``call.needs``) are None where an earlier call brought them."""
        shard, slots = call.shard, self._worker.learner.slots
        for key, counted in call.settled or ():
            self._feedback.settle(key, counted)
        if shard.meta_step != self._meta_step:
            self._outputs.clear()
            self._meta_step = shard.meta_step
        self._take_theta(call, theta)
        inputs = [self._taken(name, token, parts) for (name, token), parts in zip(call.needs, outputs)]
        result, output, stats = self._worker.compute(shard, self._theta, inputs)
        if call.settled is not None and not isinstance(result, Records) and result.slots:
            result = self._feedback.round((shard, call.attempt), result)
        wire = "exact" if call.settled is None else "bfloat16"
        parts = result_parts(
            result, shard, slots, attempt=call.attempt, worker=self._worker.name, stats=stats, wire=wire
        )
        if output is None:
            return parts
        self._outputs[call.token] = output
        return parts, output_parts(output, shard, attempt=call.attempt, worker=self._worker.name)

    def _take_theta(self, call: Call, theta: list[pa.Buffer] | None) -> None:
        if call.version == self._version:
            return
        if theta is None:
            raise RejectedError(f"theta {call.version} did not arrive")
        shard, worker = call.shard, self._worker
        self._theta = decode_theta(
            theta,
            worker.learner.slots,
            device=worker.device,
            run=shard.run,
            meta_step=shard.meta_step,
            round=shard.round,
        )
        self._version = call.version

    def _taken(self, shard: Shard, token: int, parts: list[pa.Buffer] | None) -> Records:
        """The output of ``shard`` that the call ``token`` made."""
        if parts is not None:
            try:
                self._outputs[token] = decode_output(parts, shard, device=self._worker.device)
            except RejectedError as error:
                raise MissingError(f"the output of {shard} was refused: {error}", (shard.key,)) from error
        if token not in self._outputs:
            raise MissingError(f"the output of {shard} did not arrive")
        return self._outputs[token]
