"""Define a grid with a hidden goal (Zintgraf et al., "VariBAD", ICLR 2020, §5.1)."""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from metadist.core.errors import ConfigError
from metadist.core.random import TaskKey
from metadist.rl.environment import Discrete, MetaEnvironment, Step, Tasks

#: stay, up, right, down, left as (Δx, Δy)
MOVES = ((0, 0), (0, 1), (1, 0), (0, -1), (-1, 0))


@dataclass(frozen=True, kw_only=True)
class Gridworld(MetaEnvironment):
    """A square grid; the reward is +1 for every step that ends on the goal and −.1 for every other step.

    Every episode begins in (0, 0) and lasts ``horizon`` steps. The goal is any cell except the four that are at most
    one step from the start in x and in y: 21 goals with ``size`` 5. A task is ``goal`` [B] int64, the cell's number
    size · y + x. The observation is the cell one-hot, not (x, y) as in the paper: a policy must remember the cells
    that it has seen, and with a one-hot cell its first layer is a lookup table.

    The splits sample the same goals with different keys. With ``held_out_goals`` h, validation and test have h goals
    each that no other split has; these goals are the same in every run.
    """

    size: int = 5
    horizon: int = 15
    episodes: int = 4
    held_out_goals: int = 0

    def __post_init__(self) -> None:
        self.check_least(size=3, horizon=1, episodes=1, held_out_goals=0)
        if 2 * self.held_out_goals >= (count := self.size**2 - 4):
            raise ConfigError(
                f"environment.held_out_goals: {self.held_out_goals} each for validation and test leaves none of "
                f"{count} goals for training; expected at most {(count - 1) // 2}"
            )

    @property
    def observation_size(self) -> int:
        return self.size**2

    @property
    def actions(self) -> Discrete:
        return Discrete(len(MOVES))

    def goals(self, split: str) -> Tensor:
        """Return the cells that are goals in ``split``: int64 [G]."""
        cells = [y * self.size + x for y in range(self.size) for x in range(self.size) if max(x, y) > 1]
        if not self.held_out_goals:
            return torch.tensor(cells)
        order = TaskKey.of(0, "train", 0, [0]).stream("held-out goals").choose(len(cells), len(cells)).flatten()
        validation, test, train = torch.tensor(cells)[order].split(
            [held := self.held_out_goals, held, len(cells) - 2 * held]
        )
        return {"train": train, "validation": validation, "test": test}[split]

    def sample(self, keys: TaskKey) -> Tasks:
        goals = self.goals(keys.split).to(keys.tasks.device)
        return {"goal": goals[keys.stream("goal").integers(len(goals))]}

    def reset(self, tasks: Tasks, noise: Tensor) -> tuple[Any, Tensor]:
        cell = torch.zeros_like(tasks["goal"])
        return cell, self._observe(cell)

    def step(self, tasks: Tasks, state: Any, action: Tensor, noise: Tensor) -> Step:
        cell = _following(self.size, state.device)[state * len(MOVES) + action]
        there = cell == tasks["goal"]
        return Step(cell, self._observe(cell), there * 1.1 - 0.1, torch.zeros_like(there))

    def _observe(self, cell: Tensor) -> Tensor:
        return torch.zeros(len(cell), self.size**2, device=cell.device).scatter_(1, cell.unsqueeze(1), 1.0)

    def protocol(self, split: str) -> dict[str, Any]:
        return {**super().protocol(split), "size": self.size, "goals": len(self.goals(split))}


@lru_cache(maxsize=16)
def _following(size: int, device: torch.device) -> Tensor:
    """Return the cell after every move from every cell: int64 [cells · moves]; a move into a wall has no effect."""

    def inside(at: int) -> int:
        return min(max(at, 0), size - 1)

    cells = [(x, y) for y in range(size) for x in range(size)]
    return torch.tensor([inside(y + dy) * size + inside(x + dx) for x, y in cells for dx, dy in MOVES], device=device)
