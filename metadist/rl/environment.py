"""Meta-environments: distributions over MDPs, whose tasks are data and whose steps are taken for a whole batch at once."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar, Union

import torch
import torch.utils._pytree as pytree
from torch import Tensor

from metadist.core.random import TaskKey

Tasks = Mapping[str, Tensor]
"""What a task is, as named tensors [B, …]: enough to run it anywhere."""


@dataclass(frozen=True)
class Discrete:
    """``count`` actions; an action is int64 in [0, count)."""

    count: int

    @property
    def size(self) -> int:
        """Features that show an action to the policy."""
        return self.count


@dataclass(frozen=True)
class Continuous:
    """An action is a float32 vector [size]; the environment clips it to what it can do."""

    size: int


Actions = Union[Discrete, Continuous]


@dataclass(frozen=True)
class Step:
    """What a batch of environments answers: the next state, observation [B, O] float32, reward [B] float32, and whether the
    episode has come to an end of its own [B] bool (``horizon`` ends it anyway). ``measured``: what else there is to see, by
    name [B] float32; no policy is shown it."""

    state: Any
    observation: Tensor
    reward: Tensor
    terminated: Tensor
    measured: Mapping[str, Tensor] = field(default_factory=dict)


class MetaEnvironment:
    """A distribution over MDPs. Subclass it as a frozen dataclass and write ``sample``, ``reset`` and ``step``.

    A *trial* is ``episodes`` episodes of at most ``horizon`` steps in one task. All three methods are pure functions of
    their arguments; whatever is random comes as ``noise``: uniform float32 in [0, 1), keyed by (run seed, split,
    meta-step, task, step), [B, reset_noise] and [B, step_noise].
    """

    metric_name: ClassVar[str] = "return"
    higher_is_better: ClassVar[bool] = True

    episodes: int
    horizon: int
    #: how many uniform numbers ``reset`` and ``step`` take for each environment
    reset_noise: int = 0
    step_noise: int = 0
    #: SHA-256 of the data, which every worker and a resumed run must share; None for environments without data
    data_sha256: str | None = None
    #: ``skip`` where shards may leave out trials of an environment that fails; None where it cannot fail
    on_error: str | None = None

    @property
    def observation_size(self) -> int:
        raise NotImplementedError

    @property
    def actions(self) -> Actions:
        raise NotImplementedError

    @property
    def steps(self) -> int:
        """Steps of a trial at most."""
        return self.episodes * self.horizon

    def prepare(self, device: torch.device) -> None:
        """Load what is large. Called once in every process that steps environments."""

    def sample(self, keys: TaskKey) -> Tasks:
        """The tasks of ``keys`` ([B] indices), on the device of ``keys.tasks``."""
        raise NotImplementedError

    def reset(self, tasks: Tasks, noise: Tensor) -> tuple[Any, Tensor]:
        """The beginning of an episode: (state, observation [B, O])."""
        raise NotImplementedError

    def step(self, tasks: Tasks, state: Any, action: Tensor, noise: Tensor) -> Step:
        raise NotImplementedError

    def restart(
        self, tasks: Tasks, state: Any, observation: Tensor, ended: Tensor, noise: Tensor
    ) -> tuple[Any, Tensor]:
        """Begin the next episode where ``ended`` [B]; the others go on. States that are no trees of tensors override it."""
        new = self.reset(tasks, noise)
        if bool(ended.all()):
            return new

        def choose(a: Tensor, b: Tensor) -> Tensor:
            return torch.where(ended.view(-1, *(1,) * (a.dim() - 1)), a, b)

        return pytree.tree_map(choose, new, (state, observation))

    def left_out(self, state: Any) -> Tensor | None:
        """Which trials [B] bool are not to count, since their environment has broken down; None: all count."""
        return None

    def protocol(self, split: str) -> dict[str, Any]:
        """What a score on ``split`` must be read with."""
        return {"episodes": self.episodes, "horizon": self.horizon}
