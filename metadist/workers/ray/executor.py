"""The executor whose workers are Ray actors."""

from __future__ import annotations

import time
import traceback
from collections.abc import Sequence
from typing import Any

# Ray reads its environment when it is imported, so this import comes first.
from metadist.workers.ray import environment as ray_environment  # isort: skip

import pyarrow as pa
import ray
import ray.exceptions

from metadist.config.groups import WorkerGroup
from metadist.core.errors import ConfigError, MetadistError, NonFiniteError, one_of
from metadist.core.round import Event, Failed, Finished, OutputKey, Shard
from metadist.core.state import State
from metadist.engine.plan import Plan
from metadist.learners.base import Learner
from metadist.wire.codec import RejectedError, ThetaHeader, decode_result, theta_parts
from metadist.wire.error_feedback import WIRES
from metadist.workers.calls import Content, MissingError
from metadist.workers.kept_outputs import KeepingExecutor, KeptOutput, KeptOutputs
from metadist.workers.numerics import Numerics
from metadist.workers.plan import Planner
from metadist.workers.ray.actors import ActorPool, Asked, Member
from metadist.workers.ray.cluster import short
from metadist.workers.settings import RunSettings
from metadist.workers.states import reachable, stores
from metadist.workers.worker import TaskError

#: shards in flight per actor: one computing, one waiting, so that no actor waits for the driver
DEPTH = 2
#: seconds to fetch an output from the object store for a remote worker; after that its shard is computed again
RELAY_SECONDS = 60.0


