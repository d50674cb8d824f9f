"""Admit remote workers, and keep a session for each. The transport calls ``join`` and the sessions."""

from __future__ import annotations

import logging
import queue
import re
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from metadist.config.groups import WorkerGroup
from metadist.workers.remote.messages import Applicant, Dismissal, DismissedError, Terms
from metadist.workers.remote.session import Session
from metadist.workers.settings import RunSettings

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Offer:
    """The part of a run that remote workers depend on.

    ``config`` is the YAML document from which they build their learner, ``versions`` those of this driver. The leases
    of a worker end when the driver receives nothing from it for ``lease_seconds``.
    """

    config: str
    versions: Mapping[str, str]
    lease_seconds: float = 15.0


class Server:
    """Admit applicants as long as their group has room, and collect the reports of all sessions.

    ``join`` may be called from any thread; all other methods belong to the driver's thread.
    """

    def __init__(self, groups: Sequence[WorkerGroup], settings: RunSettings, offer: Offer, theta_bytes: int) -> None:
        self.sessions: list[Session] = []
        self.last_refusal = ""
        self.farewell: Dismissal | None = None
        self._groups, self._settings, self._offer, self._theta_bytes = groups, settings, offer, theta_bytes
        self._lock = threading.Lock()  # guards the sessions and the farewell
        self._reports: queue.SimpleQueue[tuple[Session, str, tuple[Any, ...]]] = queue.SimpleQueue()

    def join(self, applicant: Applicant) -> Session:
        """Return a session for ``applicant``. Raises DismissedError where it can't join."""
        with self._lock:
            if self.farewell is not None:
                raise DismissedError(self.farewell)
            group = self._group_for(applicant)
            taken = {s.name for s in self.sessions}
            for old in self.sessions:
                if applicant.process and old.applicant.process == applicant.process:
                    old.left("it reconnected")
                    taken.discard(old.name)
            if sum(s.group is group for s in self.sessions if s.name in taken) >= group.max:
                raise DismissedError(Dismissal(f"all {group.max} places for {group.role}s are taken", "again"))
            session = Session(
                applicant,
                self._terms(applicant, group, taken),
                group,
                self._report,
                self._theta_bytes,
            )
            self.sessions.append(session)
            return session

    def _report(self, session: Session, what: str, arguments: tuple[Any, ...]) -> None:
        self._reports.put((session, what, arguments))

    def _group_for(self, applicant: Applicant) -> WorkerGroup:
        group = next((g for g in self._groups if g.role == applicant.role), None)
        if group is None:
            roles = ", ".join(sorted({g.role for g in self._groups}))
            raise self.refused(applicant, f"this run takes no {applicant.role} from outside; it takes --role {roles}")
        if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9_.-]{0,63}", applicant.name):
            raise self.refused(applicant, "--name: expected 1 to 64 letters, digits, '.', '_' or '-'")
        mine, theirs = self._offer.versions["metadist"], applicant.versions.get("metadist", "none")
        if mine != theirs:
            reason = f"the run uses metadist {mine}, this worker has {theirs[:40]}; install the same version"
            raise self.refused(applicant, reason)
        return group

    def _terms(self, applicant: Applicant, group: WorkerGroup, taken: set[str]) -> Terms:
        wanted = f"outside-{applicant.name}"
        names = [wanted, *(f"{wanted}-{i}" for i in range(1, len(taken) + 1))]
        return Terms(
            next(name for name in names if name not in taken),
            group.role,
            self._settings.run,
            self._offer.config,
            self._settings.device if group.role == "learner" else "cpu",
            group.threads,
            self._offer.lease_seconds,
        )

    def refused(self, applicant: Applicant, reason: str) -> DismissedError:
        """Log a refusal, and return the error that tells the applicant."""
        self.last_refusal = f"{applicant.name[:64]} on {applicant.host[:64]}: {reason}"
        log.warning("refused a remote worker: %s", self.last_refusal)
        return DismissedError(Dismissal(reason, "refused"))

    def reports(self, timeout: float) -> Iterator[tuple[Session, str, tuple[Any, ...]]]:
        """Wait up to ``timeout`` seconds for a report, and yield all reports of sessions that have not ended."""
        try:
            report = self._reports.get(timeout=timeout) if timeout > 0 else self._reports.get_nowait()
            while True:
                if report[0] in self.sessions:
                    yield report
                report = self._reports.get_nowait()
        except queue.Empty:
            return

    def silent(self) -> list[Session]:
        """Return the sessions whose lease time has passed without a message."""
        limit = time.monotonic() - self._offer.lease_seconds
        return [s for s in self.sessions if s.last_heard < limit]

    def remove(self, session: Session) -> None:
        with self._lock:
            self.sessions.remove(session)

    def close(self, farewell: Dismissal) -> None:
        """End all sessions with ``farewell``, which later applicants receive too."""
        with self._lock:
            self.farewell = farewell
            sessions, self.sessions = self.sessions, []
        for session in sessions:
            session.messages.put(farewell)
