"""Worker groups: how many workers of a role, and what each of them needs."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal, Union

from metadist.core.errors import ConfigError, WorkerError, one_of

#: ``learner``: contributions, and rollouts where there are no environments. ``environment``: rollouts of trials, on the CPU
#: unless it was given GPUs
ROLES = ("learner", "environment")


@dataclass(frozen=True)
class WorkerGroup:
    """``min`` must be there to begin, ``max`` are asked for. ``gpus`` may be a fraction; ``auto`` shares out what there is among
    the learners.

    ``max: 0`` computes in the driver's own process. ``threads`` is PyTorch's intra-op count in each worker. ``outside`` groups
    are of workers that connect from elsewhere (``metadist worker``): they come and go, up to ``max`` at a time, bring their own
    devices, and where no other group has the role, one must be there to begin.
    """

    role: str = "learner"
    min: int = 1
    max: int = 1
    cpus: float = 1.0
    gpus: Union[float, Literal["auto"]] = "auto"
    threads: int = 1
    outside: bool = False

    def __post_init__(self) -> None:
        if not 0 <= self.min <= self.max:
            raise ConfigError(f"workers: min {self.min} and max {self.max} of role {self.role}; expected 0 ≤ min ≤ max")
        for name in ("cpus", "gpus"):
            value = getattr(self, name)
            if value != "auto" and value < 0:
                raise ConfigError(f"workers.{name}: {value} is below 0")
        if self.threads < 1:
            raise ConfigError(f"workers.threads: {self.threads} is below 1")
        one_of("workers.role", self.role, ROLES)


def expected_by_role(expected: dict[str, Any] | None, groups: Sequence[WorkerGroup], exact: bool) -> dict[str, dict[str, Any]]:
    """The fingerprint that workers of each role must have. A run whose learners rolled out has named no environments'."""
    apart = any(g.role == "environment" and g.max for g in groups)
    if not any(g.role == "learner" and g.max for g in groups):
        raise ConfigError("workers: there is no learner; expected at least one group {role: learner, max: 1} beside the environments")
    if expected is None:
        return {}
    if exact and not apart and "environment" in expected:
        raise WorkerError(
            f"this run's trials were rolled out on '{expected['environment']['device']}', not by its learners on '{expected['device']}'; "
            "go on with environment workers, or with engine.exact: false"
        )
    return {"learner": expected, "environment": expected.get("environment", expected)}
