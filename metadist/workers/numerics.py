"""Accept, refuse or flag workers by their numerics fingerprint."""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from typing import Any

from metadist.config.groups import WorkerGroup
from metadist.core.errors import ConfigError, WorkerError


class Numerics:
    """The numerics fingerprints of a run by role, and the one decision about workers that all executors obey.

    ``expected`` is the fingerprint that the run began with: the learners', with the environments' under
    ``environment`` where that is another one. Without it, the first worker of a role sets the role's fingerprint.

    Workers of one role must agree, so that trials and gradients do not depend on which worker computes them. Roles
    may differ, since no role ever computes the shards of another. Where ``exact`` is given up, a worker that differs
    is accepted, and ``mark`` is called with a description of the difference: the run is inexact from then on.
    """

    def __init__(
        self,
        groups: Sequence[WorkerGroup],
        expected: dict[str, Any] | None = None,
        exact: bool = True,
        mark: Callable[[str], None] = lambda text: None,
    ) -> None:
        self.exact, self._mark = exact, mark
        self.expected = expected_by_role(expected, groups, exact)

    def refusal(self, name: str, host: str, role: str, fingerprint: dict[str, Any]) -> str | None:
        """Return why this worker can't take part in the run, or None."""
        first = self.expected.setdefault(role, fingerprint)
        if not (differing := _differing(first, fingerprint)):
            # A fingerprint of version 0.1 states fewer facts: from now on those of the first worker count.
            self.expected[role] = {**first, **fingerprint}
            return None
        if self.exact:
            return (
                f"worker {name} on {host} has other numerics than this run's {role}s (expected, found: {differing}); "
                "use machines of the same kind, or give exactness up with engine.exact: false"
            )
        self._mark(f"{role} on {host}: " + "; ".join(f"{k} {v[1]}, not {v[0]}" for k, v in differing.items()))
        return None

    def refusal_of_process(self, host: str, roles: Collection[str], fingerprint: dict[str, Any]) -> str | None:
        """Return why the driver's own process can't compute shards of all these ``roles``, or None.

        In a new run the process sets the fingerprint of the learners only, even where it serves the environments too.
        """
        known = [role for role in roles if role == "learner" or role in self.expected]
        refusals = [self.refusal("local", host, role, fingerprint) for role in known]
        return next((refusal for refusal in refusals if refusal is not None), None)

    def of_run(self, workers: dict[str, dict[str, Any]]) -> dict[str, dict[str, Any]]:
        """Return ``workers`` with the learners first.

        The learners' fingerprint names that of the environments where it is another one.
        """
        there = dict(sorted(workers.items(), key=lambda item: item[1]["role"] != "learner"))
        other = self.expected.get("environment")
        for name, about in there.items():
            if about["role"] == "learner" and other is not None and other["id"] != about["fingerprint"]["id"]:
                there[name] = {**about, "fingerprint": {**about["fingerprint"], "environment": other}}
        return there


#: facts that fingerprints of version 0.1 lack although they had a value: it is unknown and not compared
UNSTATED = ("compiler",)


def _differing(first: dict[str, Any], fingerprint: dict[str, Any]) -> dict[str, tuple[Any, Any]]:
    """Return the facts in which two fingerprints differ: name → (expected, found), None where one does not state it."""
    if first["id"] == fingerprint["id"]:
        return {}
    names = [
        k for k in {**fingerprint, **first} if k not in ("id", "environment") and (k in first or k not in UNSTATED)
    ]
    found = {k: (first.get(k), fingerprint.get(k)) for k in names if first.get(k) != fingerprint.get(k)}
    if not found and all(k in first for k in UNSTATED if k in fingerprint):
        return {"id": (first["id"], fingerprint["id"])}
    return found


def expected_by_role(
    expected: dict[str, Any] | None, groups: Sequence[WorkerGroup], exact: bool
) -> dict[str, dict[str, Any]]:
    """Return the fingerprint that workers of each role must have; empty where ``expected`` is None.

    Where the learners rolled out, the run's fingerprint names no environments, and environments must have the
    learners' fingerprint. Raises ConfigError where no group has learners, and WorkerError where a run with other
    environments than learners has no environments in ``groups`` and must be exact.
    """
    if not any(g.role == "learner" and g.max for g in groups):
        raise ConfigError(
            "workers: there is no learner; expected at least one group {role: learner, max: 1} besides the environments"
        )
    if expected is None:
        return {}
    apart = any(g.role == "environment" and g.max for g in groups)
    if exact and not apart and "environment" in expected:
        raise WorkerError(
            f"this run's trials were rolled out on '{expected['environment']['device']}', not by its learners on "
            f"'{expected['device']}'; continue with environment workers, or with engine.exact: false"
        )
    return {"learner": expected, "environment": expected.get("environment", expected)}
