"""What an algorithm is: how it adapts, how it predicts, and what it contributes to the outer update."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields, is_dataclass, replace
from typing import Any, ClassVar, Union

from torch import Tensor

from metadist.core.model import BoundModel, Model
from metadist.core.parameters import Parameters
from metadist.core.random import TaskKey
from metadist.core.state import Slot
from metadist.core.task import Examples, Task, TaskFamily

Theta = Mapping[str, Parameters]
"""θ by slot. ``theta["model"]`` holds the learned parameters of the model; algorithms may declare more slots."""


@dataclass(frozen=True)
class TaskContext:
    """What an algorithm may know besides θ and the support set. ``meta_step`` is a 0-d tensor in compiled shards."""

    key: TaskKey
    meta_step: Union[int, Tensor]
    training: bool
    family: TaskFamily

    def loss(self, prediction: Tensor, examples: Examples) -> Tensor:
        """The family's loss, averaged over the real examples: a scalar."""
        return examples.mean(self.family.loss(prediction, examples.y))

    def metric(self, prediction: Tensor, examples: Examples) -> Tensor:
        return examples.mean(self.family.metric(prediction, examples.y))


class Algorithm:
    """Subclass as a frozen dataclass (its fields are its config) and write ``adapt`` and ``predict``, for one task.

    Everything here runs under ``torch.func.vmap`` over the tasks of a shard: no data-dependent Python branches.
    An algorithm that defines ``delta`` contributes the result of ``delta`` (Reptile: θ − φ); any other contributes the
    gradient of ``objective`` with respect to every slot whose rule is ``gradient``.
    """

    #: the number of inner steps; 0 for algorithms without an inner loop
    inner_steps: int = 0
    #: whether ``objective`` needs φ_0 … φ_{k-1} too (their cotangents are then kept in memory)
    whole_trajectory: ClassVar[bool] = False

    def slots(self, model: Model, parameters: Parameters) -> dict[str, tuple[Slot, Parameters]]:
        """Slots beyond ``model``: name → (slot, initial values)."""
        return {}

    def outputs(self, family: TaskFamily) -> int | None:
        """What the model must put out: this many values, or None for an embedding."""
        return family.outputs

    def compatible(self, family: TaskFamily, model: Model) -> str | None:
        """Why this algorithm can't learn these tasks with this model, or None."""
        return None if model.has_forward else "the model has no forward(x)"

    def adapt(self, model: BoundModel, theta: Theta, support: Examples, context: TaskContext) -> Sequence[Any]:
        """φ_0 … φ_k, each a pytree that ``predict`` understands; φ_0 is before adaptation where that has a meaning."""
        raise NotImplementedError

    def predict(self, model: BoundModel, phi: Any, x: Tensor) -> Tensor:
        raise NotImplementedError

    def objective(
        self, model: BoundModel, theta: Theta, trajectory: Sequence[Any], task: Task, context: TaskContext
    ) -> tuple[Tensor, Tensor]:
        """(scalar meta-loss, prediction on the query set): by default the loss on the query set at φ_k.

        ``trajectory`` is φ_0 … φ_k; whoever looks at more of it than its end says so by ``whole_trajectory``.
        """
        prediction = self.predict(model, trajectory[-1], task.query.x)
        return context.loss(prediction, task.query), prediction

    def delta(self, theta: Theta, phi: Any) -> Mapping[str, Parameters]:
        """Return the contribution by slot from θ and the adapted φ; its weighted mean replaces the gradient."""
        raise NotImplementedError

    @property
    def contributes_delta(self) -> bool:
        """Whether the algorithm defines ``delta``."""
        return type(self).delta is not Algorithm.delta


def with_inner_steps(algorithm: Algorithm, inner_steps: int | None) -> Algorithm:
    """The same algorithm with another number of inner steps, where it has inner steps at all."""
    if inner_steps is None or not is_dataclass(algorithm) or "inner_steps" not in {f.name for f in fields(algorithm)}:
        return algorithm
    return replace(algorithm, inner_steps=inner_steps)


def at_most_one_step(algorithm: Algorithm) -> Algorithm:
    return with_inner_steps(algorithm, min(1, algorithm.inner_steps))
