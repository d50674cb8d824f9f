"""The executor whose workers connect from other machines. The transport calls ``server.join`` and the sessions."""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, Literal

import pyarrow as pa
import torch

from metadist.config.groups import WorkerGroup
from metadist.core.errors import WorkerError
from metadist.core.round import Event, Failed, Finished, Shard
from metadist.core.state import Contribution, Records, State, is_finite
from metadist.engine.plan import Device, Plan
from metadist.learners.base import Learner
from metadist.training.scheduler import fault_of
from metadist.wire.codec import RejectedError, ThetaHeader, decode_output, decode_result, theta_parts
from metadist.wire.frame import join
from metadist.workers.calls import Call, Content
from metadist.workers.copies import refusal_of_copies
from metadist.workers.fingerprint import fingerprint_id
from metadist.workers.kept_outputs import KeepingExecutor, KeptOutput, KeptOutputs
from metadist.workers.numerics import Numerics
from metadist.workers.plan import Planner
from metadist.workers.remote.messages import Computed, Configure, Dismissal, Failure, Lease
from metadist.workers.remote.server import Offer, Server
from metadist.workers.remote.session import Session
from metadist.workers.settings import RunSettings
from metadist.workers.states import has_url, stores

log = logging.getLogger(__name__)

#: leases per worker: one that it computes, one on its way
DEPTH = 2
#: the measurements that a worker may report about itself
STATISTICS = ("seconds", "cpu_percent", "memory_bytes", "gpu_percent", "gpu_memory_bytes")


