"""The ``workers`` section of a config."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, Union

from metadist.core.errors import ConfigError, one_of

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
