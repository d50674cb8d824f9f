"""The executor whose workers come in from outside, and the desk where they do. Knows no transport: that calls ``join`` and the seats."""

from __future__ import annotations

import logging
import math
import queue
import re
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import pyarrow as pa
import torch

from metadist.config.groups import WorkerGroup
from metadist.core.errors import WorkerError
from metadist.core.round import Event, Failed, Finished, OutputKey, Shard
from metadist.core.state import Records, State, is_finite
from metadist.engine.plan import Device, Plan
from metadist.learners.base import Learner
from metadist.training.scheduler import fault_of
from metadist.wire.codec import RejectedError, decode_output, decode_result, theta_parts
from metadist.wire.frame import join
from metadist.workers.kept_outputs import Kept
from metadist.workers.numerics import Numerics
from metadist.workers.plan import Planner
from metadist.workers.remote.messages import (
    Answer,
    Applicant,
    Call,
    Configure,
    Content,
    Dismissal,
    DismissedError,
    Failure,
    Lease,
    Terms,
)
from metadist.workers.remote.session import Seat
from metadist.workers.worker import fingerprint_id

log = logging.getLogger(__name__)

#: leases per worker: one that it computes, one on its way
DEPTH = 2
#: the measurements of its own that a worker may report
STATISTICS = ("seconds", "cpu_percent", "memory_bytes", "gpu_percent", "gpu_memory_bytes")


@dataclass(frozen=True)
class _Output:
    """What a shard kept: held here as the frame that came, since the next worker that needs it may be anywhere."""

    shard: Shard
    token: int
    content: Content


