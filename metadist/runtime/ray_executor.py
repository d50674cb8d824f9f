"""The executor whose workers are Ray actors. The only importer of ray."""

from __future__ import annotations

import contextlib
import logging
import math
import os
import platform
import re
import signal
import socket
import threading
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

from metadist.runtime import ray_environment  # isort: skip  (must precede ray, which reads its environment on import)

import pyarrow as pa
import ray
import ray.exceptions
from torch import Tensor

from metadist.core.engine import Engine
from metadist.core.errors import ConfigError, MetadistError, NonFiniteError, WorkerError, one_of
from metadist.core.executor import Event, Failed, Finished, Shard
from metadist.core.learner import Learner
from metadist.core.state import Contribution, State
from metadist.runtime.groups import WorkerGroup
from metadist.runtime.plan import Plan, Planner, as_it_is
from metadist.runtime.worker import TaskError, Worker
from metadist.wire.codec import RejectedError, decode_result, decode_theta, result_parts, theta_parts
from metadist.wire.feedback import WIRES, ErrorFeedback

log = logging.getLogger(__name__)

#: shards in flight per actor: one computing, one waiting, so that no actor waits for the driver
DEPTH = 2
#: (shard, attempt) of contributions, and whether they were summed
Settled = list[tuple[tuple[Shard, int], bool]]
#: replacements in a row that died before they were ready
MAX_FAILED_STARTS = 3


class _Actor:
    """A worker inside an actor. θ arrives as a zero-copy view of the object store and is decoded once per version."""

    def __init__(self, learner: Learner, name: str, role: str, device: str, gpus: float, threads: int, places: dict[str, str]) -> None:
        self._arguments = (learner, name, role, device, gpus, threads)
        self._places = places

    def start(self) -> dict[str, Any]:
        learner, name, role, device, gpus, threads = self._arguments
        for variable, path in self._places.items():
            os.environ.setdefault(variable, path)  # a node that knows better has its own
        self._worker = Worker(learner, name=name, device=device, gpus=gpus, threads=threads)
        self._version = 0
        self._theta: dict[str, Tensor] = {}
        self._feedback = ErrorFeedback(learner.slots)
        return {"role": role, "describes": self._worker.describe(), **self._worker.about()}

    def configure(self, engine: Engine, seed: int) -> dict[str, Any]:
        return {"role": self._arguments[2], **self._worker.configure(engine, seed)}

    def compute(
        self, theta: list[pa.Buffer] | None, version: int, shard: Shard, attempt: int, settled: Settled | None
    ) -> list[pa.Buffer]:
        """``theta`` is None where an earlier call brought it. ``settled``: what became of earlier contributions, where they
        travel in half precision; None where they don't."""
        slots = self._worker.learner.slots
        for key, counted in settled or ():
            self._feedback.settle(key, counted)
        if version != self._version:
            if theta is None:
                raise RejectedError(f"theta {version} did not arrive")
            self._theta = decode_theta(
                theta, slots, device=self._worker.device, run=shard.run, meta_step=shard.meta_step, round=shard.round
            )
            self._version = version
        result, stats = self._worker.compute(shard, self._theta)
        if settled is not None and isinstance(result, Contribution):
            result = self._feedback.round((shard, attempt), result)
        wire = "exact" if settled is None else "bfloat16"
        return result_parts(result, shard, slots, attempt=attempt, worker=self._worker.name, stats=stats, wire=wire)


@dataclass
class _Member:
    """One actor as the driver sees it: ``about`` is None until it has started and is configured (``starting`` is the one, then
    the other); calls run in submission order."""

    name: str
    group: WorkerGroup
    handle: Any
    starting: Any
    configured: bool = False
    about: dict[str, Any] | None = None
    calls: dict[Any, tuple[Shard, int]] = field(default_factory=dict)
    #: the θ that it was sent
    version: int = 0
    #: what it is to be told of its rounded contributions
    settled: Settled = field(default_factory=list)


