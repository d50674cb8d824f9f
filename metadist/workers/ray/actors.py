"""The Ray actors of a run: started, configured, replaced when they die, resized."""

from __future__ import annotations

import contextlib
import logging
import math
import os
import platform
import signal
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

# Ray reads its environment when it is imported, so this import comes first.
from metadist.workers.ray import environment as ray_environment  # isort: skip

import ray
import ray.exceptions

from metadist.config.groups import WorkerGroup
from metadist.core.errors import CompilerError, MetadistError, WorkerError
from metadist.core.round import Failed, Shard
from metadist.engine.plan import Device, Plan
from metadist.learners.base import Learner
from metadist.workers.actor import Actor, ActorSettings
from metadist.workers.calls import Call, Settled
from metadist.workers.copies import refusal_of_copies
from metadist.workers.numerics import Numerics
from metadist.workers.plan import Planner, planned_without_compiler
from metadist.workers.ray.cluster import connect, shared_gpus, short
from metadist.workers.settings import RunSettings

log = logging.getLogger(__name__)

#: replacements in a row that died before they were ready
MAX_FAILED_STARTS = 3
#: answers with trials or states pass through the driver up to this many bytes: statistics are fewer, trials are more
STATISTICS_BYTES = 16 << 10


@dataclass(frozen=True)
class Asked:
    """A call in progress, with the reference to the output that its shard keeps."""

    call: Call
    keeps: Any = None

    @property
    def attempt(self) -> tuple[Shard, int]:
        return self.call.shard, self.call.attempt


@dataclass
class Member:
    """One actor as the driver sees it. Its calls run in the order of submission.

    ``about`` is None until the actor has started and is configured. ``starting`` refers to the start, then to the
    configuration; it is None between the two while there is no plan.
    """

    name: str
    group: WorkerGroup
    handle: Any
    starting: Any
    configured: bool = False
    about: dict[str, Any] | None = None
    calls: dict[Any, Asked] = field(default_factory=dict)
    #: the version of θ that it was sent
    version: int = 0
    #: whether its rounded contributions were counted, for its next call
    settled: Settled = field(default_factory=list)
    #: tokens of the outputs that it has decoded or made
    holds: set[int] = field(default_factory=set)
    #: added by ``resize``: where it can't serve, the run continues without it
    extra: bool = False


