"""Which workers compute the bits of the run, and what becomes of those that don't."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from metadist.config.groups import WorkerGroup
from metadist.workers.groups import expected_by_role


class Numerics:
    """The numerics fingerprint of a run by role: as it began (``expected``: the learners', with the environments' as ``environment``
    where that is another one), else that of the first worker of the role.

    Workers of one role must agree: whichever rolls out, the trials are the same; whichever learns, the gradient. Between roles
    nothing need be equal, since what a role computes is never computed by another. Where ``exact`` is given up, ``mark`` is told
    who computed other bits: the run is inexact from then on.
    """

    def __init__(
        self,
        groups: Sequence[WorkerGroup],
        expected: dict[str, Any] | None,
        exact: bool,
        mark: Callable[[str], None] = lambda text: None,
    ) -> None:
        self.exact, self._mark = exact, mark
        self.expected = expected_by_role(expected, groups, exact)

    def refusal(self, name: str, host: str, role: str, fingerprint: dict[str, Any]) -> str | None:
        """Why this worker can't be of the run, or None."""
        first = self.expected.setdefault(role, fingerprint)
        if fingerprint["id"] == first["id"]:
            return None
        differing = {k: (first.get(k), v) for k, v in fingerprint.items() if k != "id" and first.get(k) != v}
        if self.exact:
            return (
                f"worker {name} on {host} computes other bits than this run ({differing}, run's first); "
                "use like machines, or engine.exact: false to give exactness up"
            )
        self._mark(f"{role} on {host}: " + "; ".join(f"{k} {v[1]}, not {v[0]}" for k, v in differing.items()))
        return None

    def of_run(self, workers: dict[str, dict[str, Any]]) -> dict[str, dict[str, Any]]:
        """Learners first: the run's fingerprint is theirs, and names the environments' where that is another one."""
        there = dict(sorted(workers.items(), key=lambda item: item[1]["role"] != "learner"))
        other = self.expected.get("environment")
        for name, about in there.items():
            if about["role"] == "learner" and other is not None and other["id"] != about["fingerprint"]["id"]:
                there[name] = {**about, "fingerprint": {**about["fingerprint"], "environment": other}}
        return there
