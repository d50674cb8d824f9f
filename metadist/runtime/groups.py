"""Worker groups: how many workers of a role, and what each of them needs."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, Union

from metadist.core.errors import ConfigError


@dataclass(frozen=True)
class WorkerGroup:
    """``min`` must be there to begin, ``max`` are asked for. ``gpus`` may be a fraction; ``auto`` shares out what there is.

    ``max: 0`` computes in the driver's own process. ``threads`` is PyTorch's intra-op count in each worker.
    """

    role: str = "learner"
    min: int = 1
    max: int = 1
    cpus: float = 1.0
    gpus: Union[float, Literal["auto"]] = "auto"
    threads: int = 1

    def __post_init__(self) -> None:
        if not 0 <= self.min <= self.max:
            raise ConfigError(f"workers: min {self.min} and max {self.max} of role {self.role}; expected 0 ≤ min ≤ max")
        for name in ("cpus", "gpus"):
            value = getattr(self, name)
            if value != "auto" and value < 0:
                raise ConfigError(f"workers.{name}: {value} is below 0")
        if self.threads < 1:
            raise ConfigError(f"workers.threads: {self.threads} is below 1")
        if self.role != "learner":
            raise ConfigError(f"workers.role: '{self.role}' is not one of learner")
