"""Define two-armed bandits with correlated arms (Wang et al., "Learning to reinforcement learn", 2016, §3.1.2)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

import torch

from metadist.core.errors import one_of
from metadist.core.random import TaskKey
from metadist.environments.bandit import Arms
from metadist.rl.environment import Tasks

#: p₁ is one of p and 1 − p, with equal probability
SHARES = {"easy": 0.1, "medium": 0.25, "hard": 0.4}


@dataclass(frozen=True, kw_only=True)
class CorrelatedBandit(Arms):
    """Two Bernoulli arms, p₂ = 1 − p₁, pulled ``episodes`` times.

    ``arms_are``: uniform (p₁ ~ U[0, 1]), easy (p₁ is .1 or .9), medium (.25 or .75), hard (.4 or .6), or independent
    (both U[0, 1]: a pull of one arm carries no information about the other).
    """

    episodes: int = 100
    arms_are: Literal["uniform", "easy", "medium", "hard", "independent"] = "uniform"

    arms = 2

    def __post_init__(self) -> None:
        one_of("environment.arms_are", self.arms_are, ("uniform", *SHARES, "independent"))
        self.check_least(episodes=1)

    @property
    def independent(self) -> bool:  # type: ignore[override]
        return self.arms_are == "independent"

    def sample(self, keys: TaskKey) -> Tasks:
        drawn = keys.stream("arms").uniform(2)
        if self.arms_are == "independent":
            return {"mean": drawn}
        first = drawn[..., 0]
        if self.arms_are != "uniform":
            share = SHARES[self.arms_are]
            first = torch.where(first < 0.5, share, 1 - share)
        return {"mean": torch.stack((first, 1 - first), -1)}

    def protocol(self, split: str) -> dict[str, Any]:
        return {"arms": self.arms_are, "pulls": self.episodes}
