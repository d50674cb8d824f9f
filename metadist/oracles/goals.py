"""Play the gridworld and 2D navigation with a known goal."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from metadist.oracles.play import Agent, Method, Random

_STAY, _UP, _RIGHT, _DOWN, _LEFT = range(5)


class KnownCell(Agent):
    """Walk to the goal by a shortest path, and stay there."""

    def act(self, t: int, state: Any) -> Tensor:
        size, goal = self.environment.size, self.tasks["goal"]
        right, up = goal % size - state % size, goal // size - state // size
        across = torch.where(right > 0, _RIGHT, _LEFT)
        along = torch.where(up > 0, _UP, torch.where(up < 0, _DOWN, _STAY))
        return torch.where(right != 0, across, along)


class KnownPoint(Agent):
    """Move towards the goal in each coordinate separately: no other policy is closer to the goal at any step."""

    def act(self, t: int, state: Any) -> Tensor:
        return (self.tasks["goal"] - state) / self.environment.speed


GRIDWORLD: dict[str, Method] = {"known_goal": KnownCell, "random": Random}
NAVIGATION: dict[str, Method] = {"known_goal": KnownPoint, "random": Random}
