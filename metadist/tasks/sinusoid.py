"""Sinusoid regression (Finn, Abbeel & Levine, "Model-agnostic meta-learning", ICML 2017, §5.1)."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from metadist.core.errors import ConfigError
from metadist.core.random import TaskKey
from metadist.core.task import Examples, Task, TaskFamily


@dataclass(frozen=True, kw_only=True)
class Sinusoid(TaskFamily):
    """y = A sin(x − φ), with A, φ (radians) and x uniform in the given ranges. x and y are float32 [rows, 1]."""

    k_shot: int = 10
    query_shots: int = 10
    amplitude: tuple[float, float] = (0.1, 5.0)
    phase: tuple[float, float] = (0.0, math.pi)
    x_range: tuple[float, float] = (-5.0, 5.0)

    input_shape = (1,)
    outputs = 1

    def __post_init__(self) -> None:
        for name in ("k_shot", "query_shots"):
            if getattr(self, name) < 1:
                raise ConfigError(f"tasks.{name} = {getattr(self, name)}: must be at least 1")
        for name in ("amplitude", "phase", "x_range"):
            low, high = getattr(self, name)
            if not -math.inf < low <= high < math.inf:
                raise ConfigError(f"tasks.{name} = [{low}, {high}]: must be [low, high], both finite and low ≤ high")

    def amplitude_and_phase(self, keys: TaskKey) -> tuple[Tensor, Tensor]:
        """The tasks' A and φ, each of the shape of ``keys.tasks``."""
        (a_low, a_high), (p_low, p_high) = self.amplitude, self.phase
        return (
            keys.stream("amplitude").uniform(1, low=a_low, high=a_high).squeeze(-1),
            keys.stream("phase").uniform(1, low=p_low, high=p_high).squeeze(-1),
        )

    def curve(self, keys: TaskKey, x: Tensor) -> Tensor:
        """The tasks' true curves at x [P]: float32 [T, P]. Or each at its own x [T, P]."""
        amplitude, phase = (v.unsqueeze(-1).double() for v in self.amplitude_and_phase(keys))
        # In float64, then rounded: a float32 sine's last bit depends on where in the vector (so in which shard) it stands.
        return (amplitude * torch.sin(x.double() - phase)).float()

    def sample(self, keys: TaskKey, split: str) -> Task:
        low, high = self.x_range

        def examples(name: str, rows: int) -> Examples:
            x = keys.stream(name).uniform(rows, low=low, high=high)
            return Examples(x.unsqueeze(-1), self.curve(keys, x).unsqueeze(-1))

        return Task(examples("support", self.k_shot), examples("query", self.query_shots))

    def sample_task(self, key: TaskKey, split: str) -> Task:
        return self.sample(key, split)

    def protocol(self, split: str) -> dict[str, Any]:
        return {
            "k_shot": self.k_shot,
            "query_shots": self.query_shots,
            "amplitude": self.amplitude,
            "phase": self.phase,
            "x_range": self.x_range,
        }

    def sizes(self, split: str) -> tuple[int, int]:
        return self.k_shot, self.query_shots
