"""Define random finite Markov decision processes (Osband et al. 2013; Duan et al., "RL²", 2016, §3.2)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from metadist.core.random import TaskKey
from metadist.rl.environment import Discrete, MetaEnvironment, Step, Tasks
from metadist.rl.policy import standard_normal


@dataclass(frozen=True, kw_only=True)
class TabularMDP(MetaEnvironment):
    """An MDP with reward ~ N(μ_sa, 1), μ_sa ~ N(1, 1) and P(· | s, a) ~ Dirichlet(1); every episode begins in state 0.

    A task is ``reward`` μ [B, S, A] and ``below`` [B, S, A, S], the cumulative probability of the next states 0 … s′
    (the last is 1). The observation is the state, one-hot.
    """

    states: int = 10
    actions_each: int = 5
    horizon: int = 10
    episodes: int = 10

    step_noise = 3

    def __post_init__(self) -> None:
        self.check_least(states=2, actions_each=2, horizon=1, episodes=1)

    @property
    def observation_size(self) -> int:
        return self.states

    @property
    def actions(self) -> Discrete:
        return Discrete(self.actions_each)

    def sample(self, keys: TaskKey) -> Tasks:
        shape = (self.states, self.actions_each)
        # Dirichlet(1): normalised exponentials. A running sum adds one by one, so a row's bits do not depend on other
        # rows.
        exponential = -torch.log1p(-keys.stream("transition").uniform(*shape, self.states).double())
        sums = exponential.cumsum(-1)
        return {
            "reward": keys.stream("reward").normal(*shape) + 1.0,
            "below": (sums / sums[..., -1:]).to(torch.float32),
        }

    def transition(self, tasks: Tasks) -> Tensor:
        """Return P [B, S, A, S], float64."""
        return tasks["below"].double().diff(dim=-1, prepend=torch.zeros_like(tasks["below"][..., :1]).double())

    def reset(self, tasks: Tasks, noise: Tensor) -> tuple[Any, Tensor]:
        reward = tasks["reward"]
        state = torch.zeros(len(reward), dtype=torch.int64, device=reward.device)
        return state, self._observe(state)

    def step(self, tasks: Tasks, state: Any, action: Tensor, noise: Tensor) -> Step:
        row = torch.arange(len(state), device=state.device) * self.states + state
        row = row * self.actions_each + action
        below = tasks["below"].reshape(-1, self.states).index_select(0, row)
        following = (noise[:, :1] >= below).sum(-1)
        reward = tasks["reward"].reshape(-1).index_select(0, row) + standard_normal(noise[:, 1:]).squeeze(-1)
        return Step(following, self._observe(following), reward, torch.zeros_like(following, dtype=torch.bool))

    def _observe(self, state: Tensor) -> Tensor:
        return torch.zeros(len(state), self.states, device=state.device).scatter_(1, state.unsqueeze(1), 1.0)

    def protocol(self, split: str) -> dict[str, Any]:
        return {**super().protocol(split), "states": self.states, "actions": self.actions_each}