class RayExecutor(KeepingExecutor[Any, Any]):
    """Compute shards on one group of Ray actors per worker group.

    ``numerics`` judges every actor. ``planner`` makes the run's plan from the device of the first learner; ``plan``
    is given where remote workers have one already. Kept outputs stay in Ray's object store and outlive their actors;
    the driver holds references. With ``settings.wire`` bfloat16 the result depends on which worker computed which
    shard, so exactness must be given up. WorkerError where the minimum of actors is not ready in time.
    """

    blocks = True

    def __init__(
        self,
        learner: Learner,
        groups: Sequence[WorkerGroup],
        settings: RunSettings,
        numerics: Numerics,
        planner: Planner = Plan.eager,
        plan: Plan | None = None,
    ) -> None:
        one_of("engine.wire", settings.wire, WIRES)
        if numerics.exact and settings.wire != "exact":
            raise ConfigError(
                f"engine.wire: {settings.wire} rounds by worker, so the result depends on which worker computed which "
                "shard; use it with engine.exact: false"
            )
        super().__init__()
        self._learner, self._settings, self._numerics = learner, settings, numerics
        #: shards of the published θ whose contribution was not counted yet: the first that arrives is
        self._open: set[Shard] = set()
        self._events: list[Event] = []
        self._pool = ActorPool(learner, groups, settings, numerics, planner, plan)
        try:
            self._pool.start(settings.patience)
        except BaseException:
            self.close()
            raise
        self.plan = self._pool.plan

    # Giving out shards ------------------------------------------------------------------------------------------------

    def publish(self, meta_step: int, round: int, state: State) -> int:
        header = ThetaHeader(self._settings.run, meta_step, round)
        parts = theta_parts(state.slots, self._learner.slots, header)
        size = sum(p.size for p in parts)
        # A small θ travels with the first call: its way through the object store takes longer than the copies.
        theta = ray.put(parts) if size > ray_environment.INLINE_BYTES else [pa.py_buffer(p.to_pybytes()) for p in parts]
        self._kept.publish(meta_step, round, theta)
        self._open.clear()
        if round == 0:
            states = self._kept.tokens
            for member in self._pool.members.values():
                member.holds &= states
        return size

    def capacity(self, role: str) -> int:
        return sum(DEPTH - len(m.calls) for m in self._pool.ready(role))

    def near(self, shard: Shard) -> bool:
        room = (m for m in self._pool.ready(shard.role) if len(m.calls) < DEPTH)
        return any(self._kept.lies_with(shard, m.holds) for m in room)

    def submit(self, shard: Shard, attempt: int) -> None:
        """Ask the least busy worker of the shard's role; among equals, the one that holds the most needed outputs.

        States are larger than trials: a worker with room that holds them goes before one that is less busy.
        """
        if missing := self._missing(shard, attempt):
            self._events.append(missing)
            return
        if stores(shard) and not reachable(shard, (m.about["host"] for m in self._pool.ready(shard.role) if m.about)):
            self._events.append(self._by_driver(shard, attempt))
            return
        needs = self._kept.needed(shard)

        def burden(member: Member) -> tuple[bool, bool, int, int]:
            twice = any(asked.call.shard == shard for asked in member.calls.values())
            lacking = sum(o.token not in member.holds for o in needs)
            far = shard.carries and (lacking > 0 or len(member.calls) >= DEPTH)
            return twice, far, len(member.calls), lacking

        self._ask(min(self._pool.ready(shard.role), key=burden), shard, attempt)

    def _ask(self, member: Member, shard: Shard, attempt: int) -> None:
        settled, member.settled = (None if self._settings.wire == "exact" else member.settled), []
        self._open.add(shard)
        call = self._kept.call(shard, attempt, settled)
        version, theta = self._kept.theta(shard)
        # Ray passes references that are arguments of the call itself as their values.
        outputs = [None if o.token in member.holds else o.stored for o in self._kept.needed(shard)]
        method = member.handle.compute.options(num_returns=2) if shard.keeps else member.handle.compute
        answer = method.remote(call, None if member.version == version else theta, *outputs)
        member.version = version or member.version
        member.holds.update(token for _, token in call.needs)
        result, kept = answer if shard.keeps else (answer, None)
        member.calls[result] = Asked(call, kept)

    def cancel(self, shard: Shard, attempt: int) -> None:
        for member in list(self._pool.members.values()):
            if any(asked.attempt == (shard, attempt) for asked in member.calls.values()):
                self._pool.kill(member)
                self._pool.replace(member, "was recycled: it did not answer")

    # Taking results ---------------------------------------------------------------------------------------------------

    def wait(self, timeout: float) -> list[Event]:
        if not self._events and not self._pool.lost:
            self._poll(timeout)
        events, self._events = [*self._events, *self._pool.lost], []
        self._pool.lost.clear()
        return events

    def _poll(self, timeout: float) -> None:
        waiting = self._pool.starting()
        waiting.update((call, m) for m in self._pool.members.values() for call in m.calls)
        if not waiting:
            time.sleep(min(timeout, 0.05))
            return
        ready, _ = ray.wait(list(waiting), num_returns=1, timeout=timeout)
        if ready:
            ready, _ = ray.wait(list(waiting), num_returns=len(waiting), timeout=0)
        for reference in ready:
            member = waiting[reference]
            if reference in member.calls:
                self._collect(member, reference)
            else:
                self._pool.progressed(member)

    def _collect(self, member: Member, reference: Any) -> None:
        asked = member.calls[reference]
        try:
            parts = ray.get(reference)
        except ray.exceptions.RayTaskError as error:
            del member.calls[reference]
            member.version = 0  # θ or an output may not have arrived whole
            member.holds.clear()
            self._events.append(self._lost_output(error, asked, member.name) or _failure(error, asked, member.name))
        except ray.exceptions.RayError as error:
            self._pool.replace(member, f"died: {short(error)}")
        else:
            del member.calls[reference]
            self._events.append(self._received(member, asked, parts))

    def _received(self, member: Member, asked: Asked, parts: list[pa.Buffer]) -> Event:
        shard, attempt = asked.attempt
        try:
            result, header = decode_result(parts, shard, self._learner.slots, self._settings.wire)
        except RejectedError as error:
            member.settled.append(((shard, attempt), False))
            return Failed(shard, attempt, member.name, "rejected", str(error))
        member.settled.append(((shard, attempt), shard in self._open))
        self._open.discard(shard)
        if shard.keeps and self._kept.keep_answer(asked.call, asked.keeps):
            member.holds.add(asked.call.token)
        stats = {**header.stats, "bytes": sum(p.size for p in parts)}
        return Finished(shard, attempt, member.name, result, stats)

    def _lost_output(self, error: ray.exceptions.RayTaskError, asked: Asked, worker: str) -> Failed | None:
        """Return the event where the call failed for outputs that it lacked, and forget those; else None."""
        cause, keys = error.cause, tuple[OutputKey, ...]()
        if isinstance(cause, MissingError):
            return self._lost(asked.call, cause.keys, str(cause), worker)
        if not isinstance(cause, ray.exceptions.ObjectLostError):
            return None
        outputs = self._kept.outputs
        for shard, _ in asked.call.needs:
            if shard.key in outputs and outputs[shard.key].stored.hex() == cause.object_ref_hex:
                keys = (*keys, shard.key)
        reason = f"an output that it needs is lost with its node ({type(cause).__name__})"
        return self._lost(asked.call, keys, reason, worker)

    # Sharing outputs with another executor ----------------------------------------------------------------------------

    def content_of(self, output: KeptOutput[Any]) -> Content:
        return lambda: ray.get(output.stored, timeout=RELAY_SECONDS)

    def stored_from(self, shard: Shard, content: Content) -> Any:
        return ray.put(content())

    # Workers ----------------------------------------------------------------------------------------------------------

    def workers(self) -> dict[str, dict[str, Any]]:
        return self._numerics.of_run({m.name: m.about for m in self._pool.members.values() if m.about is not None})

    def shortage(self) -> str:
        return self._pool.shortage()

    def cannot_resize(self, role: str, count: int) -> str | None:
        return self._pool.cannot_resize(role, count)

    def resize(self, role: str, count: int) -> None:
        self._pool.resize(role, count)

    def kill_busy(self) -> str | None:
        """SIGKILL a worker that has a shard in flight, and return its name."""
        for member in self._pool.members.values():
            if member.about is not None and member.calls:
                self._pool.kill(member)
                return member.name
        return None

    def close(self) -> None:
        self._kept = KeptOutputs()
        self._pool.close()


def _failure(error: ray.exceptions.RayTaskError, asked: Asked, worker: str) -> Failed:
    """Return the event for an exception in the actor. A mistake of the user's is raised here instead."""
    (shard, attempt), cause = asked.attempt, error.cause
    if isinstance(cause, NonFiniteError):
        return Failed(shard, attempt, worker, "rejected", str(cause), cause.tasks)
    if isinstance(cause, MetadistError):
        raise cause from None
    if isinstance(cause, RejectedError):
        return Failed(shard, attempt, worker, "rejected", str(cause))
    tasks = cause.tasks if isinstance(cause, TaskError) else ()
    detail = "".join(traceback.format_exception(error))
    return Failed(shard, attempt, worker, "error", str(cause), tasks, detail=detail)
