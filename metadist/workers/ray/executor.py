"""The executor whose workers are Ray actors."""

from __future__ import annotations

import contextlib
import logging
import math
import os
import platform
import signal
import time
import traceback
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

from metadist.workers.ray import environment as ray_environment  # isort: skip  (must precede ray, which reads its environment on import)

import pyarrow as pa
import ray
import ray.exceptions

from metadist.config.groups import WorkerGroup
from metadist.core.errors import ConfigError, MetadistError, NonFiniteError, WorkerError, one_of
from metadist.core.round import Event, Failed, Finished, OutputKey, Shard
from metadist.core.state import State
from metadist.engine.plan import Plan
from metadist.learners.base import Learner
from metadist.wire.codec import RejectedError, decode_result, theta_parts
from metadist.wire.error_feedback import WIRES
from metadist.workers.actor import Actor
from metadist.workers.kept_outputs import Kept
from metadist.workers.numerics import Numerics
from metadist.workers.plan import Planner
from metadist.workers.ray.cluster import connect, shared_gpus, short
from metadist.workers.remote.messages import Call, Content, MissingError, Settled
from metadist.workers.worker import TaskError

log = logging.getLogger(__name__)

#: shards in flight per actor: one computing, one waiting, so that no actor waits for the driver
DEPTH = 2
#: what an environment worker answers with goes through the driver up to so many bytes; trials are more, and don't
STATISTICS_BYTES = 16 << 10
#: replacements in a row that died before they were ready
MAX_FAILED_STARTS = 3
#: what a worker from outside needs is fetched from the object store within so many seconds, or rolled out anew
RELAY_SECONDS = 60.0


@dataclass(frozen=True)
class _Output:
    """What a shard kept, as the driver knows it: a reference that outlives the worker, and never the content."""

    shard: Shard
    token: int
    reference: Any


@dataclass(frozen=True)
class _Asked:
    """A call under way, with references to the outputs that it needs and to the one that it keeps."""

    call: Call
    needs: tuple[_Output, ...] = ()
    keeps: Any = None

    @property
    def attempt(self) -> tuple[Shard, int]:
        return self.call.shard, self.call.attempt


@dataclass
class _Member:
    """One actor as the driver sees it: ``about`` is None until it has started and is configured (``starting`` is the one, then
    the other; None between them, where there is no plan yet); calls run in submission order."""

    name: str
    group: WorkerGroup
    handle: Any
    starting: Any
    configured: bool = False
    about: dict[str, Any] | None = None
    calls: dict[Any, _Asked] = field(default_factory=dict)
    #: the θ that it was sent
    version: int = 0
    #: what it is to be told of its rounded contributions
    settled: Settled = field(default_factory=list)
    #: tokens of the outputs that it has decoded, or made
    holds: set[int] = field(default_factory=set)
    #: asked for in the middle of the run, which goes on without it where it can't serve
    extra: bool = False


