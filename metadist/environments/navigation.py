"""Define 2D point navigation (Finn, Abbeel & Levine, "Model-agnostic meta-learning", ICML 2017, §5.3)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from metadist.core.errors import ConfigError, one_of
from metadist.core.random import TaskKey
from metadist.rl.environment import Continuous, MetaEnvironment, Step, Tasks


@dataclass(frozen=True, kw_only=True)
class Navigation(MetaEnvironment):
    """A point starts at (0, 0) and moves to a hidden goal, uniform in [−.5, .5]²; the observation is its position.

    Paper and code differ. This environment follows the code, which gives the published figures (about −40 before
    adaptation): the reward is minus the *distance* (the paper says squared distance: ``reward: squared``), and an
    episode ends with both coordinates closer than .01 (the paper: distance). An action is a velocity in units of
    ``speed``, clipped to [−1, 1] in each coordinate: the code's environment takes ±.1, and its wrapper scales it to
    [−1, 1].

    A task is ``goal`` [B, 2].
    """

    horizon: int = 100
    episodes: int = 2
    reward: Literal["distance", "squared"] = "distance"
    speed: float = 0.1

    def __post_init__(self) -> None:
        one_of("environment.reward", self.reward, ("distance", "squared"))
        self.check_least(horizon=1, episodes=1)
        if not self.speed > 0:
            raise ConfigError(f"environment.speed: {self.speed} is not above 0; use a positive number")

    @property
    def observation_size(self) -> int:
        return 2

    @property
    def actions(self) -> Continuous:
        return Continuous(2)

    def sample(self, keys: TaskKey) -> Tasks:
        return {"goal": keys.stream("goal").uniform(2, low=-0.5, high=0.5)}

    def reset(self, tasks: Tasks, noise: Tensor) -> tuple[Any, Tensor]:
        position = torch.zeros_like(tasks["goal"])
        return position, position

    def step(self, tasks: Tasks, state: Any, action: Tensor, noise: Tensor) -> Step:
        position = state + action.clamp(-1.0, 1.0) * self.speed
        away = position - tasks["goal"]
        squared = away.square().sum(-1)
        cost = squared if self.reward == "squared" else squared.sqrt()
        return Step(position, position, -cost, (away.abs() < 0.01).all(-1))

    def protocol(self, split: str) -> dict[str, Any]:
        return {**super().protocol(split), "reward": self.reward, "speed": self.speed}
