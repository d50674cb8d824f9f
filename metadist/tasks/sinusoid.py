"""Define sinusoid regression (Finn, Abbeel & Levine, "Model-agnostic meta-learning", ICML 2017, §5.1)."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from metadist.core.errors import ConfigError
from metadist.core.random import TaskKey, uniform
from metadist.core.task import Examples, Task, TaskFamily


@dataclass(frozen=True, kw_only=True)
class Sinusoid(TaskFamily):
    """Regression of y = A sin(x − φ), with A, φ (radians) and x uniform in the given ranges.

    x and y are float32 [rows, 1].
    """

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
        """Return the tasks' A and φ, each with the shape of ``keys.tasks``."""
        amplitude, phase = keys.words(amplitude=1, phase=1)
        return uniform(amplitude, *self.amplitude).squeeze(-1), uniform(phase, *self.phase).squeeze(-1)

    def curve(self, keys: TaskKey, x: Tensor) -> Tensor:
        """Return the tasks' true curves float32 [T, P] at x [P], or each task's at its own x [T, P]."""
        amplitude, phase = self.amplitude_and_phase(keys)
        return _curve(amplitude.unsqueeze(-1), phase.unsqueeze(-1), x)

    def sample(self, keys: TaskKey, split: str) -> Task:
        k, q = self.k_shot, self.query_shots
        amplitude, phase, support, query = keys.words(amplitude=1, phase=1, support=k, query=q)
        x = uniform(torch.cat((support, query), dim=-1), *self.x_range)
        y = _curve(uniform(amplitude, *self.amplitude), uniform(phase, *self.phase), x)
        parts = zip(x.split_with_sizes((k, q), dim=-1), y.split_with_sizes((k, q), dim=-1))
        given, asked = (Examples(x.contiguous().unsqueeze(-1), y.contiguous().unsqueeze(-1)) for x, y in parts)
        return Task(given, asked)

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


def _curve(amplitude: Tensor, phase: Tensor, x: Tensor) -> Tensor:
    # In float64, then rounded: a float32 sine's last bit depends on its position in the vector, and so on the shard.
    return (amplitude.double() * torch.sin(x.double() - phase.double())).float()
