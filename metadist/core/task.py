"""Tasks: a support set for adaptation, and a query set for the loss after it; and distributions over tasks."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, Protocol, Union, cast

import torch
import torch.nn.functional as F
import torch.utils._pytree as pytree
from torch import Tensor

from metadist.core.errors import ConfigError
from metadist.core.random import TaskKey
from metadist.core.tree import Tree, first, mapped, shown, stacked

LossFunction = Callable[[Tree, Tree], Tensor]
"""(prediction [N, …], target [N, …]) → one value per example [N]."""
TaskMetricFunction = Callable[[Tree, Tree, Tensor], Union[Tensor, float]]
"""(prediction [N, …], target [N, …], mask [N]: the real rows) → one number per task."""


@dataclass(frozen=True)
class Examples:
    """x [N, …], y [N, …], and mask [N] (1 = real, 0 = padding; None = all real). Stacked tasks have a leading [T].

    x and y are tensors, or dicts or tuples of tensors, each [N, …]. The model is called with the entries of a dict x by
    name, and with those of a tuple one after the other.
    """

    x: Tree
    y: Tree
    mask: Tensor | None = None

    @property
    def rows(self) -> int:
        """The number N of examples, padding included. Not for stacked tasks."""
        return len(first(self.y))

    def mean(self, values: Tensor) -> Tensor:
        """Return the mean of per-example ``values`` [N] over the real examples.

        Raises ConfigError for another shape: a loss or metric that averages over examples itself.
        """
        if tuple(values.shape) != (self.rows,):
            raise ConfigError(
                f"a loss or metric must return one value per example, shape [{self.rows}], "
                f"got {list(values.shape)}; use reduction='none' and average over everything but the first dimension"
            )
        if not values.is_floating_point():  # a metric that says right or wrong, or counts
            values = values.to(torch.get_default_dtype())
        if self.mask is None:
            return values.mean()
        mask = self.mask.to(values.dtype)
        # The value of a padded row can be NaN: select, do not multiply.
        return torch.where(self.mask.bool(), values, torch.zeros_like(values)).sum() / mask.sum()

    def real(self, rows: Tree) -> Tree:
        """Return those of ``rows`` [N, …] that are real examples. Not under ``vmap`` where there is a mask."""
        if self.mask is None:
            return rows
        real = self.mask.bool()
        return mapped(lambda t: t[real], rows)

    def cleared(self) -> Examples:
        """Return the examples with zeros in padded rows: ``mean`` drops a NaN of such a row, but not its gradient."""
        if self.mask is None:
            return self
        real = self.mask.bool()

        def clear(t: Tensor) -> Tensor:
            return torch.where(real.view(*real.shape, *(1,) * (t.dim() - real.dim())), t, torch.zeros_like(t))

        return Examples(mapped(clear, self.x), mapped(clear, self.y), self.mask)


@dataclass(frozen=True)
class Task:
    """One task, or a shard of tasks stacked along a leading dimension [T].

    ``ways`` is the number of classes 0, 1, … of a task (int64, 0-d; stacked [T]) where tasks of one family differ in
    it; None where all have as many as the family states. Logits of further classes count as −∞ (``possible``).
    """

    support: Examples
    query: Examples
    ways: Tensor | None = None

    def to(self, device: torch.device, dtype: torch.dtype) -> Task:
        """Return the task on ``device``, with floating-point tensors as ``dtype``."""

        def moved(t: Tensor) -> Tensor:
            return t.to(device=device, dtype=dtype if t.is_floating_point() else t.dtype, non_blocking=True)

        return cast(Task, pytree.tree_map(moved, self))


# ``None`` is a leaf in torch's pytrees, and vmap refuses it: an absent mask is not part of the tree.
pytree.register_pytree_node(
    Examples,
    lambda e: ([e.x, e.y] if e.mask is None else [e.x, e.y, e.mask], None),
    lambda values, _: Examples(*values),
    serialized_type_name="metadist.core.Examples",
)
pytree.register_pytree_node(
    Task,
    lambda t: ([t.support, t.query] if t.ways is None else [t.support, t.query, t.ways], None),
    lambda values, _: Task(*values),
    serialized_type_name="metadist.core.Task",
)


def _stack_examples(parts: Sequence[Examples]) -> Examples:
    rows = [p.rows for p in parts]
    longest = max(rows)
    if min(rows) == longest and all(p.mask is None for p in parts):
        return Examples(stacked([p.x for p in parts]), stacked([p.y for p in parts]))

    def pad(t: Tensor) -> Tensor:
        return torch.cat([t, t.new_zeros(longest - t.shape[0], *t.shape[1:])]) if t.shape[0] < longest else t

    masks = [(p.mask if p.mask is not None else first(p.y).new_ones(p.rows)).bool() for p in parts]
    return Examples(
        stacked([mapped(pad, p.x) for p in parts]),
        stacked([mapped(pad, p.y) for p in parts]),
        torch.stack([pad(m) for m in masks]),
    )


def stack(tasks: Sequence[Task]) -> Task:
    """Return ``tasks`` as one stacked task; shorter support or query sets are padded with zeros and masked."""
    ways = [t.ways for t in tasks if t.ways is not None]
    return Task(
        _stack_examples([t.support for t in tasks]),
        _stack_examples([t.query for t in tasks]),
        torch.stack(ways) if ways else None,
    )


def alone(tasks: Task, index: int) -> Task:
    """Return one task of a stack, without its padded rows."""
    task = cast(Task, pytree.tree_map(lambda t: t[index], tasks))
    support, query = (Examples(e.real(e.x), e.real(e.y)) for e in (task.support, task.query))
    return Task(support, query, task.ways)


def with_rows(tasks: Task, support: int, query: int) -> Task:
    """Pad stacked tasks with masked zeros to so many support and query rows. Both sets then have a mask."""

    def padded(e: Examples, rows: int) -> Examples:
        def pad(t: Tensor) -> Tensor:
            missing = rows - t.shape[1]
            return torch.cat([t, t.new_zeros(len(t), missing, *t.shape[2:])], 1) if missing else t

        y = first(e.y)
        mask = torch.ones(y.shape[:2], dtype=torch.bool, device=y.device) if e.mask is None else e.mask.bool()
        return Examples(mapped(pad, e.x), mapped(pad, e.y), pad(mask))

    return Task(padded(tasks.support, support), padded(tasks.query, query), tasks.ways)


def possible(prediction: Tensor, ways: Tensor | int | None) -> Tensor:
    """Return logits […, classes] with −∞ for the classes from ``ways`` on, which the task does not have.

    No loss, metric or gradient then depends on these logits. None: the task has all classes.
    """
    if ways is None or (isinstance(ways, int) and ways >= prediction.shape[-1]):
        return prediction
    return prediction.masked_fill(torch.arange(prediction.shape[-1], device=prediction.device) >= ways, -torch.inf)


class ImageFormat(Protocol):
    """The conversion of an encoded image to the input of a model: [channels, size, size], inverted or not."""

    @property
    def size(self) -> int: ...
    @property
    def channels(self) -> int: ...
    @property
    def invert(self) -> bool: ...
    @property
    def white(self) -> float | None: ...


class TaskFamily:
    """A distribution over tasks. Subclass it and write ``sample_task``, or ``sample`` for a whole shard in one call.

    Both must be pure functions of the key. ``loss`` and ``metric`` map (prediction [N, …], target [N, …]) to one value
    per example; they decide which predictions fit the targets: mean and variance, quantiles, sequences, maps. The
    metric sees the real rows of one task; where tasks are padded, the loss must compute each example from that example
    alone. Workers receive a family without its data: load large data in ``prepare``.
    """

    #: ``regression`` or ``classification``
    kind: ClassVar[str] = "regression"
    metric_name: str = "mse"
    #: smaller is better for errors, larger for accuracies
    higher_is_better: bool = False
    #: further metrics, of whole tasks: names (``core/task_metrics.py: BUILT_IN``), or functions (prediction, target,
    #: mask) → one number per task
    task_metrics: Sequence[Union[str, TaskMetricFunction]] = ()

    #: shape of one input, without the batch dimension; None where only the data tells it, and for dicts and tuples
    input_shape: tuple[int, ...] | None = None
    #: number of model outputs in training and in evaluation (n_way, or the target's dimension)
    outputs: int = 1
    if TYPE_CHECKING:
        # Attributes at run time. Type checkers allow subclasses to override them by a property only if they are one.
        @property
        def data_sha256(self) -> str | None:
            """SHA-256 of the data, which every worker and a resumed run must share; None for families without data."""
            raise NotImplementedError

        @property
        def decode(self) -> ImageFormat | None:
            """The conversion of images to inputs, for a server; None where inputs are not images."""
            raise NotImplementedError

        @property
        def columns(self) -> str | None:
            """The conversion of a table's columns to inputs and targets as JSON; None where inputs are no rows."""
            raise NotImplementedError
    else:
        data_sha256 = None
        decode = None
        columns = None
    #: ``skip`` where shards may leave out failed tasks; None for families whose tasks cannot fail
    on_error: str | None = None

    def prepare(self, device: torch.device) -> None:
        """Load the data onto ``device``. Every process that samples calls this method once."""

    def sample_task(self, key: TaskKey, split: str) -> Task:
        """Return one task of ``split``; ``key`` is the key of a single task."""
        raise NotImplementedError(f"{type(self).__name__} needs sample_task(key, split) or sample(keys, split)")

    def sample(self, keys: TaskKey, split: str) -> Task:
        """Return the stacked tasks of a shard; ``keys.tasks`` has shape [T]."""
        return stack([self.sample_task(key, split) for key in keys.each()])

    def loss(self, prediction: Tree, target: Tree) -> Tensor:
        """Return the loss of each example [N]; by default, the squared error."""
        return _squared_error("loss", prediction, target)

    def metric(self, prediction: Tree, target: Tree) -> Tensor:
        """Return the metric ``metric_name`` of each example [N]; by default, the squared error."""
        return _squared_error("metric", prediction, target)

    def splits(self) -> Mapping[str, Sequence[str]] | None:
        """Return the names of the classes (or other sources of tasks) of each split; None where there are none.

        No name may be in two splits: a run is refused otherwise. Every run keeps them as ``splits.json``.
        """
        return None

    def data_notes(self) -> Sequence[str]:
        """Return what the user should know about the data, such as files that are passed over, a line for each."""
        return ()

    def task_classes(self, key: TaskKey, split: str) -> Sequence[str] | None:
        """Return the names of the classes 0, 1, … of the task of ``key``, for pictures; None where they have none."""
        return None

    def exported(self) -> dict[str, Any]:
        """Return options that replace the data in the config of an exported model, so that serving needs no data."""
        return {}

    def protocol(self, split: str) -> dict[str, object]:
        """Return the conditions of a score on ``split`` (ways, shots, queries, …), as plain values for a report."""
        return {}

    def listed_tasks(self, split: str) -> int | None:
        """Return the number of tasks of ``split`` where they are a list, or None where tasks are drawn.

        An evaluation takes each task of a list once: ``key.tasks`` is then the place in the list, from 0 on. In
        training, ``key.tasks`` is the place in the meta-batch in any case.
        """
        return None

    def sources(self, key: TaskKey, split: str) -> int | tuple[int, ...] | None:
        """Return the number of the field, person, class, … that the task of ``key`` is drawn from; several as a tuple.

        Where an evaluation draws more tasks than there are sources, its confidence interval is one over sources. None
        where every task is a draw of its own.
        """
        return None

    def ways(self, split: str) -> int:
        """Return the number of classes of a task of ``split``; override it where training tasks have more classes.

        Where tasks have their own ``Task.ways``, the largest one.
        """
        return self.outputs

    def sizes(self, split: str) -> tuple[int, int] | None:
        """Return the (support, query) rows of a task, or None where tasks differ in size."""
        return None

    def group_size(self, split: str) -> int | None:
        """Return how many consecutive tasks share one size, where sizes are drawn (``key.group``); else None.

        Tasks with one index div ``group_size`` must have one number of rows and one ``Task.ways``. They are sampled and
        computed together, without padding; a compiled shard pads them to one of a few sizes.
        """
        return None

    def possible_sizes(self, split: str) -> Sequence[tuple[int, int]]:
        """Return every (support, query) number of rows that a task can have, one for each equally likely draw.

        The sizes of compiled graphs are chosen from them. Empty where they are unknown.
        """
        stated = self.sizes(split)
        return () if stated is None else (stated,)