class RayExecutor:
    """A group of actors per worker group. A dead actor is replaced at once; nothing here blocks on a starting one.

    ``expected`` is the numerics fingerprint of the run, if known; with ``exact`` a worker with another one is refused.
    ``planner`` makes the run's plan from the device of the first worker that is there; all must comply with it.
    ``note`` shows a message to the user. ``wire`` is how contributions travel; with ``bfloat16`` the result depends on who computed what, so not with ``exact``.
    """

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
        planner: Planner = as_it_is,
        seed: int = 0,
        note: Callable[[str], None] = lambda message: None,
    ) -> None:
        one_of("engine.wire", wire, WIRES)
        if exact and wire != "exact":
            raise ConfigError(f"engine.wire: {wire} rounds by worker, so results depend on who computed what; it goes with engine.exact: false")
        self._wire = wire
        self._planner, self._seed, self._note = planner, seed, note
        self.plan: Plan | None = None
        # Shards of the published θ whose contribution was not yet counted: the first one that arrives is.
        self._open: set[Shard] = set()
        self._learner, self._groups, self._run, self._device = learner, groups, run, device
        self._expected, self._exact = expected, exact
        self._owns_cluster = _connect(groups)
        self._gpus = _shared_gpus(groups)
        self._learner_ref: Any = ray.put(learner)
        self._theta: Any = None
        # Counts what was published: one meta-step may see two θs (its last validation, then the test of the best).
        self._version = 0
        self._members: dict[str, _Member] = {}
        self._events: list[Event] = []
        self._serial = 0
        self._failed_starts = 0
        self._last_death = ""
        try:
            for group in groups:
                for _ in range(group.max):
                    self._start(group)
            self._await_minimum(patience)
        except BaseException:
            self.close()
            raise

    # Members ----------------------------------------------------------------------------------------------------------

    def _start(self, group: WorkerGroup) -> None:
        name = f"{group.role}-{self._serial}"
        self._serial += 1
        options: dict[str, Any] = {"num_cpus": group.cpus, "num_gpus": self._gpus[group], "max_restarts": 0, "max_task_retries": 0}
        threads = str(group.threads)
        direct = "RAY_max_direct_call_object_size"
        options["runtime_env"] = {"env_vars": {"OMP_NUM_THREADS": threads, "MKL_NUM_THREADS": threads, direct: os.environ[direct]}}
        remote = ray.remote(**options)(_Actor)
        gpus = self._gpus[group]
        places = {n: os.path.abspath(os.environ[n]) for n in ("METADIST_DATA", "METADIST_CACHE") if os.environ.get(n)}
        handle: Any = remote.remote(self._learner_ref, name, group.role, self._device, gpus, group.threads, places)
        self._members[name] = _Member(name, group, handle, handle.start.remote())

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
        wanted = ", ".join(f"{g.max} × {{cpus: {g.cpus}, gpus: {self._gpus[g]}}} for role {g.role}" for g in self._groups)
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
                raise WorkerError(f"{MAX_FAILED_STARTS} workers in a row died while starting, the last of: {_short(error)}") from error
            self._replace(member, f"died while starting: {_short(error)}")
            return
        if not member.configured:
            if self.plan is None:
                self.plan = self._planner(about["describes"])
            member.configured = True
            member.starting = member.handle.configure.remote(self.plan.engine, self._seed)
            return
        self._failed_starts = 0
        if about["compile_seconds"]:
            self._note(f"{member.name} compiled in {about['compile_seconds']:.1f} s")
        if self._expected is None:
            self._expected = about["fingerprint"]
        mine = getattr(self._learner.tasks, "data_sha256", None)
        if mine and about["data_sha256"] and about["data_sha256"] != mine:
            raise WorkerError(f"worker {member.name} on {about['host']} has other data: sha256 {about['data_sha256'][:12]}…, the driver {mine[:12]}…")
        if self._exact and about["fingerprint"]["id"] != self._expected["id"]:
            differing = {k: (self._expected.get(k), v) for k, v in about["fingerprint"].items() if k != "id" and self._expected.get(k) != v}
            raise WorkerError(
                f"worker {member.name} on {about['host']} computes other bits than this run ({differing}, run's first); "
                "use like machines, or engine.exact: false to give exactness up"
            )
        member.about = about

    def _replace(self, member: _Member, reason: str) -> None:
        """Forget an actor, start another, and report what it had in flight; only the oldest call can have killed it."""
        self._last_death = f"worker {member.name} {reason}"
        log.warning("worker %s %s; a replacement starts", member.name, reason)
        if self._members.pop(member.name, None) is None:
            return
        with contextlib.suppress(Exception):
            ray.kill(member.handle)
        for position, (shard, attempt) in enumerate(member.calls.values()):
            self._events.append(Failed(shard, attempt, member.name, "lost", reason, guilty=position == 0))
        self._start(member.group)

    # The protocol -----------------------------------------------------------------------------------------------------

    def publish(self, meta_step: int, round: int, state: State) -> int:
        parts = theta_parts(state.slots, self._learner.slots, run=self._run, meta_step=meta_step, round=round)
        size = sum(p.size for p in parts)
        # A small one goes along with the first call: its way through the object store takes longer than the copies.
        self._theta = ray.put(parts) if size > ray_environment.INLINE_BYTES else [pa.py_buffer(p.to_pybytes()) for p in parts]
        self._version += 1
        self._open.clear()
        return size

    def capacity(self, role: str) -> int:
        return sum(DEPTH - len(m.calls) for m in self._members.values() if m.about is not None and m.group.role == role)

    def submit(self, shard: Shard, attempt: int) -> None:
        """To the least busy worker of its role."""
        ready = [m for m in self._members.values() if m.about is not None and m.group.role == shard.role]
        busy_with = {m.name: [s for s, _ in m.calls.values()] for m in ready}
        member = min(ready, key=lambda m: (shard in busy_with[m.name], len(m.calls)))
        settled, member.settled = (None if self._wire == "exact" else member.settled), []
        self._open.add(shard)
        theta, member.version = (None if member.version == self._version else self._theta), self._version
        member.calls[member.handle.compute.remote(theta, self._version, shard, attempt, settled)] = (shard, attempt)

    def cancel(self, shard: Shard, attempt: int) -> None:
        for member in list(self._members.values()):
            if (shard, attempt) in member.calls.values():
                self._kill(member)
                self._replace(member, "was recycled: it did not answer")

    def wait(self, timeout: float) -> list[Event]:
        if not self._events:
            self._poll(timeout)
        events, self._events = self._events, []
        return events

    def _poll(self, timeout: float) -> None:
        waiting = {m.starting: m for m in self._members.values() if m.about is None}
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
                self._joined(member)

    def _collect(self, member: _Member, reference: Any) -> None:
        shard, attempt = member.calls[reference]
        try:
            parts = ray.get(reference)
        except ray.exceptions.RayTaskError as error:
            del member.calls[reference]
            member.version = 0  # it may be θ that did not arrive whole
            self._events.append(_failure(error, shard, attempt, member.name))
            return
        except ray.exceptions.RayError as error:
            self._replace(member, f"died: {_short(error)}")
            return
        del member.calls[reference]
        try:
            result, header = decode_result(parts, shard, self._learner.slots, finite=False, partial=True, rows=shard.count, wire=self._wire)
        except RejectedError as error:
            member.settled.append(((shard, attempt), False))
            self._events.append(Failed(shard, attempt, member.name, "rejected", str(error)))
            return
        member.settled.append(((shard, attempt), shard in self._open))
        self._open.discard(shard)
        self._events.append(Finished(shard, attempt, member.name, result, {**header["stats"], "bytes": sum(p.size for p in parts)}))

    def workers(self) -> dict[str, dict[str, Any]]:
        return {m.name: m.about for m in self._members.values() if m.about is not None}

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
        self._theta = self._learner_ref = None
        if self._owns_cluster:
            ray.shutdown()


