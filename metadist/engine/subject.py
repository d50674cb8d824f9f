"""Define the interface of a learner that the engine compares and measures."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Protocol

import torch
from torch import Tensor

from metadist.core.algorithm import Algorithm, Theta
from metadist.core.engine import Engine
from metadist.core.model import BoundModel, Model
from metadist.core.outer import OuterLoop
from metadist.core.random import TaskKey
from metadist.core.round import Result, Shard, WithOutput
from metadist.core.state import Contribution, Records, Slot, State
from metadist.core.task import Task, TaskFamily
from metadist.core.task_metrics import TaskMetric
from metadist.engine.meta_gradient import MetaGradient


class Subject(Protocol):
    """A learner whose shards consist of task meta-gradients. The few-shot learner satisfies this protocol."""

    algorithm: Algorithm
    model: Model
    tasks: TaskFamily
    outer: OuterLoop
    engine: Engine
    non_finite: str
    device: torch.device
    slots: dict[str, Slot]
    task_metrics: tuple[TaskMetric, ...]

    @property
    def meta_gradient(self) -> MetaGradient:
        """Return the meta-gradient under ``engine``."""
        ...

    def meta_gradient_under(self, engine: Engine) -> MetaGradient:
        """Return the meta-gradient under another engine; ``self.engine`` does not change."""
        ...

    def set_engine(self, engine: Engine) -> None:
        """Compute all later contributions under ``engine``."""
        ...

    def initial(self, seed: int) -> State:
        """Return the state before meta-step 0."""
        ...

    def bind(self, theta: Theta, key: TaskKey | None, training: bool) -> BoundModel:
        """Return the model with θ's frozen parameters and buffers, for one task."""
        ...

    def sample(self, keys: TaskKey) -> Task:
        """Return the tasks of ``keys``, stacked [T, …], on ``device``."""
        ...

    def sample_largest(self, keys: TaskKey) -> Task:
        """Return the tasks of ``keys``, padded to the largest size of a training task where tasks differ in size."""
        ...

    def compute(self, shard: Shard, theta: Mapping[str, Tensor]) -> Result | WithOutput:
        """Compute one shard under the slot vectors ``theta``."""
        ...

    def contribute(self, theta: Theta, keys: TaskKey, meta_step: int) -> Contribution:
        """Return the sum of the contributions of the tasks of ``keys``.

        Raises NonFiniteError where a task's contribution has NaN or Inf.
        """
        ...

    def evaluate(self, theta: Theta, keys: TaskKey, meta_step: int, inner_steps: int | None = None) -> Records:
        """Return the scores of every task of ``keys`` after 0, 1, …, k adaptation steps."""
        ...

    def several_graphs(self) -> str | None:
        """Return why a few graphs cannot serve all training shards, or None."""
        ...

    def keys_of_graphs(self, seed: int) -> list[TaskKey]:
        """Return the keys of a first shard for each compiled graph of training: one where tasks have one size."""
        ...

    def with_algorithm(self, algorithm: Algorithm) -> Subject:
        """Return a copy that has ``algorithm`` and shares the compiled graphs.

        ``algorithm`` may differ from that of this learner in the number of inner steps alone, and only where no graph
        depends on that number.
        """
        ...

    def eager(self) -> Subject:
        """Return a copy that does not compile; everything else is equal, the device and the loaded data too."""
        ...

    def in_float64(self, algorithm: Algorithm) -> Subject:
        """Return a copy with a float64 model, ``algorithm`` and the default engine, on the same device and data."""
        ...


def initial_theta(subject: Subject, seed: int) -> Theta:
    """Return θ before meta-step 0 on the device of ``subject``."""
    theta = subject.initial(seed).theta(subject.slots)
    return {name: parameters.map(lambda t: t.to(subject.device)) for name, parameters in theta.items()}