class UnlikeTargets(ConfigError):
    """The prediction has another shape than the targets, for a ``judge`` that needs the same one."""

    def __init__(self, judge: str, prediction: Tree, target: Tree) -> None:
        super().__init__(
            f"the prediction has shape {shown(prediction)} and the target {shown(target)}; {judge} needs a tensor of "
            "the target's shape: select it by model.output, reshape it in forward (squeeze(-1)), or write a loss and a "
            "metric for the family"
        )

    def __reduce__(self) -> tuple[type[ConfigError], tuple[str]]:
        return (ConfigError, (str(self),))


def like_target(judge: str, prediction: Tree, target: Tree) -> tuple[Tensor, Tensor]:
    """Return both where they are tensors of one shape. Raises ``UnlikeTargets``: other shapes would broadcast."""
    if not (isinstance(prediction, Tensor) and isinstance(target, Tensor)) or prediction.shape != target.shape:
        raise UnlikeTargets(judge, prediction, target)
    return prediction, target


def _squared_error(name: str, prediction: Tree, target: Tree) -> Tensor:
    """Return the squared error of each example [N], averaged over the dimensions of its target."""
    p, y = like_target(f"the squared error ({name})", prediction, target)
    return (p - y).square().reshape(y.shape[0], -1).mean(1)


class Classification(TaskFamily):
    """n-way classification: integer targets [N] in [0, outputs), cross-entropy and accuracy."""

    kind: ClassVar[str] = "classification"
    metric_name: str = "accuracy"
    higher_is_better: bool = True

    def loss(self, prediction: Tensor, target: Tensor) -> Tensor:
        return F.cross_entropy(prediction, target, reduction="none")

    def metric(self, prediction: Tensor, target: Tensor) -> Tensor:
        return (prediction.argmax(-1) == target).to(prediction.dtype)