def _needed(group: WorkerGroup) -> int:
    """How many must be there to begin: nothing can with none."""
    return max(group.min, min(1, group.max))


def _connect(groups: Sequence[WorkerGroup]) -> bool:
    """Join the cluster in RAY_ADDRESS, or start one here with as many logical CPUs as are asked for; True if either was done."""
    if ray.is_initialized():
        return False
    quiet: dict[str, Any] = {"log_to_driver": False, "logging_level": logging.WARNING}
    address = ray_environment.ADDRESS
    try:
        with _own_signals():
            if address:
                _reach(address)
                ray.init(address=address, **quiet)
            else:
                cpus = max(os.cpu_count() or 1, sum(int(g.cpus * g.max + 0.999) for g in groups))
                ray.init(address="local", num_cpus=cpus, include_dashboard=False, **quiet)
        return True
    except (OSError, ValueError, RuntimeError, OverflowError, ray.exceptions.RayError) as error:
        where = f"join the Ray cluster at RAY_ADDRESS={address}" if address else "start Ray on this machine"
        raise WorkerError(f"can't {where}: {_short(error)}; use --workers 0 to train in this process") from error


@contextlib.contextmanager
def _own_signals() -> Iterator[None]:
    """Ray installs signal handlers when it starts (SIGTERM then raises SystemExit); afterwards the caller's stand again."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    except SystemExit as error:
        raise KeyboardInterrupt from error
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _reach(address: str, timeout: float = 10.0) -> None:
    """ConnectionError at once where nothing listens: ray.init itself would try for many minutes."""
    found = re.fullmatch(r"(?:ray://)?\[?([^\]/]+?)\]?:(\d+)", address)
    if found is not None:
        socket.create_connection((found[1], int(found[2])), timeout=timeout).close()


def _shared_gpus(groups: Sequence[WorkerGroup]) -> dict[WorkerGroup, float]:
    """GPUs for each worker of a group; the ``auto`` ones share evenly what the others leave."""
    left = ray.cluster_resources().get("GPU", 0.0) - sum(g.max * g.gpus for g in groups if g.gpus != "auto")
    share = max(0.0, left) / max(1, sum(g.max for g in groups if g.gpus == "auto"))
    share = float(int(share)) if share >= 1 else math.floor(share * 1e4) / 1e4
    return {g: share if g.gpus == "auto" else float(g.gpus) for g in groups}


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


def _short(error: BaseException) -> str:
    """One line: Ray's own words, or what stands at the end of the remote traceback that they quote."""
    lines = re.sub(r"\x1b\[[0-9;]*m", "", str(error)).strip().splitlines() or [type(error).__name__]
    return " ".join((lines[-1] if any("Traceback (most recent call last)" in line for line in lines) else " ".join(lines)).split())[:300]