class OutsideExecutor:
    """Workers that connect, compute leases and leave as they like; one that falls silent, hangs or sends rubbish is dismissed.

    A worker is told the run's config and builds its own learner; another version of metadist, other data or (where the run is
    exact) other numerics are refused with the reason. What comes from it is checked before anything else is done with it: hash,
    shard, layout, finiteness; a refused result costs the worker its place, so that it can't fail the same shard twice.

    ``planner``, where it is set, makes the run's plan from the first learner's device; else workers begin when they ``obey`` one.
    ``how`` is what people are told to start. All but ``join`` and the seats belong to the driver's thread.
    """

    blocks = True

    def __init__(
        self,
        learner: Learner,
        groups: Sequence[WorkerGroup],
        *,
        run: str,
        config: str,
        versions: dict[str, str],
        numerics: Numerics,
        device: str = "auto",
        seed: int = 0,
        lease_seconds: float = 15.0,
        note: Callable[[str], None] = lambda message: None,
    ) -> None:
        self.plan: Plan | None = None
        self.planner: Planner | None = None
        self.how = "metadist worker"
        self._learner, self._groups, self._run, self._config, self._versions = learner, groups, run, config, versions
        self._numerics, self._device, self._seed = numerics, device, seed
        self._lease_seconds, self._note = lease_seconds, note
        self._theta_bytes = sum(s.layout.numel * s.layout.dtype.itemsize for s in learner.slots.values())
        self._kept: Kept[tuple[int, Content], _Output] = Kept()
        self._version = self._token = 0
        self._seats: list[Seat] = []
        self._lock = threading.Lock()  # of the seats, which ``join`` adds to
        self._reports: queue.SimpleQueue[tuple[Seat, str, tuple[Any, ...]]] = queue.SimpleQueue()
        self._events: list[Event] = []
        self._farewell: Dismissal | None = None
        self._last_refusal = ""

    # The desk ---------------------------------------------------------------------------------------------------------

    def join(self, applicant: Applicant) -> Seat:
        with self._lock:
            if self._farewell is not None:
                raise DismissedError(self._farewell)
            group = next((g for g in self._groups if g.role == applicant.role), None)
            if group is None:
                roles = ", ".join(sorted({g.role for g in self._groups}))
                raise self._refused(
                    applicant, f"this run takes no {applicant.role} from outside; it takes --role {roles}"
                )
            if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9_.-]{0,63}", applicant.name):
                raise self._refused(applicant, "--name: expected 1 to 64 letters, digits, '.', '_' or '-'")
            mine, theirs = self._versions["metadist"], applicant.versions.get("metadist", "none")
            if mine != theirs:
                raise self._refused(
                    applicant,
                    f"the run is one of metadist {mine}, this worker has {theirs[:40]}; install the same version",
                )
            taken = {s.name for s in self._seats}
            for old in [s for s in self._seats if applicant.process and s.applicant.process == applicant.process]:
                old.left("it connected anew")
                taken.discard(old.name)
            if sum(s.group is group for s in self._seats if s.name in taken) >= group.max:
                raise DismissedError(Dismissal(f"all {group.max} places for {group.role}s are taken", "again"))
            name = next(
                n
                for n in (f"outside-{applicant.name}" + (f"-{i}" if i else "") for i in range(len(taken) + 1))
                if n not in taken
            )
            device = self._device if group.role == "learner" else "cpu"
            terms = Terms(name, group.role, self._run, self._config, device, group.threads, self._lease_seconds)
            seat = Seat(applicant, terms, group, self._report, self._theta_bytes)
            self._seats.append(seat)
            return seat

    def _refused(self, applicant: Applicant, reason: str) -> DismissedError:
        self._last_refusal = f"{applicant.name[:64]} on {applicant.host[:64]}: {reason}"
        log.warning("refused a worker from outside: %s", self._last_refusal)
        return DismissedError(Dismissal(reason, "refused"))

    def _report(self, seat: Seat, what: str, arguments: tuple[Any, ...]) -> None:
        self._reports.put((seat, what, arguments))

    # What the driver's thread makes of reports --------------------------------------------------------------------------

    def _poll(self, timeout: float) -> None:
        try:
            report = self._reports.get(timeout=timeout) if timeout > 0 else self._reports.get_nowait()
            while True:
                seat, what, arguments = report
                if seat in self._seats:  # else its leases have ended, and nothing of it counts
                    getattr(self, f"_{what}")(seat, *arguments)
                report = self._reports.get_nowait()
        except queue.Empty:
            pass
        silent = time.monotonic() - self._lease_seconds
        for seat in [s for s in self._seats if s.last_heard < silent]:
            self._dismiss(seat, f"nothing was heard of it for {self._lease_seconds:g} s", "again")

    def _described(self, seat: Seat, device: dict[str, Any], about: dict[str, Any]) -> None:
        mine, theirs = self._learner.data_sha256, about.get("data_sha256")
        if mine != theirs:
            here, there = (f"sha256 {str(h)[:12]}…" if h else "none" for h in (mine, theirs))
            self._refuse(
                seat, f"it has other data ({there}) than the driver ({here}); set METADIST_DATA to the same data"
            )
            return
        try:
            seat.device = _device(device)
        except (TypeError, KeyError, ValueError) as error:
            self._refuse(seat, f"it describes its device in a way that makes no sense: {error}")
            return
        if self.plan is None and self.planner is not None and seat.group.role == "learner":
            self.plan = self.planner(seat.device)
        self._configure()

    def obey(self, plan: Plan | None) -> None:
        self.plan = plan
        self._configure()

    def _configure(self) -> None:
        """Those that have described themselves, once there is a plan."""
        for seat in self._seats:
            if self.plan is not None and seat.device is not None and not seat.told_engine:
                seat.told_engine = True
                seat.messages.put(Configure(self.plan.engine, self._seed))

    def _configured(self, seat: Seat, about: dict[str, Any]) -> None:
        fingerprint = about.get("fingerprint")
        if (
            not isinstance(fingerprint, dict)
            or fingerprint.get("id") != fingerprint_id(fingerprint)
            or not seat.told_engine
        ):
            self._refuse(seat, "its numerics fingerprint makes no sense")
            return
        refusal = self._numerics.refusal(seat.name, seat.applicant.host, seat.group.role, fingerprint)
        if refusal:
            self._refuse(seat, refusal)
            return
        seconds = about.get("compile_seconds")
        seat.about = {
            "role": seat.group.role,
            "name": seat.name,
            "pid": seat.applicant.pid,
            "host": seat.applicant.host,
            "device": str(about.get("device"))[:64],
            "fingerprint": fingerprint,
            "outside": True,
            "compile_seconds": seconds if isinstance(seconds, float) else 0.0,
            "data_sha256": about.get("data_sha256"),
        }
        self._note(f"{seat.name} joined from {seat.applicant.host} ({fingerprint.get('device')})")

    def _finished(self, seat: Seat, token: int, answer: Answer) -> None:
        call = seat.leases.pop(token, None)
        if call is None:
            return
        shard = call.shard
        result_frame = [pa.py_buffer(p) for p in answer.result]
        try:
            result, header = decode_result(
                result_frame, shard, self._learner.slots, finite=False, partial=True, rows=shard.count
            )
            fault = fault_of(result, shard, self._learner, not isinstance(result, Records))
            if fault is None and (answer.output is not None) != shard.keeps:
                fault = "an output is missing, or there is one where none was asked for"
            if fault is None and answer.output is not None:
                self._take_output(seat, call, answer.output)
        except RejectedError as error:
            fault = str(error)
        if fault is not None:
            # Not as NaN of the shard's own making, which the worker reports: this one's arithmetic, memory or program is at fault.
            self._events.append(
                Failed(shard, call.attempt, seat.name, "rejected", f"{fault} (from {seat.name}, which was dismissed)")
            )
            self._refuse(seat, f"its result was refused: {fault}")
            return
        seat.proven = True
        stats = {k: v for k, v in header["stats"].items() if k in STATISTICS and math.isfinite(v)}
        stats["bytes"] = sum(p.size for p in result_frame)
        self._events.append(Finished(shard, call.attempt, seat.name, result, stats))

    def _take_output(self, seat: Seat, call: Call, parts: Sequence[Any]) -> None:
        """Verified as whoever needs it would, and kept in one piece under the θ that is still the round's."""
        frame = join([pa.py_buffer(p) for p in parts])
        output = decode_output(frame, call.shard)
        if bad := [n for n, c in output.columns.items() if not is_finite(c)]:
            raise RejectedError(f"NaN or Inf in column {bad[0][:40]} of the output")
        if self._kept.thetas.get(call.shard.round, (0, None))[0] == call.version:
            self._kept.keep(call.shard, _Output(call.shard, call.token, lambda: [frame]))
            seat.holds.add(call.token)

    def _failed(self, seat: Seat, token: int, failure: Failure) -> None:
        call = seat.leases.pop(token, None)
        if call is None:
            return
        seat.version = 0  # it may be θ that did not arrive whole, or an output
        seat.holds.clear()
        shard, attempt = call.shard, call.attempt
        if failure.kind == "missing":
            self._events.append(self._lost(call, failure.missing, failure.message, seat.name))
        elif failure.kind in ("rejected", "error"):
            tasks = tuple(t for t in failure.tasks if shard.start <= t < shard.start + shard.count)
            # The same from another worker is news: only where it happens twice on one is it the task's fault for sure.
            message = f"{failure.message} (on {seat.name})"
            seat.failed_at.update(shard.each())
            self._events.append(Failed(shard, attempt, seat.name, failure.kind, message, tasks, detail=failure.detail))  # type: ignore[arg-type]
        else:
            self._events.append(Failed(shard, attempt, seat.name, "lost", failure.message, guilty=False))
            if failure.kind != "returned":
                self._refuse(seat, failure.message)

    def _unsent(self, seat: Seat, token: int, position: int, reason: str) -> None:
        call = seat.leases.pop(token, None)
        if call is not None:
            seat.version = 0
            seat.holds.clear()
            self._events.append(self._lost(call, (call.needs[position][0].key,), reason, seat.name))

    def _lost(self, call: Call, keys: tuple[OutputKey, ...], reason: str, worker: str) -> Failed:
        """Forget the outputs that the call lacked. One that came to be anew meanwhile is not lost: asking again is enough."""
        asked = {shard.key: token for shard, token in call.needs}
        missing = tuple(
            k for k in keys if k in asked and k in self._kept.outputs and self._kept.outputs[k].token == asked[k]
        )
        for key in missing:
            del self._kept.outputs[key]
        return Failed(call.shard, call.attempt, worker, "missing", reason, missing=missing)

    def _left(self, seat: Seat, reason: str, guilty: bool) -> None:
        """Forget a worker, and report what it had; only the oldest lease can have killed it."""
        with self._lock:
            self._seats.remove(seat)
        log.warning("worker %s is gone: %s", seat.name, reason)
        if seat.ready and self._farewell is None:
            self._note(f"{seat.name} left: {reason}")
        for position, call in enumerate(seat.leases.values()):
            guilty_of = guilty and seat.proven and position == 0
            self._events.append(Failed(call.shard, call.attempt, seat.name, "lost", reason, guilty=guilty_of))
        seat.leases.clear()

    def _dismiss(self, seat: Seat, reason: str, then: Literal["refused", "again"]) -> None:
        seat.messages.put(Dismissal(reason, then))
        self._left(seat, reason, False)

    def _refuse(self, seat: Seat, reason: str) -> None:
        self._refused(seat.applicant, reason)
        self._dismiss(seat, reason, "refused")

    # The protocol -----------------------------------------------------------------------------------------------------

    def await_minimum(self, patience: float, minimum: dict[str, int]) -> None:
        """Until there are so many of each role; ``patience`` is for workers that aren't there, compiling takes as long as it takes."""
        deadline, told = time.monotonic() + patience, False
        while short := {r: n for r, n in minimum.items() if self._ready(r) < n}:
            if not told:
                told = True
                wanted = " and ".join(f"{n} {r}{'s' if n > 1 else ''}" for r, n in short.items())
                self._note(f"waiting for {wanted} from outside; start each with: {self._how(next(iter(short)))}")
            self._poll(0.25)
            if any(seat.told_engine and not seat.ready for seat in self._seats):
                deadline = time.monotonic() + patience
            if time.monotonic() > deadline:
                role, wanted_count = next(iter(short.items()))
                raise WorkerError(
                    f"workers: {self._ready(role)} of {wanted_count} {role}s from outside had joined after {patience:.0f} s; {self.shortage()}; "
                    "wait longer with engine.worker_patience"
                )

    def _how(self, role: str) -> str:
        return self.how + (f" --role {role}" if role != "learner" else "")

    def _ready(self, role: str) -> int:
        return sum(s.ready and s.group.role == role for s in self._seats)

    def publish(self, meta_step: int, round: int, state: State) -> int:
        frame = join(theta_parts(state.slots, self._learner.slots, run=self._run, meta_step=meta_step, round=round))
        self._version += 1
        self._kept.publish(round, (self._version, lambda: [frame]))
        if round == 0:
            for seat in self._seats:
                seat.holds.clear()
                seat.failed_at.clear()
        return frame.size * sum(s.ready for s in self._seats)

    def capacity(self, role: str) -> int:
        return sum(max(0, DEPTH - len(s.leases)) for s in self._seats if s.ready and s.group.role == role)

    @property
    def busy(self) -> bool:
        return any(s.leases for s in self._seats)

    def submit(self, shard: Shard, attempt: int) -> None:
        """To the least busy worker of its role that has not failed at it; among those to one that holds the outputs that it needs."""
        if missing := self._kept.lacking(shard):
            self._events.append(
                Failed(shard, attempt, "driver", "missing", "an output that it needs is not there", missing=missing)
            )
            return
        needs = tuple(self._kept.outputs[key] for key in shard.needs)
        ready = [s for s in self._seats if s.ready and s.group.role == shard.role and len(s.leases) < DEPTH]

        def burden(seat: Seat) -> tuple[bool, bool, int, int]:
            twice = any(c.shard == shard for c in seat.leases.values())
            return (
                twice,
                not seat.failed_at.isdisjoint(shard.each()),
                len(seat.leases),
                sum(o.token not in seat.holds for o in needs),
            )

        seat = min(ready, key=burden)
        self._token += 1
        version, theta = self._kept.thetas[shard.round]
        call = Call(shard, attempt, version, self._token, tuple((o.shard, o.token) for o in needs))
        seat.leases[call.token] = call
        contents = tuple(None if o.token in seat.holds else o.content for o in needs)
        seat.messages.put(Lease(call, None if seat.version == version else theta, contents))
        seat.version = version
        seat.holds.update(o.token for o in needs)

    def cancel(self, shard: Shard, attempt: int) -> None:
        for seat in list(self._seats):
            if any((c.shard, c.attempt) == (shard, attempt) for c in seat.leases.values()):
                self._dismiss(seat, "it did not answer in time, and its lease has ended", "again")

    def cannot_resize(self, role: str, count: int) -> str | None:
        return f"this run's {role}s come from outside; start or end them where they run ({self._how(role)})"

    def resize(self, role: str, count: int) -> None:
        """Nobody here can start or end them."""

    def kill_busy(self) -> str | None:
        """Return None: remote workers are processes of other machines."""
        return None

    def wait(self, timeout: float) -> list[Event]:
        self._poll(0.0 if self._events else timeout)
        events, self._events = self._events, []
        return events

    def shortage(self) -> str:
        wanted = ", ".join(f"{g.min} to {g.max} {g.role}s" for g in self._groups)
        there = ", ".join(f"{self._ready(g.role)} {g.role}s" for g in self._groups)
        refused = f"; the last that was refused was {self._last_refusal}" if self._last_refusal else ""
        return f"asked for {wanted} from outside, there are {there}{refused}. Start one with {self._how(self._groups[0].role)}"

    def workers(self) -> dict[str, dict[str, Any]]:
        return self._numerics.of_run({s.name: s.about for s in self._seats if s.about is not None})

    def close(self, farewell: Dismissal = Dismissal("the run is over", "over")) -> None:
        """Tell every worker that it is over, and why."""
        with self._lock:
            self._farewell = farewell
            seats, self._seats = self._seats, []
        for seat in seats:
            seat.messages.put(farewell)
        self._kept = Kept()

    # Beside other executors -------------------------------------------------------------------------------------------

    def lacking(self, shard: Shard) -> tuple[OutputKey, ...]:
        return self._kept.lacking(shard)

    def hold(self, round: int) -> None:
        self._kept.hold(round)

    def output(self, key: OutputKey) -> tuple[Shard, Content] | None:
        kept = self._kept.outputs.get(key)
        return None if kept is None else (kept.shard, kept.content)

    def adopt(self, shard: Shard, content: Content) -> None:
        """Read only when a worker is to be sent it: the driver holds no more than it has to."""
        self._token += 1
        self._kept.keep(shard, _Output(shard, self._token, content))


def _device(facts: dict[str, Any]) -> Device:
    """A device as a stranger describes it."""
    device = Device(**facts)
    texts, counts = (
        (device.kind, device.name, device.no_compiler or ""),
        (device.memory_bytes, device.cores, device.cache_bytes or 1),
    )
    if not all(type(t) is str for t in texts) or not all(type(c) is int and c > 0 for c in counts):
        raise ValueError(f"{device}")
    torch.device(device.kind)
    return device
