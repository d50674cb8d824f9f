"""Plain Gymnasium twins of metadist's environments, for the RL² benchmark. This module needs Gymnasium."""

from __future__ import annotations

from typing import Any

import gymnasium
import numpy as np

from metadist.environments.gridworld import MOVES


class PlainTrial(gymnasium.Env):
    """A trial in one task, with given random numbers."""

    def __init__(self, environment: Any, task: dict[str, Any], noise: Any) -> None:
        self.environment, self.task, self.noise = environment, task, noise
        size = environment.observation_size
        self.observation_space = gymnasium.spaces.Box(-np.inf, np.inf, (size,), np.float32)
        self.action_space = gymnasium.spaces.Discrete(environment.actions.count)

    def reset(self, *, seed: int | None = None, options: Any = None) -> Any:
        self.clock, self.state = 0, 0
        return self.observe(), {}

    def step(self, action: Any) -> Any:
        reward = self.move(int(action), self.noise[self.clock])
        self.clock += 1
        if self.clock % self.environment.horizon == 0:
            self.state = 0
        return self.observe(), reward, False, self.clock == self.environment.steps, {}

    def observe(self) -> Any:
        """Return the one-hot state, or an empty observation where the environment has none."""
        observation = np.zeros(self.environment.observation_size, np.float32)
        if len(observation) > 1:
            observation[self.state] = 1.0
        return observation

    def move(self, action: int, noise: Any) -> float:
        """Change the state and return the reward."""
        raise NotImplementedError


class PlainBandit(PlainTrial):
    """The twin of ``Bandit``."""

    def move(self, action: int, noise: Any) -> float:
        return float(noise[0] < self.task["mean"][action])


class PlainTabularMDP(PlainTrial):
    """The twin of ``TabularMDP``."""

    def move(self, action: int, noise: Any) -> float:
        normal = np.sqrt(-2.0 * np.log1p(-np.float64(noise[1]))) * np.cos(2.0 * np.pi * np.float64(noise[2]))
        reward = self.task["reward"][self.state, action] + normal
        self.state = int(np.searchsorted(self.task["below"][self.state, action], noise[0], side="right"))
        return float(reward)


class PlainGridworld(PlainTrial):
    """The twin of ``Gridworld``."""

    def move(self, action: int, noise: Any) -> float:
        size, (dx, dy) = self.environment.size, MOVES[action]
        x, y = self.state % size, self.state // size
        x, y = min(max(x + dx, 0), size - 1), min(max(y + dy, 0), size - 1)
        self.state = y * size + x
        return 1.0 if self.state == self.task["goal"] else -0.1


#: The plain twin of an environment, by the name of the environment's class.
TWINS: dict[str, type[PlainTrial]] = {
    "Bandit": PlainBandit,
    "TabularMDP": PlainTabularMDP,
    "Gridworld": PlainGridworld,
}
