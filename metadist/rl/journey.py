"""Play an episode without a policy: actions depend on the row and the step alone, so batches can be compared."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from metadist.core.random import TaskKey
from metadist.rl.environment import Discrete, MetaEnvironment, Step

#: the tasks of a journey have indices below ``ROWS``
ROWS, STEPS = 6, 12

Watch = Callable[[int, Any, Callable[[], Step]], Step]
"""(step from 1, state, the call that takes the step) → the step, for checks around it."""


def actions_of(environment: MetaEnvironment, rows: Sequence[int], t: int) -> Tensor:
    """Return the actions of step ``t``, which depend on the row alone; some continuous ones are out of range."""
    generator, actions = torch.Generator().manual_seed(t), environment.actions
    if isinstance(actions, Discrete):
        return torch.randint(actions.count, (ROWS,), generator=generator)[list(rows)]
    return (torch.rand(ROWS, actions.size, generator=generator) * 3 - 1.5)[list(rows)]


def journey(
    environment: MetaEnvironment,
    key: TaskKey,
    steps: int | None = None,
    watch: Watch = lambda number, state, step: step(),
) -> dict[str, Tensor]:
    """Return tasks, observations, rewards and ends of one episode, by name, one row for each task."""
    rows = key.tasks.tolist()
    steps = min(STEPS, environment.horizon) if steps is None else steps
    noise = key.stream("environment").uniform(max(steps, 1), max(environment.step_noise, 1))[
        ..., : environment.step_noise
    ]
    starting = key.stream("reset").uniform(max(environment.reset_noise, 1))[:, : environment.reset_noise]
    tasks = environment.sample(key)
    state, observation = environment.reset(tasks, starting)
    found = {**{f"task '{n}'": t for n, t in tasks.items()}, "the first observation": observation}
    for t in range(steps):
        actions, before = actions_of(environment, rows, t), state

        def take(actions: Tensor = actions, before: Any = before, t: int = t) -> Step:
            return environment.step(tasks, before, actions, noise[:, t])

        step = watch(t + 1, state, take)
        found |= {
            f"the observation after step {t + 1}": step.observation,
            f"the reward of step {t + 1}": step.reward,
            f"the end of step {t + 1}": step.terminated,
        }
        found |= {f"'{name}' measured in step {t + 1}": value for name, value in step.measured.items()}
        state = step.state
    return found
