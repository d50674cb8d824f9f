"""Agents that are written, not learned, in the same trials as policies: the same tasks and the same luck."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from metadist.core.random import TaskKey
from metadist.rl.environment import Discrete, MetaEnvironment, Tasks


class Agent:
    """Plays a batch of trials. It may look into the environment's state; one that looks into ``tasks`` is an upper bound.

    Whatever it draws comes from streams of ``keys``, so that it does the same in every batch.
    """

    def __init__(self, environment: Any, tasks: Tasks, keys: TaskKey) -> None:
        self.environment, self.tasks, self.keys = environment, tasks, keys
        self.device = keys.tasks.device

    def act(self, t: int, state: Any) -> Tensor:
        """The actions at the trial's step ``t``."""
        raise NotImplementedError

    def learn(self, t: int, state: Any, action: Tensor, reward: Tensor, following: Any) -> None:
        """What came of it."""

    def uniform(self, t: int, *shape: int) -> Tensor:
        """The agent's own luck at step ``t``: [B, *shape] float32."""
        return self.keys.stream("oracle", step=t).uniform(*shape)


Method = Callable[[Any, Tasks, TaskKey], Agent]
"""(environment, tasks, keys) → agent. Raises ConfigError where the environment is beyond it."""


class Random(Agent):
    """Uniform actions; where they are continuous, in [−1, 1]."""

    def act(self, t: int, state: Any) -> Tensor:
        actions = self.environment.actions
        if isinstance(actions, Discrete):
            return (self.uniform(t, 1).squeeze(1) * actions.count).long()
        return self.uniform(t, actions.size) * 2 - 1


@torch.no_grad()
def play_with(environment: MetaEnvironment, method: Method, keys: TaskKey) -> Tensor:
    """The returns by episode, float64 [B, episodes], of ``method`` in the trials that ``core.trial.rollout`` has for ``keys``."""
    tasks, device, batch = environment.sample(keys), keys.tasks.device, len(keys.tasks)
    agent = method(environment, tasks, keys)
    stepping = keys.stream("environment").uniform(environment.steps, environment.step_noise)
    starting = keys.stream("reset").uniform(environment.episodes, environment.reset_noise)
    each = torch.arange(batch, device=device)
    # One column more than there are episodes: the rewards of trials that are over.
    returns = torch.zeros(batch, environment.episodes + 1, dtype=torch.float64, device=device)
    episode, clock = torch.zeros_like(each), torch.zeros_like(each)
    state, observation = environment.reset(tasks, starting[:, 0])
    for t in range(environment.steps):
        action = agent.act(t, state)
        step = environment.step(tasks, state, action, stepping[:, t])
        agent.learn(t, state, action, step.reward, step.state)
        returns[each, episode] += step.reward
        clock += 1
        ended = (step.terminated | (clock >= environment.horizon)) & (episode < environment.episodes)
        episode += ended
        state, observation = step.state, step.observation
        if bool((episode == environment.episodes).all()):
            break
        if bool(ended.any()):
            noise = starting[each, episode.clamp(max=environment.episodes - 1)]
            state, observation = environment.restart(tasks, state, observation, ended, noise)
            clock = torch.where(ended, 0, clock)
    return returns[:, :-1]