class RayExecutor:
    """A group of actors per worker group. A dead actor is replaced at once; nothing here blocks on a starting one.

    ``expected`` is the numerics fingerprint of the run, if known (the learners', with the environments' as ``environment``
    where that is another one); with ``exact`` a worker with another one than its role's is refused.
    ``planner`` makes the run's plan from the device of the first learner that is there; all must comply with it. Beside other
    executors, whose workers have a word in both, ``numerics`` and ``plan`` are given.
    ``note`` shows a message to the user. ``wire`` is how contributions travel; with ``bfloat16`` the result depends on who computed what, so not with ``exact``.
    """

    blocks = True

    def __init__(
        self,
        learner: Learner,
        groups: Sequence[WorkerGroup],
        *,
        run: str,
        device: str = "auto",
        expected: dict[str, Any] | None = None,
        exact: bool = True,
        patience: float = 60.0,
        wire: str = "exact",
        planner: Planner = Plan.eager,
        seed: int = 0,
        note: Callable[[str], None] = lambda message: None,
        numerics: Numerics | None = None,
        plan: Plan | None = None,
    ) -> None:
        one_of("engine.wire", wire, WIRES)
        if exact and wire != "exact":
            raise ConfigError(
                f"engine.wire: {wire} rounds by worker, so results depend on who computed what; it goes with engine.exact: false"
            )
        self._wire, self._planner, self._seed, self._note = wire, planner, seed, note
        self.plan = plan
        # Shards of the published θ whose contribution was not yet counted: the first one that arrives is.
        self._open: set[Shard] = set()
        self._learner, self._groups, self._run, self._device = learner, groups, run, device
        self._numerics = numerics or Numerics(groups, expected, exact)
        self._expected = self._numerics.expected
        self._owns_cluster = connect(groups)
        # On a machine of our own logical CPUs only count; a cluster that is joined may get more of them at any time.
        self._cpus = (
            ray.cluster_resources().get("CPU", 0.0) if self._owns_cluster and not ray_environment.ADDRESS else math.inf
        )
        self._gpus = shared_gpus(groups)
        self._learner_ref: Any = ray.put(learner)
        # θ with the number of its publication: one meta-step sees several (of its rounds, its validation, the test of the best).
        self._kept: Kept[tuple[int, Any], _Output] = Kept()
        self._version = self._token = 0
        self._members: dict[str, _Member] = {}
        self._events: list[Event] = []
        self._serial = self._failed_starts = 0
        try:
            for group in groups:
                for _ in range(group.max):
                    self._start(group)
            self._await_minimum(patience)
        except BaseException:
            self.close()
            raise

    # Members ----------------------------------------------------------------------------------------------------------

    def _start(self, group: WorkerGroup, extra: bool = False) -> None:
        name = f"{group.role}-{self._serial}"
        self._serial += 1
        room = self._cpus - sum(m.group.cpus for m in self._members.values())
        options: dict[str, Any] = {
            "num_cpus": group.cpus if group.cpus <= room else 0,
            "num_gpus": self._gpus[group],
            "max_restarts": 0,
            "max_task_retries": 0,
        }
        threads, gpus, learns = str(group.threads), self._gpus[group], group.role == "learner"
        direct = "RAY_max_direct_call_object_size"
        limit = os.environ[direct] if learns else str(STATISTICS_BYTES)
        options["runtime_env"] = {"env_vars": {"OMP_NUM_THREADS": threads, "MKL_NUM_THREADS": threads, direct: limit}}
        remote = ray.remote(**options)(Actor)
        device = self._device if learns or gpus else "cpu"
        given = {n: os.environ[n] for n in ("METADIST_DATA", "METADIST_CACHE") if os.environ.get(n)}
        places = {n: where if "://" in where else os.path.abspath(where) for n, where in given.items()}
        handle: Any = remote.remote(self._learner_ref, name, group.role, device, gpus, group.threads, places)
        self._members[name] = _Member(name, group, handle, handle.start.remote(), extra=extra)

    def _await_minimum(self, patience: float) -> None:
        """``patience`` is for workers that aren't there; compiling takes as long as it takes."""
        deadline, told = time.monotonic() + patience, False
        while short := [g for g in self._groups if self._ready(g) < _needed(g)]:
            self._poll(0.25)
            if self.plan is not None and self.plan.engine.compile and not told:
                told = True
                self._note("compiling…")
            if any(m.configured for m in self._members.values()):
                deadline = time.monotonic() + patience
            if time.monotonic() > deadline:
                group = short[0]
                raise WorkerError(
                    f"workers: {self._ready(group)} of {_needed(group)} {group.role}s were ready after {patience:.0f} s; {self.shortage()}"
                )

    def _ready(self, group: WorkerGroup) -> int:
        return sum(m.about is not None and m.group is group for m in self._members.values())

    def shortage(self) -> str:
        asked = {g: sum(m.group is g for m in self._members.values()) for g in self._groups}
        wanted = ", ".join(
            f"{asked[g]} × {{cpus: {g.cpus}, gpus: {self._gpus[g]}}} for role {g.role}" for g in self._groups
        )
        total, free = ray.cluster_resources(), ray.available_resources()
        there = ", ".join(f"{total.get(r, 0):g} {r}s ({free.get(r, 0):g} free)" for r in ("CPU", "GPU"))
        return f"asked for {wanted}; the cluster has {there}. Ask for fewer with --workers, or add nodes"

    def _joined(self, member: _Member) -> None:
        try:
            about = ray.get(member.starting)
        except ray.exceptions.RayTaskError as error:
            cause = error.cause if isinstance(error.cause, Exception) else error
            if isinstance(cause, MetadistError):
                raise cause from None
            raise WorkerError(f"worker {member.name} can't start: {type(cause).__name__}: {cause}") from error
        except ray.exceptions.RayError as error:
            self._failed_starts += 1
            if self._failed_starts >= MAX_FAILED_STARTS:
                raise WorkerError(
                    f"{MAX_FAILED_STARTS} workers in a row died while starting, the last of: {short(error)}"
                ) from error
            self._replace(member, f"died while starting: {short(error)}")
            return
        if not member.configured:
            member.configured, member.starting = True, None
            if self.plan is None and member.group.role == "learner":
                self.plan = self._planner(about["describes"])
            self._configure()
            return
        self._failed_starts = 0
        if about["compile_seconds"]:
            self._note(f"{member.name} compiled in {about['compile_seconds']:.1f} s")
        mine = self._learner.data_sha256
        if mine and about["data_sha256"] and about["data_sha256"] != mine:
            raise WorkerError(
                f"worker {member.name} on {about['host']} has other data: sha256 {about['data_sha256'][:12]}…, the driver {mine[:12]}…"
            )
        if refusal := self._numerics.refusal(member.name, about["host"], member.group.role, about["fingerprint"]):
            raise WorkerError(refusal)
        member.about = about

    def _configure(self) -> None:
        """Those that have started, once there is a plan."""
        for member in self._members.values():
            if self.plan is not None and member.configured and member.about is None and member.starting is None:
                member.starting = member.handle.configure.remote(self.plan.engine, self._seed)

    def _replace(self, member: _Member, reason: str) -> None:
        """Forget an actor, start another, and report what it had in flight; only the oldest call can have killed it."""
        if self._forget(member, reason, blame=True):
            log.warning("worker %s %s; a replacement starts", member.name, reason)
            self._start(member.group, member.extra)

    def _forget(self, member: _Member, reason: str, blame: bool = False) -> bool:
        """False where it was forgotten before."""
        if self._members.pop(member.name, None) is None:
            return False
        with contextlib.suppress(Exception):
            ray.kill(member.handle)
        for position, (shard, attempt) in enumerate(asked.attempt for asked in member.calls.values()):
            self._events.append(Failed(shard, attempt, member.name, "lost", reason, guilty=blame and position == 0))
        return True

    def cannot_resize(self, role: str, count: int) -> str | None:
        groups = [g for g in self._groups if g.role == role]
        if not groups:
            return (
                f"this run has no {role}s, so none can be added; it has {', '.join(g.role + 's' for g in self._groups)}"
            )
        gpus = self._gpus[groups[0]] * count
        if gpus and self._cpus < math.inf and gpus > (there := ray.cluster_resources().get("GPU", 0.0)):
            return f"{count} {role}s would take {gpus:g} GPUs ({self._gpus[groups[0]]:g} each), and this machine has {there:g}"
        return None

    def resize(self, role: str, count: int) -> None:
        group = next(g for g in self._groups if g.role == role)
        members = [m for m in reversed(self._members.values()) if m.group.role == role]
        for _ in range(count - len(members)):
            self._start(group, extra=True)
        # Those that aren't ready go first, then those that are idle.
        for member in sorted(members, key=lambda m: (m.about is not None, len(m.calls)))[
            : max(0, len(members) - count)
        ]:
            self._forget(member, "was told to go")

    # The protocol -----------------------------------------------------------------------------------------------------

    def publish(self, meta_step: int, round: int, state: State) -> int:
        parts = theta_parts(state.slots, self._learner.slots, run=self._run, meta_step=meta_step, round=round)
        size = sum(p.size for p in parts)
        # A small one goes along with the first call: its way through the object store takes longer than the copies.
        theta = ray.put(parts) if size > ray_environment.INLINE_BYTES else [pa.py_buffer(p.to_pybytes()) for p in parts]
        self._version += 1
        self._kept.publish(round, (self._version, theta))
        self._open.clear()
        if round == 0:
            for member in self._members.values():
                member.holds.clear()
        return size

    def capacity(self, role: str) -> int:
        return sum(DEPTH - len(m.calls) for m in self._members.values() if m.about is not None and m.group.role == role)

    def submit(self, shard: Shard, attempt: int) -> None:
        """To the least busy worker of its role; among those to one that holds the outputs that it needs."""
        if missing := self._kept.lacking(shard):
            self._events.append(
                Failed(shard, attempt, "driver", "missing", "an output that it needs is not there", missing=missing)
            )
            return
        needs = tuple(self._kept.outputs[key] for key in shard.needs)
        ready = [m for m in self._members.values() if m.about is not None and m.group.role == shard.role]
        busy_with = {m.name: [asked.call.shard for asked in m.calls.values()] for m in ready}
        member = min(
            ready, key=lambda m: (shard in busy_with[m.name], len(m.calls), sum(o.token not in m.holds for o in needs))
        )
        self._ask(member, shard, attempt, needs)

    def _ask(self, member: _Member, shard: Shard, attempt: int, needs: tuple[_Output, ...]) -> None:
        settled, member.settled = (None if self._wire == "exact" else member.settled), []
        self._open.add(shard)
        self._token += 1
        version, theta = self._kept.thetas[shard.round]
        call = Call(shard, attempt, version, self._token, tuple((o.shard, o.token) for o in needs), settled)
        # As arguments of the call itself, references arrive as what they refer to.
        content = [None if o.token in member.holds else o.reference for o in needs]
        method = member.handle.compute.options(num_returns=2) if shard.keeps else member.handle.compute
        answer = method.remote(call, None if member.version == version else theta, *content)
        member.version = version
        member.holds.update(o.token for o in needs)
        result, kept = answer if shard.keeps else (answer, None)
        member.calls[result] = _Asked(call, needs, kept)

    def cancel(self, shard: Shard, attempt: int) -> None:
        for member in list(self._members.values()):
            if any(asked.attempt == (shard, attempt) for asked in member.calls.values()):
                self._kill(member)
                self._replace(member, "was recycled: it did not answer")

    def wait(self, timeout: float) -> list[Event]:
        if not self._events:
            self._poll(timeout)
        events, self._events = self._events, []
        return events

    def _poll(self, timeout: float) -> None:
        waiting = {m.starting: m for m in self._members.values() if m.about is None and m.starting is not None}
        waiting.update((call, m) for m in self._members.values() for call in m.calls)
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
            elif member.name in self._members:
                try:
                    self._joined(member)
                except MetadistError as error:
                    if not member.extra:
                        raise
                    self._failed_starts = 0
                    self._forget(member, "can't serve")
                    self._note(f"the run goes on without the additional worker {member.name}: {error}")

    def _collect(self, member: _Member, reference: Any) -> None:
        asked = member.calls[reference]
        shard, attempt = asked.attempt
        try:
            parts = ray.get(reference)
        except ray.exceptions.RayTaskError as error:
            del member.calls[reference]
            member.version = 0  # it may be θ that did not arrive whole, or an output
            member.holds.clear()
            self._events.append(
                self._lost_outputs(error, asked, member.name) or _failure(error, shard, attempt, member.name)
            )
            return
        except ray.exceptions.RayError as error:
            self._replace(member, f"died: {short(error)}")
            return
        del member.calls[reference]
        try:
            result, header = decode_result(
                parts, shard, self._learner.slots, finite=False, partial=True, rows=shard.count, wire=self._wire
            )
        except RejectedError as error:
            member.settled.append(((shard, attempt), False))
            self._events.append(Failed(shard, attempt, member.name, "rejected", str(error)))
            return
        member.settled.append(((shard, attempt), shard in self._open))
        self._open.discard(shard)
        if shard.keeps and self._kept.thetas.get(shard.round, (0, None))[0] == asked.call.version:
            self._kept.keep(shard, _Output(shard, asked.call.token, asked.keeps))
            member.holds.add(asked.call.token)
        self._events.append(
            Finished(shard, attempt, member.name, result, {**header["stats"], "bytes": sum(p.size for p in parts)})
        )

    def _lost_outputs(self, error: ray.exceptions.RayTaskError, asked: _Asked, worker: str) -> Failed | None:
        """Forget the outputs that the call lacked, if it is they that it failed for."""
        cause, lost = error.cause, tuple[OutputKey, ...]()
        if isinstance(cause, MissingError):
            lost, reason = cause.keys, str(cause)
        elif isinstance(cause, ray.exceptions.ObjectLostError):
            lost = tuple(o.shard.key for o in asked.needs if o.reference.hex() == cause.object_ref_hex)
            reason = f"an output that it needs is lost with its node ({type(cause).__name__})"
        else:
            return None
        # One that came to be anew meanwhile is not lost: asking again is enough.
        there = {o.shard.key for o in asked.needs if self._kept.outputs.get(o.shard.key) is o}
        missing = tuple(key for key in lost if key in there)
        for key in missing:
            del self._kept.outputs[key]
        return Failed(*asked.attempt, worker, "missing", reason, missing=missing)

    def workers(self) -> dict[str, dict[str, Any]]:
        return self._numerics.of_run({m.name: m.about for m in self._members.values() if m.about is not None})

    # Beside other executors -------------------------------------------------------------------------------------------

    def lacking(self, shard: Shard) -> tuple[OutputKey, ...]:
        return self._kept.lacking(shard)

    def hold(self, round: int) -> None:
        self._kept.hold(round)

    def output(self, key: OutputKey) -> tuple[Shard, Content] | None:
        """Fetched into the driver only when it is read."""
        kept = self._kept.outputs.get(key)
        return None if kept is None else (kept.shard, lambda: ray.get(kept.reference, timeout=RELAY_SECONDS))

    def adopt(self, shard: Shard, content: Content) -> None:
        self._token += 1
        self._kept.keep(shard, _Output(shard, self._token, ray.put(content())))

    def _kill(self, member: _Member) -> None:
        if member.about is not None and member.about["host"] == platform.node():
            with contextlib.suppress(ProcessLookupError, PermissionError):
                os.kill(member.about["pid"], signal.SIGKILL)  # reaches a stopped process too

    def kill_busy(self) -> str | None:
        """SIGKILL a worker that has a shard in flight, to prove that it doesn't matter; returns its name."""
        for member in self._members.values():
            if member.about is not None and member.calls:
                self._kill(member)
                return member.name
        return None

    def close(self) -> None:
        for member in self._members.values():
            with contextlib.suppress(Exception):
                ray.kill(member.handle)
        self._members.clear()
        self._kept, self._learner_ref = Kept(), None
        if self._owns_cluster:
            ray.shutdown()


def _needed(group: WorkerGroup) -> int:
    """How many must be there to begin: nothing can with none."""
    return max(group.min, min(1, group.max))


def _failure(error: ray.exceptions.RayTaskError, shard: Shard, attempt: int, worker: str) -> Failed:
    cause = error.cause
    if isinstance(cause, NonFiniteError):
        return Failed(shard, attempt, worker, "rejected", str(cause), cause.tasks)
    if isinstance(cause, MetadistError):
        raise cause from None
    if isinstance(cause, RejectedError):
        return Failed(shard, attempt, worker, "rejected", str(cause))
    tasks = cause.tasks if isinstance(cause, TaskError) else ()
    detail = "".join(traceback.format_exception(error))
    return Failed(shard, attempt, worker, "error", str(cause), tasks, detail=detail)
