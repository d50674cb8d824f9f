"""Task families and a meta-environment without data, on which algorithms and models are checked.

Every value is a pure function of the key, with the same bits in any shard.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from metadist.core.random import TaskKey
from metadist.core.task import Classification, Examples, Task, TaskFamily
from metadist.rl.environment import Actions, Continuous, Discrete, MetaEnvironment, Step, Tasks


@dataclass(frozen=True)
class Curves(TaskFamily):
    """y = sin(x A + b), with A [2, 2] and b [1, 2] of each task's own. x and y are float32 [rows, 2]."""

    rows: int = 6
    query_rows: int = 4
    input_shape: tuple[int, ...] = (2,)
    outputs: int = 2

    def sample(self, keys: TaskKey, split: str) -> Task:
        a, b = keys.stream("a").normal(2, 2), keys.stream("b").normal(1, 2)

        def examples(name: str, rows: int) -> Examples:
            x = keys.stream(name).normal(rows, 2)
            # Spelled out and in float64: a float32 product's last bit depends on how many tasks are sampled together.
            inside = (
                x[..., :1].double() * a[..., :1, :].double() + x[..., 1:].double() * a[..., 1:, :].double() + b.double()
            )
            return Examples(x, torch.sin(inside).float())

        return Task(examples("support", self.rows), examples("query", self.query_rows))

    def sample_task(self, key: TaskKey, split: str) -> Task:
        return self.sample(key, split)


@dataclass(frozen=True)
class Blobs(Classification):
    """Noisy copies of one random pattern per class. x is float32 [rows, *input_shape]; rows are shot-major."""

    outputs: int = 3
    shots: int = 2
    query_shots: int = 2
    input_shape: tuple[int, ...] = (4,)
    noise: float = 0.5

    def sample(self, keys: TaskKey, split: str) -> Task:
        centres = keys.stream("centres").normal(1, self.outputs, *self.input_shape)

        def examples(name: str, shots: int) -> Examples:
            x = centres + self.noise * keys.stream(name).normal(shots, self.outputs, *self.input_shape)
            batch = keys.tasks.dim()
            return Examples(x.flatten(batch, batch + 1), torch.arange(self.outputs).repeat(*keys.tasks.shape, shots))

        return Task(examples("support", self.shots), examples("query", self.query_shots))

    def sample_task(self, key: TaskKey, split: str) -> Task:
        return self.sample(key, split)


@dataclass(frozen=True)
class Chance(MetaEnvironment):
    """Noise as observations; an action pays its product with the task's number; an episode ends with chance ``end``."""

    episodes: int = 3
    horizon: int = 4
    end: float = 0.3
    count: int = 3
    continuous: bool = False

    reset_noise = 2
    step_noise = 4

    @property
    def observation_size(self) -> int:
        return 2

    @property
    def actions(self) -> Actions:
        return Continuous(2) if self.continuous else Discrete(self.count)

    def sample(self, keys: TaskKey) -> Tasks:
        return {"number": keys.stream("number").uniform(1, low=-1.0, high=1.0).squeeze(-1)}

    def reset(self, tasks: Tasks, noise: Tensor) -> tuple[Any, Tensor]:
        return noise, noise

    def step(self, tasks: Tasks, state: Any, action: Tensor, noise: Tensor) -> Step:
        action = action.sum(-1) if self.continuous else action
        observation = noise[:, 2:] - 0.5
        return Step(observation, observation, tasks["number"] * action + noise[:, 1], noise[:, 0] < self.end)
