"""Play programmed agents in the same trials as policies: the same tasks and the same random numbers."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from metadist.core.random import TaskKey
from metadist.rl.environment import Discrete, MetaEnvironment, Tasks


class Agent:
    """The base of all agents: plays a batch of trials.

    An agent sees the environment's state. An agent that reads ``tasks`` gives an upper bound. All random numbers come
    from streams of ``keys``, so that an agent acts the same in every batch.
    """

    def __init__(self, environment: Any, tasks: Tasks, keys: TaskKey) -> None:
        self.environment, self.tasks, self.keys = environment, tasks, keys
        self.device = keys.tasks.device

    def act(self, t: int, state: Any) -> Tensor:
        """Return the actions at the trial's step ``t``."""
        raise NotImplementedError

    def learn(self, t: int, state: Any, action: Tensor, reward: Tensor, following: Any) -> None:
        """Update the agent's statistics with the step's reward and next state."""

    def uniform(self, t: int, *shape: int) -> Tensor:
        """Return the agent's uniform random numbers of step ``t``: [B, *shape] float32."""
        return self.keys.stream("oracle", step=t).uniform(*shape)


Method = Callable[[Any, Tasks, TaskKey], Agent]
"""(environment, tasks, keys) → agent. Raises ConfigError for environments that the method cannot play."""


class Random(Agent):
    """Take uniform actions, in [−1, 1] where they are continuous."""

    def act(self, t: int, state: Any) -> Tensor:
        actions = self.environment.actions
        if isinstance(actions, Discrete):
            return (self.uniform(t, 1).squeeze(1) * actions.count).long()
        return self.uniform(t, actions.size) * 2 - 1


@torch.no_grad()
def play_with(environment: MetaEnvironment, method: Method, keys: TaskKey) -> Tensor:
    """Return the returns by episode, float64 [B, episodes], of ``method`` in the trials of ``rl.trial.rollout``."""
    tasks, device, batch = environment.sample(keys), keys.tasks.device, len(keys.tasks)
    agent = method(environment, tasks, keys)
    stepping = keys.stream("environment").uniform(environment.steps, environment.step_noise)
    starting = keys.stream("reset").uniform(environment.episodes, environment.reset_noise)
    each = torch.arange(batch, device=device)
    # One column more than episodes, for the rewards of trials that have ended.
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
