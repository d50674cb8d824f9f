"""Define multi-armed bandits (Duan et al., "RL²", 2016, §3.1): a trial is n pulls, each an episode of one step."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from metadist.core.errors import ConfigError, one_of
from metadist.core.random import TaskKey
from metadist.rl.environment import Discrete, MetaEnvironment, Step, Tasks
from metadist.rl.policy import standard_normal


class Arms(MetaEnvironment):
    """The base of all bandits: a task is the means of its arms, ``mean`` [B, arms]; the observation is a constant 0.

    A Bernoulli arm pays where the step's uniform number is below its mean. All policies have the same random numbers in
    a trial: two policies that pull the same arm at the same step get the same reward.
    """

    horizon = 1
    step_noise = 1
    arms: int
    #: whether rewards are N(mean, 1); otherwise they are Bernoulli
    gaussian: bool = False
    #: whether a pull of one arm carries no information about the others
    independent: bool = True

    @property
    def observation_size(self) -> int:
        return 1

    @property
    def actions(self) -> Discrete:
        return Discrete(self.arms)

    def reset(self, tasks: Tasks, noise: Tensor) -> tuple[Any, Tensor]:
        mean = tasks["mean"]
        observation = mean.new_zeros(len(mean), 1)
        return (observation, observation.squeeze(1) == 0), observation

    def step(self, tasks: Tasks, state: Any, action: Tensor, noise: Tensor) -> Step:
        observation, terminated = state
        return Step(state, observation, self.pay(_of(tasks["mean"], action), noise), terminated)

    def pay(self, mean: Tensor, noise: Tensor) -> Tensor:
        """Return the reward [B] of a pull of arms with these means [B]."""
        return (noise.squeeze(-1) < mean).to(torch.float32)

    def restart(
        self, tasks: Tasks, state: Any, observation: Tensor, ended: Tensor, noise: Tensor
    ) -> tuple[Any, Tensor]:
        return state, observation  # a pull does not change the state


@dataclass(frozen=True, kw_only=True)
class Bandit(Arms):
    """``arms`` independent arms, pulled ``episodes`` times.

    bernoulli: mean ~ U[0, 1]. gaussian: mean ~ N(``prior_mean``, ``prior_deviation``²), reward ~ N(mean, 1).
    """

    arms: int = 5
    episodes: int = 10
    reward: Literal["bernoulli", "gaussian"] = "bernoulli"
    prior_mean: float = 0.0
    prior_deviation: float = 1.0

    def __post_init__(self) -> None:
        one_of("environment.reward", self.reward, ("bernoulli", "gaussian"))
        self.check_least(arms=2, episodes=1)
        if not self.prior_deviation > 0:
            raise ConfigError(
                f"environment.prior_deviation: {self.prior_deviation} is not above 0; use a positive number"
            )

    @property
    def gaussian(self) -> bool:  # type: ignore[override]
        return self.reward == "gaussian"

    @property
    def step_noise(self) -> int:  # type: ignore[override]
        return 1 if self.reward == "bernoulli" else 2

    def sample(self, keys: TaskKey) -> Tasks:
        stream = keys.stream("arms")
        if self.reward == "bernoulli":
            return {"mean": stream.uniform(self.arms)}
        return {"mean": stream.normal(self.arms) * self.prior_deviation + self.prior_mean}

    def pay(self, mean: Tensor, noise: Tensor) -> Tensor:
        return super().pay(mean, noise) if self.reward == "bernoulli" else mean + standard_normal(noise).squeeze(-1)

    def protocol(self, split: str) -> dict[str, Any]:
        return {"arms": self.arms, "pulls": self.episodes, "reward": self.reward}


def _of(table: Tensor, index: Tensor) -> Tensor:
    """Select one entry of each row: table [B, N], index [B] → [B]."""
    return table.gather(1, index.unsqueeze(1)).squeeze(1)
