"""The ``workers`` section of a config."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, Union

from metadist.core.errors import ConfigError, one_of

#: ``learner`` computes contributions, and rollouts where no worker is an ``environment``; an ``environment`` computes
#: rollouts, on the
#: CPU unless its group has GPUs
ROLES = ("learner", "environment")


@dataclass(frozen=True)
class WorkerGroup:
    """A group of workers of one ``role``. Training starts with ``min`` workers; ``max`` are requested.

    ``gpus`` may be a fraction; ``auto`` divides the GPUs of the cluster among the learners. ``max: 0`` computes in the
    driver's own process. ``threads`` is PyTorch's intra-op thread count of each worker. Groups with ``outside: true``
    consist of remote workers (``metadist worker``): at most ``max`` at a time join and leave during the run, with
    their own devices. Training starts with at least one of them where no other group has the role.
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
