"""Tasks: a support set to adapt on and a query set to be judged by."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
import torch.utils._pytree as pytree
from torch import Tensor

from metadist.core.errors import ConfigError
from metadist.core.random import TaskKey

LossFunction = Callable[[Tensor, Tensor], Tensor]
"""(prediction [N, …], target [N, …]) → one value per example [N]."""


@dataclass(frozen=True)
class Examples:
    """x [N, …], y [N, …], and mask [N] (1 = real, 0 = padding; None = all real). Stacked tasks have a leading [T]."""

    x: Tensor
    y: Tensor
    mask: Tensor | None = None

    def mean(self, values: Tensor) -> Tensor:
        """The mean of per-example ``values`` [N] over the real examples."""
        if values.shape[:1] != self.y.shape[:1] or values.dim() != 1:
            raise ConfigError(
                f"a loss or metric must return one value per example, shape [{self.y.shape[0]}], got {list(values.shape)}; "
                "use reduction='none' and average over everything but the first dimension"
            )
        if self.mask is None:
            return values.mean()
        mask = self.mask.to(values.dtype)
        # A padded row's value may be anything, NaN included: select, don't multiply.
        return torch.where(self.mask.bool(), values, torch.zeros_like(values)).sum() / mask.sum()

    def cleared(self) -> Examples:
        """The padded rows as zeros, whatever they held: selecting among losses stops a NaN, but not its gradient."""
        if self.mask is None:
            return self
        real = self.mask.bool()

        def clear(t: Tensor) -> Tensor:
            return torch.where(real.view(*real.shape, *(1,) * (t.dim() - real.dim())), t, torch.zeros_like(t))

        return Examples(clear(self.x), clear(self.y), self.mask)


@dataclass(frozen=True)
class Task:
    """One task, or a shard of tasks stacked along a leading dimension [T]."""

    support: Examples
    query: Examples

    def to(self, device: torch.device, dtype: torch.dtype) -> Task:
        """On ``device``, with floating-point tensors as ``dtype``."""
        return pytree.tree_map(
            lambda t: t.to(device=device, dtype=dtype if t.is_floating_point() else t.dtype, non_blocking=True), self
        )


# ``None`` counts as a leaf in torch's pytrees, and vmap refuses it: an absent mask is left out.
pytree.register_pytree_node(
    Examples,
    lambda e: ([e.x, e.y] if e.mask is None else [e.x, e.y, e.mask], None),
    lambda values, _: Examples(*values),
    serialized_type_name="metadist.core.Examples",
)
pytree.register_pytree_node(
    Task,
    lambda t: ([t.support, t.query], None),
    lambda values, _: Task(*values),
    serialized_type_name="metadist.core.Task",
)


def _stack_examples(parts: Sequence[Examples]) -> Examples:
    rows = [p.x.shape[0] for p in parts]
    longest = max(rows)
    if min(rows) == longest and all(p.mask is None for p in parts):
        return Examples(torch.stack([p.x for p in parts]), torch.stack([p.y for p in parts]))

    def pad(t: Tensor) -> Tensor:
        return torch.cat([t, t.new_zeros(longest - t.shape[0], *t.shape[1:])]) if t.shape[0] < longest else t

    masks = [(p.mask if p.mask is not None else p.x.new_ones(p.x.shape[0])).bool() for p in parts]
    return Examples(
        torch.stack([pad(p.x) for p in parts]),
        torch.stack([pad(p.y) for p in parts]),
        torch.stack([pad(m) for m in masks]),
    )


def stack(tasks: Sequence[Task]) -> Task:
    """Tasks → one stacked task; shorter support or query sets are padded with zeros and masked."""
    return Task(_stack_examples([t.support for t in tasks]), _stack_examples([t.query for t in tasks]))


class TaskFamily:
    """A distribution over tasks. Subclass it and write ``sample_task`` (simple) or ``sample`` (a whole shard at once).

    Both must be pure functions of the key. ``loss`` and ``metric`` map (prediction [N, …], target [N, …]) to one value
    per example. A family is sent to workers without its data: load what is large in ``prepare``.
    """

    kind: ClassVar[str] = "regression"
    metric_name: str = "mse"
    #: smaller is better for errors, larger for accuracies
    higher_is_better: bool = False

    #: shape of one input, without the batch dimension; None where it is known only from the data
    input_shape: tuple[int, ...] | None = None
    #: number of model outputs in training and in evaluation (n_way, or the target's dimension)
    outputs: int = 1

    def prepare(self, device: torch.device) -> None:
        """Load the data onto ``device``. Called once in every process that samples."""

    def sample_task(self, key: TaskKey, split: str) -> Task:
        """One task; ``key`` is a single task's key."""
        raise NotImplementedError(f"{type(self).__name__} needs sample_task(key, split) or sample(keys, split)")

    def sample(self, keys: TaskKey, split: str) -> Task:
        """A shard of tasks, stacked; ``keys.tasks`` has shape [T]."""
        return stack([self.sample_task(key, split) for key in keys.each()])

    def loss(self, prediction: Tensor, target: Tensor) -> Tensor:
        return _squared_error(prediction, target)

    def metric(self, prediction: Tensor, target: Tensor) -> Tensor:
        return _squared_error(prediction, target)

    def protocol(self, split: str) -> dict[str, Any]:
        """What a score on ``split`` must be read with (ways, shots, queries, …)."""
        return {}

    def ways(self, split: str) -> int:
        """Classes of a classification task of ``split``; families that train with more ways than they are judged by override it."""
        return self.outputs

    def sizes(self, split: str) -> tuple[int, int] | None:
        """(support, query) rows of a task where all tasks are alike; None where they differ and are padded."""
        return None


def _squared_error(prediction: Tensor, target: Tensor) -> Tensor:
    """Per example [N], averaged over whatever dimensions a target has."""
    return (prediction - target).square().reshape(target.shape[0], -1).mean(1)


class Classification(TaskFamily):
    """n-way classification: integer targets [N] in [0, outputs)."""

    kind: ClassVar[str] = "classification"
    metric_name: str = "accuracy"
    higher_is_better: bool = True

    def loss(self, prediction: Tensor, target: Tensor) -> Tensor:
        return F.cross_entropy(prediction, target, reduction="none")

    def metric(self, prediction: Tensor, target: Tensor) -> Tensor:
        return (prediction.argmax(-1) == target).to(prediction.dtype)