class RemoteExecutor(KeepingExecutor[Content, Content]):
    """Lease shards to workers that connect and leave at any time.

    A worker that is silent, hangs or sends garbage is dismissed. A worker receives the run's config and builds its
    own learner. Another version of metadist, other data or numerics that ``numerics`` refuses are refused with the
    reason. Every result is checked before use: hash, shard, layout, finiteness. A refused result ends the worker's
    session, so that it can't fail the same shard twice.

    ``planner``, where it is set, makes the run's plan from the first learner's device; otherwise workers begin after
    ``obey``. ``how`` is the command that starts a worker. All methods belong to the driver's thread; ``server``
    serves the transport's threads.
    """

    blocks = True

    def __init__(
        self,
        learner: Learner,
        groups: Sequence[WorkerGroup],
        settings: RunSettings,
        offer: Offer,
        numerics: Numerics,
    ) -> None:
        super().__init__()
        self.plan: Plan | None = None
        self.planner: Planner | None = None
        self.how = "metadist worker"
        self._learner, self._groups, self._settings, self._numerics = learner, groups, settings, numerics
        self._lease_seconds = offer.lease_seconds
        self._events: list[Event] = []
        theta_bytes = sum(s.layout.numel * s.layout.dtype.itemsize for s in learner.slots.values())
        self.server = Server(groups, settings, offer, theta_bytes)
        self._handlers: dict[str, Callable[..., None]] = {
            "described": self._described,
            "configured": self._configured,
            "finished": self._finished,
            "failed": self._failed,
            "unsent": self._unsent,
            "left": self._left,
        }

    # Reports of workers -----------------------------------------------------------------------------------------------

    def _poll(self, timeout: float) -> None:
        for session, what, arguments in self.server.reports(timeout):
            self._handlers[what](session, *arguments)
        for session in self.server.silent():
            self._dismiss(session, f"nothing was heard of it for {self._lease_seconds:g} s", "again")

    def _described(self, session: Session, device: dict[str, Any], about: dict[str, Any]) -> None:
        if refusal := refusal_of_copies(self._learner, self._settings.code, session.applicant.host, about):
            self._refuse(session, f"it {refusal}")
            return
        try:
            session.device = _device(device)
        except (TypeError, KeyError, ValueError) as error:
            self._refuse(session, f"its description of its device is invalid: {error}")
            return
        if self.plan is None and self.planner is not None and session.group.role == "learner":
            self.plan = self.planner(session.device)
        self._configure()

    def obey(self, plan: Plan | None) -> None:
        """Compute with ``plan``, and configure the workers that wait for it."""
        self.plan = plan
        self._configure()

    def _configure(self) -> None:
        """Configure all workers that have described themselves, once there is a plan."""
        for session in self.server.sessions:
            if self.plan is not None and session.device is not None and not session.configured:
                session.configured = True
                session.messages.put(Configure(self.plan.engine, self._settings.seed))

    def _configured(self, session: Session, about: dict[str, Any]) -> None:
        fingerprint, applicant = about.get("fingerprint"), session.applicant
        valid = isinstance(fingerprint, dict) and fingerprint.get("id") == fingerprint_id(fingerprint)
        if not (valid and session.configured):
            self._refuse(session, "its numerics fingerprint is invalid")
            return
        assert isinstance(fingerprint, dict)
        refusal = self._numerics.refusal(session.name, applicant.host, session.group.role, fingerprint)
        if refusal:
            self._refuse(session, refusal)
            return
        seconds = about.get("compile_seconds")
        session.about = {
            "role": session.group.role,
            "name": session.name,
            "pid": applicant.pid,
            "host": applicant.host,
            "device": str(about.get("device"))[:64],
            "fingerprint": fingerprint,
            "outside": True,
            "compile_seconds": seconds if isinstance(seconds, float) else 0.0,
            "data_sha256": about.get("data_sha256"),
        }
        self._settings.note(f"{session.name} joined from {applicant.host} ({fingerprint.get('device')})")

    def _finished(self, session: Session, token: int, answer: Computed) -> None:
        call = session.leases.pop(token, None)
        if call is None:
            return
        try:
            event = self._checked(session, call, answer)
        except RejectedError as error:
            # Workers report NaN of a shard's own as a failure; here the worker's arithmetic, memory or program is at
            # fault.
            message = f"{error} (from {session.name}, which was dismissed)"
            self._events.append(Failed(call.shard, call.attempt, session.name, "rejected", message))
            self._refuse(session, f"its result was refused: {error}")
            return
        session.proven = True
        unsaved = isinstance(event.result, Contribution) and event.result.metrics.get("failed", 0.0)
        if stores(call.shard) and unsaved:  # the worker can't reach the store
            self._events.append(self._by_driver(call.shard, call.attempt))
            return
        self._events.append(event)

    def _checked(self, session: Session, call: Call, answer: Computed) -> Finished:
        """Decode an answer and keep its output. Raises RejectedError where the answer must not be used."""
        shard, frame = call.shard, [pa.py_buffer(p) for p in answer.result]
        result, header = decode_result(frame, shard, self._learner.slots)
        fault = fault_of(result, shard, self._learner, not isinstance(result, Records))
        if fault is not None:
            raise RejectedError(fault)
        if (answer.output is not None) != (shard.keeps and not shard.carries):
            raise RejectedError(
                "its output is missing" if shard.keeps else "it has an output, and its shard keeps none"
            )
        if answer.output is not None:
            self._take_output(session, call, answer.output)
        elif shard.carries and self._kept.keep_answer(call, partial(session.fetch, call.token)):
            session.holds.add(call.token)
        stats = {k: v for k, v in header.stats.items() if k in STATISTICS and math.isfinite(v)}
        stats["bytes"] = sum(p.size for p in frame)
        return Finished(shard, call.attempt, session.name, result, stats)

    def _take_output(self, session: Session, call: Call, parts: Sequence[Any]) -> None:
        """Check an output as a worker that needs it would, and keep its frame in one piece."""
        frame = join([pa.py_buffer(p) for p in parts])
        output = decode_output(frame, call.shard)
        if bad := [n for n, c in output.columns.items() if not is_finite(c)]:
            raise RejectedError(f"NaN or Inf in column {bad[0][:40]} of the output")
        if self._kept.keep_answer(call, lambda: [frame]):
            session.holds.add(call.token)

    def _failed(self, session: Session, token: int, failure: Failure) -> None:
        call = session.leases.pop(token, None)
        if call is None:
            return
        session.version = 0  # θ or an output may not have arrived whole
        session.holds.clear()
        shard, attempt = call.shard, call.attempt
        if failure.kind == "missing":
            self._events.append(self._lost(call, failure.missing, failure.message, session.name))
        elif failure.kind in ("rejected", "error"):
            tasks = tuple(t for t in failure.tasks if shard.start <= t < shard.start + shard.count)
            # The message names the worker: a failure is the task's fault for sure only where it happens twice on one
            # worker.
            message = f"{failure.message} (on {session.name})"
            session.failed_at.update(shard.each())
            kind: Literal["rejected", "error"] = "rejected" if failure.kind == "rejected" else "error"
            self._events.append(Failed(shard, attempt, session.name, kind, message, tasks, detail=failure.detail))
        else:
            self._events.append(Failed(shard, attempt, session.name, "lost", failure.message, guilty=False))
            if failure.kind != "returned":
                self._refuse(session, failure.message)

    def _unsent(self, session: Session, token: int, position: int, reason: str) -> None:
        call = session.leases.pop(token, None)
        if call is not None:
            session.version = 0
            session.holds.clear()
            self._events.append(self._lost(call, (call.needs[position][0].key,), reason, session.name))

    def _left(self, session: Session, reason: str, guilty: bool) -> None:
        """End a session, and report its leases as lost. Only the oldest lease can have killed the worker."""
        session.ended = True
        self.server.remove(session)
        log.warning("worker %s is gone: %s", session.name, reason)
        if session.ready and self.server.farewell is None:
            self._settings.note(f"{session.name} left: {reason}")
        for position, call in enumerate(session.leases.values()):
            blamed = guilty and session.proven and position == 0
            self._events.append(Failed(call.shard, call.attempt, session.name, "lost", reason, guilty=blamed))
        session.leases.clear()

    def _dismiss(self, session: Session, reason: str, then: Literal["refused", "again"]) -> None:
        session.messages.put(Dismissal(reason, then))
        self._left(session, reason, False)

    def _refuse(self, session: Session, reason: str) -> None:
        self.server.refused(session.applicant, reason)
        self._dismiss(session, reason, "refused")

    # The protocol -----------------------------------------------------------------------------------------------------

    def await_minimum(self, patience: float, minimum: dict[str, int]) -> None:
        """Wait until there are ``minimum`` workers of each role.

        Raises WorkerError after ``patience`` seconds in which no worker compiles. Compilation may take longer.
        """
        deadline, told = time.monotonic() + patience, False
        while short := {r: n for r, n in minimum.items() if self._ready(r) < n}:
            if not told:
                told = True
                wanted = " and ".join(f"{n} {r}{'s' if n > 1 else ''}" for r, n in short.items())
                how = self._how(next(iter(short)))
                self._settings.note(f"waiting for {wanted} from outside; start each with: {how}")
            self._poll(0.25)
            if any(s.configured and not s.ready for s in self.server.sessions):
                deadline = time.monotonic() + patience
            if time.monotonic() > deadline:
                role, count = next(iter(short.items()))
                raise WorkerError(
                    f"workers: {self._ready(role)} of {count} {role}s from outside had joined after {patience:.0f} s; "
                    f"{self.shortage()}; wait longer with engine.worker_patience"
                )

    def _how(self, role: str) -> str:
        return self.how + (f" --role {role}" if role != "learner" else "")

    def _ready(self, role: str) -> int:
        return sum(s.ready and s.group.role == role for s in self.server.sessions)

    def publish(self, meta_step: int, round: int, state: State) -> int:
        header = ThetaHeader(self._settings.run, meta_step, round)
        frame = join(theta_parts(state.slots, self._learner.slots, header))
        self._kept.publish(meta_step, round, lambda: [frame])
        if round == 0:
            states = self._kept.tokens
            for session in self.server.sessions:
                session.holds &= states
                session.failed_at.clear()
        return frame.size * sum(s.ready for s in self.server.sessions)

    def capacity(self, role: str) -> int:
        ready = [s for s in self.server.sessions if s.ready and s.group.role == role]
        return sum(max(0, DEPTH - len(s.leases)) for s in ready)

    @property
    def busy(self) -> bool:
        """Whether any worker has a lease."""
        return any(s.leases for s in self.server.sessions)

    def near(self, shard: Shard) -> bool:
        room = (s for s in self.server.sessions if s.ready and s.group.role == shard.role and len(s.leases) < DEPTH)
        return any(self._kept.lies_with(shard, s.holds) for s in room)

    def submit(self, shard: Shard, attempt: int) -> None:
        """Lease to the least busy worker of the role, preferably one that has not failed at the shard.

        Among equals, the worker is chosen that holds the most needed outputs.
        """
        if missing := self._missing(shard, attempt):
            self._events.append(missing)
            return
        if stores(shard) and (shard.keeps or not has_url(shard)):
            self._events.append(self._by_driver(shard, attempt))
            return
        needs = self._kept.needed(shard)

        def burden(session: Session) -> tuple[bool, bool, bool, int, int]:
            twice = any(c.shard == shard for c in session.leases.values())
            failed = not session.failed_at.isdisjoint(shard.each())
            lacking = sum(o.token not in session.holds for o in needs)
            return twice, failed, shard.carries and lacking > 0, len(session.leases), lacking

        room = [s for s in self.server.sessions if s.ready and s.group.role == shard.role and len(s.leases) < DEPTH]
        session = min(room, key=burden)
        call = self._kept.call(shard, attempt)
        version, theta = self._kept.theta(shard)
        session.leases[call.token] = call
        contents = tuple(None if o.token in session.holds else o.stored for o in needs)
        session.messages.put(Lease(call, None if session.version == version else theta, contents))
        session.version = version or session.version
        session.holds.update(o.token for o in needs)

    def cancel(self, shard: Shard, attempt: int) -> None:
        for session in list(self.server.sessions):
            if any((c.shard, c.attempt) == (shard, attempt) for c in session.leases.values()):
                self._dismiss(session, "it did not answer in time, and its lease has ended", "again")

    def wait(self, timeout: float) -> list[Event]:
        self._poll(0.0 if self._events else timeout)
        events, self._events = self._events, []
        return events

    def cannot_resize(self, role: str, count: int) -> str | None:
        return f"this run's {role}s come from outside; start or end them where they run ({self._how(role)})"

    def resize(self, role: str, count: int) -> None:
        """Do nothing: remote workers are started and ended on their machines."""

    def kill_busy(self) -> str | None:
        """Return None: remote workers are processes of other machines."""
        return None

    def shortage(self) -> str:
        wanted = ", ".join(f"{g.min} to {g.max} {g.role}s" for g in self._groups)
        there = ", ".join(f"{self._ready(g.role)} {g.role}s" for g in self._groups)
        last = self.server.last_refusal
        refused = f"; the last that was refused was {last}" if last else ""
        how = self._how(self._groups[0].role)
        return f"asked for {wanted} from outside, there are {there}{refused}. Start one with {how}"

    def workers(self) -> dict[str, dict[str, Any]]:
        return self._numerics.of_run({s.name: s.about for s in self.server.sessions if s.about is not None})

    def close(self, farewell: Dismissal = Dismissal("the run is over", "over")) -> None:
        """Dismiss every worker with ``farewell``."""
        self.server.close(farewell)
        self._kept = KeptOutputs()

    # Sharing outputs with another executor ----------------------------------------------------------------------------

    def content_of(self, output: KeptOutput[Content]) -> Content:
        return output.stored

    def stored_from(self, shard: Shard, content: Content) -> Content:
        """Return the content unread: it is fetched only when a worker needs it, so that the driver holds little."""
        return content


def _device(facts: dict[str, Any]) -> Device:
    """Return the device that a worker describes. Raises TypeError or ValueError for an invalid description."""
    device = Device(**facts)
    texts = (device.kind, device.name, device.no_compiler or "")
    counts = (device.memory_bytes, device.cores, device.cache_bytes or 1)
    if not all(type(t) is str for t in texts) or not all(type(c) is int and c > 0 for c in counts):
        raise ValueError(f"{device}")
    torch.device(device.kind)
    return device
