"""Define meta-environments: distributions over MDPs whose tasks are tensors and whose steps are batched."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar, Union

import torch
import torch.utils._pytree as pytree
from torch import Tensor

from metadist.core.errors import ConfigError
from metadist.core.random import TaskKey

Tasks = Mapping[str, Tensor]
"""A batch of tasks as named tensors [B, …], complete: a task runs in any process."""


@dataclass(frozen=True)
class Discrete:
    """``count`` actions; an action is int64 in [0, count)."""

    count: int

    @property
    def size(self) -> int:
        """Return the number of features that encode an action for the policy."""
        return self.count


@dataclass(frozen=True)
class Continuous:
    """An action is a float32 vector [size]; the environment clips it to its own bounds."""

    size: int


Actions = Union[Discrete, Continuous]


@dataclass(frozen=True)
class Step:
    """The result of one step: the next state, observation [B, O] and reward [B] float32, ``terminated`` [B] bool.

    ``terminated`` marks episodes that ended by themselves (``horizon`` ends the others). ``measured`` holds further
    values by name, [B] float32, for reports; the policy does not see them.
    """

    state: Any
    observation: Tensor
    reward: Tensor
    terminated: Tensor
    measured: Mapping[str, Tensor] = field(default_factory=dict)


class MetaEnvironment:
    """A distribution over MDPs. Subclass it as a frozen dataclass and write ``sample``, ``reset`` and ``step``.

    A *trial* is ``episodes`` episodes of at most ``horizon`` steps in one task. All three methods are pure functions of
    their arguments. Their only source of randomness is ``noise``: uniform float32 in [0, 1), keyed by (run seed, split,
    meta-step, task, step), [B, reset_noise] and [B, step_noise].
    """

    metric_name: ClassVar[str] = "return"
    higher_is_better: ClassVar[bool] = True

    episodes: int
    horizon: int
    #: how many uniform numbers ``reset`` and ``step`` take for each task
    reset_noise: int = 0
    step_noise: int = 0
    #: SHA-256 of the data, which every worker and a resumed run must share; None for environments without data
    data_sha256: str | None = None
    #: ``skip`` where shards may leave out trials of an environment that fails; None where it cannot fail
    on_error: str | None = None

    def splits(self) -> Mapping[str, Sequence[str]] | None:
        """Return the names of each split's sources of tasks, none in two splits; None where there are no such names."""
        return None

    def data_notes(self) -> Sequence[str]:
        """Return what the user should know about the data of the tasks, a line for each."""
        return ()

    @property
    def title(self) -> str:
        """Return the environment's name in messages."""
        return type(self).__name__

    @property
    def observation_size(self) -> int:
        raise NotImplementedError

    @property
    def actions(self) -> Actions:
        raise NotImplementedError

    @property
    def steps(self) -> int:
        """Return the maximum number of steps of a trial."""
        return self.episodes * self.horizon

    def prepare(self, device: torch.device) -> None:
        """Load large data. Called once in every process that steps environments."""

    def sample(self, keys: TaskKey) -> Tasks:
        """Return the tasks of ``keys`` ([B] indices), on the device of ``keys.tasks``."""
        raise NotImplementedError

    def reset(self, tasks: Tasks, noise: Tensor) -> tuple[Any, Tensor]:
        """Begin an episode in every task: return (state, observation [B, O])."""
        raise NotImplementedError

    def step(self, tasks: Tasks, state: Any, action: Tensor, noise: Tensor) -> Step:
        """Take one step in every task."""
        raise NotImplementedError

    def restart(
        self, tasks: Tasks, state: Any, observation: Tensor, ended: Tensor, noise: Tensor
    ) -> tuple[Any, Tensor]:
        """Begin the next episode where ``ended`` [B] is true; keep state and observation elsewhere.

        Environments whose state is not a pytree of tensors override this method.
        """
        new = self.reset(tasks, noise)
        if bool(ended.all()):
            return new

        def choose(a: Tensor, b: Tensor) -> Tensor:
            return torch.where(ended.view(-1, *(1,) * (a.dim() - 1)), a, b)

        chosen: tuple[Any, Tensor] = pytree.tree_map(choose, new, (state, observation))
        return chosen

    def check_least(self, **least: int) -> None:
        """Raise ConfigError where a field is below its least value. Call it in ``__post_init__``."""
        for name, value in least.items():
            if getattr(self, name) < value:
                raise ConfigError(f"environment.{name}: {getattr(self, name)} is below {value}; use {value} or more")

    def left_out(self, state: Any) -> Tensor | None:
        """Return which trials [B] bool do not count because their environment failed; None if all count."""
        return None

    def protocol(self, split: str) -> dict[str, Any]:
        """Return the facts that a reader needs with a score on ``split``."""
        return {"episodes": self.episodes, "horizon": self.horizon}
