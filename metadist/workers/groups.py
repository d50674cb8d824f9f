"""Worker groups: how many workers of a role, and what each of them needs."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from metadist.config.groups import WorkerGroup
from metadist.core.errors import ConfigError, WorkerError


def expected_by_role(
    expected: dict[str, Any] | None, groups: Sequence[WorkerGroup], exact: bool
) -> dict[str, dict[str, Any]]:
    """The fingerprint that workers of each role must have. A run whose learners rolled out has named no environments'."""
    apart = any(g.role == "environment" and g.max for g in groups)
    if not any(g.role == "learner" and g.max for g in groups):
        raise ConfigError(
            "workers: there is no learner; expected at least one group {role: learner, max: 1} beside the environments"
        )
    if expected is None:
        return {}
    if exact and not apart and "environment" in expected:
        raise WorkerError(
            f"this run's trials were rolled out on '{expected['environment']['device']}', not by its learners on '{expected['device']}'; "
            "go on with environment workers, or with engine.exact: false"
        )
    return {"learner": expected, "environment": expected.get("environment", expected)}