class ActorPool:
    """One group of actors per worker group. A dead actor is replaced immediately.

    After ``start`` nothing blocks on a starting actor. ``planner`` makes the run's plan from the device of the first
    learner; a ``plan`` that is given counts instead. All actors must comply with the plan. Calls that are lost with
    their actor are appended to ``lost``.
    """

    def __init__(
        self,
        learner: Learner,
        groups: Sequence[WorkerGroup],
        settings: RunSettings,
        numerics: Numerics,
        planner: Planner,
        plan: Plan | None,
    ) -> None:
        self.plan = plan
        self.members: dict[str, Member] = {}
        self.lost: list[Failed] = []
        self._learner, self._groups, self._settings = learner, groups, settings
        self._numerics, self._planner = numerics, planner
        self._owns_cluster = connect(groups)
        # On a machine of our own, logical CPUs only count; a cluster that was joined may get more of them at any time.
        own = self._owns_cluster and not ray_environment.ADDRESS
        self._cpus = ray.cluster_resources().get("CPU", 0.0) if own else math.inf
        self._gpus = shared_gpus(groups)
        self._learner_ref: Any = ray.put(learner)
        self._serial = self._failed_starts = 0
        #: the device that the plan was made for, where this pool made it
        self._planned_for: Device | None = None

    # Starting ---------------------------------------------------------------------------------------------------------

    def _start(self, group: WorkerGroup, extra: bool = False) -> None:
        name = f"{group.role}-{self._serial}"
        self._serial += 1
        room = self._cpus - sum(m.group.cpus for m in self.members.values())
        gpus, learns = self._gpus[group], group.role == "learner"
        threads, direct = str(group.threads), "RAY_max_direct_call_object_size"
        limit = os.environ[direct] if learns and not self._learner.has_states else str(STATISTICS_BYTES)
        options: dict[str, Any] = {
            "num_cpus": group.cpus if group.cpus <= room else 0,
            "num_gpus": gpus,
            "max_restarts": 0,
            "max_task_retries": 0,
            "runtime_env": {"env_vars": {"OMP_NUM_THREADS": threads, "MKL_NUM_THREADS": threads, direct: limit}},
        }
        given = {n: os.environ[n] for n in ("METADIST_DATA", "METADIST_CACHE") if os.environ.get(n)}
        places = {n: where if "://" in where else os.path.abspath(where) for n, where in given.items()}
        device = self._settings.device if learns or gpus else "cpu"
        settings = ActorSettings(name, group.role, device, gpus, group.threads, places, self._settings.modules)
        handle: Any = ray.remote(**options)(Actor).remote(self._learner_ref, settings)
        self.members[name] = Member(name, group, handle, handle.start.remote(), extra=extra)

    def start(self, patience: float) -> None:
        """Start all actors, and wait until every group has the minimum that it needs.

        Raises WorkerError where no actor has started after ``patience`` seconds. Compilation may take longer.
        """
        for group in self._groups:
            for _ in range(group.max):
                self._start(group)
        deadline, told = time.monotonic() + patience, False
        while short := [g for g in self._groups if self._ready(g) < _needed(g)]:
            self._poll(0.25)
            if self.plan is not None and self.plan.engine.compile and not told:
                told = True
                self._settings.note("compiling…")
            if any(m.configured for m in self.members.values()):
                deadline = time.monotonic() + patience
            if time.monotonic() > deadline:
                group = short[0]
                ready = f"{self._ready(group)} of {_needed(group)} {group.role}s were ready after {patience:.0f} s"
                raise WorkerError(f"workers: {ready}; {self.shortage()}")

    def _poll(self, timeout: float) -> None:
        starting = self.starting()
        if not starting:
            time.sleep(min(timeout, 0.05))
            return
        ready, _ = ray.wait(list(starting), num_returns=1, timeout=timeout)
        for reference in ready:
            self.progressed(starting[reference])

    def starting(self) -> dict[Any, Member]:
        """Return the references of starts and configurations in progress, with their members."""
        return {m.starting: m for m in self.members.values() if m.about is None and m.starting is not None}

    def progressed(self, member: Member) -> None:
        """Take the result of a start or a configuration.

        Raises MetadistError where the actor can't serve and the run needs it.
        """
        if member.name not in self.members:
            return
        try:
            self._progressed(member)
        except MetadistError as error:
            if not member.extra:
                raise
            self._failed_starts = 0
            self._forget(member, "can't serve")
            self._settings.note(f"the run continues without the additional worker {member.name}: {error}")

    def _progressed(self, member: Member) -> None:
        try:
            about = ray.get(member.starting)
        except ray.exceptions.RayTaskError as error:
            cause = error.cause if isinstance(error.cause, Exception) else error
            if isinstance(cause, CompilerError) and self._plan_without_compiler(cause):
                return
            if isinstance(cause, MetadistError):
                raise cause from None
            raise WorkerError(f"worker {member.name} can't start: {type(cause).__name__}: {cause}") from error
        except ray.exceptions.RayError as error:
            self._died_while_starting(member, error)
            return
        if member.configured:
            self._admit(member, about)
            return
        member.configured, member.starting = True, None
        if self.plan is None and member.group.role == "learner":
            self._planned_for = about["describes"]
            self.plan = self._planner(self._planned_for)
        self._configure()

    def _plan_without_compiler(self, error: CompilerError) -> bool:
        """Plan again, where this pool planned and no actor computes yet. Return whether all actors are configured anew.

        An actor that is compiling goes on until it has an answer, which nobody reads, and then obeys the new plan.
        """
        if self._planned_for is None or any(m.about is not None for m in self.members.values()):
            return False
        if self.plan is None or self.plan.engine.compile:
            self.plan = planned_without_compiler(self._planner, self._planned_for, error)
            self._settings.note(f"not compiled: {error.reason}")
        for member in self.members.values():
            if member.configured:
                member.starting = None
        self._configure()
        return True

    def _died_while_starting(self, member: Member, error: ray.exceptions.RayError) -> None:
        self._failed_starts += 1
        if self._failed_starts >= MAX_FAILED_STARTS:
            raise WorkerError(
                f"{MAX_FAILED_STARTS} workers in a row died while starting, the last of: {short(error)}"
            ) from error
        self.replace(member, f"died while starting: {short(error)}")

    def _configure(self) -> None:
        """Configure all actors that have started, once there is a plan."""
        for member in self.members.values():
            if self.plan is not None and member.configured and member.about is None and member.starting is None:
                member.starting = member.handle.configure.remote(self.plan.engine, self._settings.seed)

    def _admit(self, member: Member, about: dict[str, Any]) -> None:
        self._failed_starts = 0
        if about["compile_seconds"]:
            self._settings.note(f"{member.name} compiled in {about['compile_seconds']:.1f} s")
        if refusal := refusal_of_copies(self._learner, self._settings.code, about["host"], about):
            raise WorkerError(f"worker {member.name} {refusal}")
        refusal = self._numerics.refusal(member.name, about["host"], member.group.role, about["fingerprint"])
        if refusal:
            raise WorkerError(refusal)
        member.about = about

    # Ending -----------------------------------------------------------------------------------------------------------

    def replace(self, member: Member, reason: str) -> None:
        """Forget an actor and start another. Only the oldest of its calls can have killed it."""
        if self._forget(member, reason, blame=True):
            log.warning("worker %s %s; a replacement starts", member.name, reason)
            self._start(member.group, member.extra)

    def _forget(self, member: Member, reason: str, blame: bool = False) -> bool:
        """Kill an actor and report its calls as lost. Return False where that was done before."""
        if self.members.pop(member.name, None) is None:
            return False
        with contextlib.suppress(Exception):
            ray.kill(member.handle)
        for position, asked in enumerate(member.calls.values()):
            self.lost.append(Failed(*asked.attempt, member.name, "lost", reason, guilty=blame and position == 0))
        return True

    def kill(self, member: Member) -> None:
        """SIGKILL the actor's process where it runs on this machine. That ends a stopped process too."""
        if member.about is not None and member.about["host"] == platform.node():
            with contextlib.suppress(ProcessLookupError, PermissionError):
                os.kill(member.about["pid"], signal.SIGKILL)

    def close(self) -> None:
        """Kill all actors, and shut Ray down where this pool started or joined it."""
        for member in self.members.values():
            with contextlib.suppress(Exception):
                ray.kill(member.handle)
        self.members.clear()
        self._learner_ref = None
        if self._owns_cluster:
            ray.shutdown()

    # Counting ---------------------------------------------------------------------------------------------------------

    def ready(self, role: str) -> list[Member]:
        """Return the members of ``role`` that can compute."""
        return [m for m in self.members.values() if m.about is not None and m.group.role == role]

    def _ready(self, group: WorkerGroup) -> int:
        return sum(m.about is not None and m.group is group for m in self.members.values())

    def shortage(self) -> str:
        """Compare the resources that the groups need with those of the cluster, for a message."""
        asked = {g: sum(m.group is g for m in self.members.values()) for g in self._groups}
        wanted = ", ".join(
            f"{asked[g]} × {{cpus: {g.cpus}, gpus: {self._gpus[g]}}} for role {g.role}" for g in self._groups
        )
        total, free = ray.cluster_resources(), ray.available_resources()
        there = ", ".join(f"{total.get(r, 0):g} {r}s ({free.get(r, 0):g} free)" for r in ("CPU", "GPU"))
        return f"asked for {wanted}; the cluster has {there}. Ask for fewer with --workers, or add nodes"

    def cannot_resize(self, role: str, count: int) -> str | None:
        """Return why there can't be ``count`` actors of ``role``, or None."""
        groups = [g for g in self._groups if g.role == role]
        if not groups:
            roles = ", ".join(g.role + "s" for g in self._groups)
            return f"this run has no {role}s, so none can be added; it has {roles}"
        gpus = self._gpus[groups[0]] * count
        if gpus and self._cpus < math.inf and gpus > (there := ray.cluster_resources().get("GPU", 0.0)):
            each = self._gpus[groups[0]]
            return f"{count} {role}s would take {gpus:g} GPUs ({each:g} each), and this machine has {there:g}"
        return None

    def resize(self, role: str, count: int) -> None:
        """Start or forget actors of ``role`` until there are ``count``.

        Actors that aren't ready are forgotten first, then idle ones.
        """
        group = next(g for g in self._groups if g.role == role)
        members = [m for m in reversed(self.members.values()) if m.group.role == role]
        for _ in range(count - len(members)):
            self._start(group, extra=True)
        superfluous = max(0, len(members) - count)
        for member in sorted(members, key=lambda m: (m.about is not None, len(m.calls)))[:superfluous]:
            self._forget(member, "was removed by a resize")


def _needed(group: WorkerGroup) -> int:
    """Return how many workers the run needs to begin: one at least of every group that may have any."""
    return max(group.min, min(1, group.max))
