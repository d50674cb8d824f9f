"""Define Gymnasium environments as users write them, valid and invalid.

``tests/environments/test_simulators.py`` names them by import path.
"""

from __future__ import annotations

import random

import gymnasium
import numpy as np
from gymnasium import spaces


class Point(gymnasium.Env):
    """The policy pushes a point on a line to a goal, against a random wind. An episode ends near the goal."""

    observation_space = spaces.Box(-np.inf, np.inf, (2, 1), np.float64)
    action_space = spaces.Box(-2.0, 4.0, (1,), np.float32)

    def __init__(self, near=0.02):
        self.near, self.goal, self.wind = near, None, None

    def sample_tasks(self, count, generator, split):
        low = {"train": 0.0, "validation": 1.0, "test": 2.0}[split]
        return [{"goal": low + generator.random(), "wind": generator.normal(size=2)} for _ in range(count)]

    def set_task(self, task):
        self.goal, self.wind = task["goal"], task["wind"]

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.place = self.np_random.normal()
        return self.seen(), {}

    def seen(self):
        return np.array([[self.place], [self.wind[0]]])

    def step(self, action):
        assert self.action_space.contains(action)
        self.place += 0.1 * float(action[0]) + 0.01 * self.wind[1] * self.np_random.normal()
        away = abs(self.place - self.goal)
        return self.seen(), -away, away < self.near, False, {"away": away}


class Leaky(Point):
    """A reset does not clear all of the state."""

    steps = 0

    def step(self, action):
        self.steps += 1
        observation, reward, *rest = super().step(action)
        return observation, reward - self.steps, *rest


class Gambling(Point):
    """Rewards come from Python's own generator."""

    def step(self, action):
        observation, reward, *rest = super().step(action)
        return observation, reward + random.random(), *rest


def normalised():
    """A wrapper whose running averages outlive the episode."""
    return gymnasium.wrappers.NormalizeObservation(Point())


class Bad(Point):
    """Returns invalid values from the third step of an episode, where the fraction of the goal is above .5."""

    def __init__(self, how="raise"):
        super().__init__(near=0.0)
        self.how = how

    def reset(self, *, seed=None, options=None):
        self.clock = 0
        found = super().reset(seed=seed)
        if self.goal % 1 > 0.5 and self.how == "reset":
            raise OSError("no such robot")
        return found

    def step(self, action):
        self.clock += 1
        observation, reward, terminated, truncated, info = super().step(action)
        if self.goal % 1 > 0.5 and self.clock >= 3:
            if self.how == "raise":
                raise ZeroDivisionError("boom")
            if self.how == "old":
                return observation, reward, terminated, info
            observation = {
                "shape": observation[:1],
                "type": observation.astype(object),
                "nan": observation * np.nan,
            }.get(self.how, observation)
            reward = {"reward": "high", "vector": np.ones(2)}.get(self.how, reward)
            info = {"measure": {"away": None}}.get(self.how, info)
        return observation, reward, terminated, truncated, info


class Old(Point):
    """Samples tasks by the older form: with the global generator, and one number as a task."""

    wind = np.zeros(2)

    def sample_tasks(self, count):
        return [np.random.uniform() + 0.0 * self.np_random.uniform() for _ in range(count)]

    def set_task(self, task):
        assert isinstance(task, float)
        self.goal, self.wind = task, np.zeros(2)


class Choices(gymnasium.Env):
    """Discrete actions that do not start at 0, and an observation of several parts."""

    observation_space = spaces.Dict({"cell": spaces.Discrete(3), "level": spaces.Box(0, 1, (2,), np.float32)})
    action_space = spaces.Discrete(2, start=5)

    def sample_tasks(self, count, generator):
        return generator.integers(3, size=(count, 1))

    def set_task(self, task):
        (self.task,) = task

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        return {"cell": int(self.task), "level": np.zeros(2, np.float32)}, {}

    def step(self, action):
        assert action in self.action_space
        return {"cell": 0, "level": np.full(2, action - 5, np.float32)}, action, False, False, {}


class Changing(Point):
    """Tasks with different fields."""

    def __init__(self, how):
        super().__init__()
        self.how, self.count = how, 0

    def sample_tasks(self, count, generator):
        self.count += 1
        task = {"goal": 1.0, "wind": np.zeros(2)}
        later = {
            "unknown": {**task, "gaol": 1.0},
            "missing": {"goal": 1.0},
            "shape": {**task, "wind": np.zeros(3)},
            "text": {**task, "goal": "far"},
        }
        return [task if self.count == 1 else later[self.how]]


def wrapped():
    return gymnasium.wrappers.TimeLimit(Point(near=0.0), 7)


def no_tasks():
    return gymnasium.make("CartPole-v1")


class Parts(Choices):
    """Observations of several parts as simulators return them: float64, a rounding beyond the bounds, whole floats."""

    observation_space = spaces.Dict(
        {
            "cell": spaces.Discrete(3, start=1),
            "level": spaces.Box(0, 1, (2,), np.float32),
            "more": spaces.Tuple([spaces.MultiBinary(2), spaces.MultiDiscrete([2, 3])]),
        }
    )

    def __init__(self, **wrong):
        self.wrong = wrong

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        return self.seen(), {}

    def step(self, action):
        return self.seen(), float(action), False, False, {}

    def seen(self):
        level = np.array([-1e-9, 1.0 + 1e-7])  # float64
        found = {"cell": np.float64(2.0), "level": level, "more": (np.array([0.0, 1.0]), [1, 2])}
        return {n: v for n, v in {**found, **self.wrong}.items() if v is not None}


class Strict(Point):
    """Accepts actions of its space alone."""

    def __init__(self, low, high, dtype="float32"):
        super().__init__()
        self.action_space = spaces.Box(np.array(low, dtype), np.array(high, dtype), dtype=np.dtype(dtype).type)

    def step(self, action):
        assert self.action_space.contains(action), action
        return self.seen(), float(np.sum(action)), False, False, {}


class Several(Choices):
    """Actions of several choices."""

    def __init__(self, space):
        self.action_space = {
            "discrete": spaces.MultiDiscrete([[2], [3]], start=[[4], [0]]),
            "binary": spaces.MultiBinary(3),
            "many": spaces.MultiDiscrete([10] * 6),
        }[space]

    def step(self, action):
        assert action in self.action_space and action.dtype == self.action_space.dtype
        weights = 10.0 ** np.arange(action.size)
        return {"cell": 0, "level": np.zeros(2)}, float(action.flatten() @ weights), False, False, {}


def unusual():
    made = Point()
    made.action_space = spaces.Dict({"push": spaces.Discrete(2)})
    return made
