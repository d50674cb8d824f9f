"""The properties of a task family."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from metadist.core.differences import by_name, difference, flat, not_finite
from metadist.core.random import SPLITS, TaskKey, seeded
from metadist.core.task import Examples, Task, TaskFamily
from metadist.core.threads import one_thread
from metadist.core.tree import Tree, first, mapped, shown
from metadist.core.tree import shapes as shapes_of
from metadist.learners.purity import FROM_KEY, differs_by_shard, impurity, other_generators, rows_of
from metadist.testing import round_trips
from metadist.testing.failures import (
    ImpureError,
    InexactError,
    RoundTripError,
    RowError,
    SameTasksError,
    ShapeError,
    usable,
)
from metadist.workers import elsewhere

COUNT = 6


def sampled(family: TaskFamily, split: str, *, seed: int = 0, meta_step: int = 2, tasks: Sequence[int] = ()) -> Task:
    """Sample tasks ``tasks`` of ``split`` (the first few by default), padded rows cleared."""
    key = TaskKey.of(seed, split, meta_step, list(tasks or range(COUNT)))
    with usable(family, f"it can sample {split} tasks"):
        task = family.sample(key, split)
    if not isinstance(task, Task) or not all(isinstance(e, Examples) for e in (task.support, task.query)):
        raise ShapeError(family, "sample() returns a Task of Examples", f"it returns {type(task).__name__}", _RETURN)
    return Task(task.support.cleared(), task.query.cleared(), task.ways)


_RETURN = "return Task(Examples(x, y), Examples(x, y)), stacked along a first dimension of tasks"


def shapes(family: TaskFamily, split: str) -> None:
    """Check that x is [T, N, *input_shape], y [T, N, …], a mask [T, N], values are finite and classes in range."""
    task = sampled(family, split)
    for name, e in (("support", task.support), ("query", task.query)):
        with usable(family, "x and y are tensors, or dicts or tuples of them", _RETURN):
            tensors = flat({f"{name}.x": e.x, f"{name}.y": e.y} | ({} if e.mask is None else {f"{name}.mask": e.mask}))
        found = {tuple(t.shape[:2]) for t in tensors.values()}
        masked = e.mask is None or e.mask.dim() == 2
        if len(found) != 1 or next(iter(found))[:1] != (COUNT,) or len(next(iter(found))) != 2 or not masked:
            raise ShapeError(
                family,
                f"{COUNT} {split} tasks are stacked: x [{COUNT}, N, …], y [{COUNT}, N, …], mask [{COUNT}, N]",
                ", ".join(f"{n} is {list(t.shape)}" for n, t in tensors.items()),
                _RETURN,
            )
        _inputs(family, split, name, e)
        _targets(family, split, name, e)
    stated = family.sizes(split)
    rows = (first(task.support.x).shape[1], first(task.query.x).shape[1])
    if stated is not None and tuple(stated) != rows:
        values = f"sizes('{split}') is {tuple(stated)} and the tasks have {rows} rows"
        raise ShapeError(
            family, "sizes(split) states the rows of every task", values, "correct sizes(), or return None"
        )


def _inputs(family: TaskFamily, split: str, name: str, e: Examples) -> None:
    shape = family.input_shape
    tensors = flat({f"{name}.x": e.x, f"{name}.y": e.y})
    if shape is not None and shapes_of(e.x) != ((*first(e.x).shape[:2], *shape),):
        values = f"{name}.x of {split} tasks has examples of shape {shown(mapped(lambda t: t[0, 0], e.x))}"
        raise ShapeError(family, f"examples have its input_shape {list(shape)}", values, "correct input_shape")
    for part, tensor in tensors.items():
        if tensor.is_complex():
            raise ShapeError(family, "x is real or integer", f"{part} is {tensor.dtype}", "convert it in sample()")
    if bad := not_finite(tensors):
        raise ShapeError(
            family, "tasks are finite", f"{bad} of {split} tasks has NaN or Inf", "clean the data in prepare()"
        )
    if e.mask is not None and not bool(e.mask.any(1).all()):
        raise ShapeError(
            family, "every task has examples", f"{name} of a {split} task is all padding", "sample more rows"
        )


def _targets(family: TaskFamily, split: str, name: str, e: Examples) -> None:
    if family.kind == "classification":
        if not isinstance(e.y, Tensor):
            raise ShapeError(
                family, "targets are classes", f"{name}.y is {shown(e.y)}", "give one tensor, int64 [T, N]"
            )
        ways, real = family.ways(split), e.y if e.mask is None else e.y[e.mask.bool()]
        if e.y.dtype != torch.int64 or e.y.dim() != 2 or not bool(((real >= 0) & (real < ways)).all()):
            raise ShapeError(
                family,
                f"targets of {split} tasks are int64 [T, N] in [0, {ways})",
                f"{name}.y is {e.y.dtype} {list(e.y.shape)} from {real.min().item()} to {real.max().item()}",
                "number the classes of each task from 0, and state their number by outputs (or ways(split))",
            )
    elif not _is_own(family, e.y) and (math.prod(e.y.shape[2:]) != family.outputs or not e.y.is_floating_point()):
        raise ShapeError(
            family,
            f"targets of {split} tasks have {family.outputs} floating-point values (outputs) for each example",
            f"{name}.y is {e.y.dtype} {list(e.y.shape)}",
            "set outputs to the target's dimension, or kind to 'classification'",
        )


def _is_own(family: TaskFamily, y: Tree) -> bool:
    """Return whether the targets are for a loss of the family's own: several tensors, or whole numbers."""
    own = type(family).loss is not TaskFamily.loss
    return not isinstance(y, Tensor) or (own and not y.is_floating_point())


def disjoint(family: TaskFamily, split: str) -> None:
    """Check that no class of ``split`` is one of another split, where ``splits()`` names them."""
    with usable(family, "it can name the classes of its splits"):
        splits = family.splits() or {}
    for other, names in splits.items():
        if other != split and (shared := set(names) & set(splits.get(split, ()))):
            values = f"'{min(shared)}' and {len(shared) - 1} other names are in {split} and in {other}"
            raise SameTasksError(family, "splits() gives each class to one split", values, "correct splits()")


def pure(family: TaskFamily, split: str) -> None:
    """Check that the same key gives the same tasks under any state of the global random generators."""
    if differs := impurity(lambda: by_name(sampled(family, split))):
        raise ImpureError(family, f"the same key gives the same {split} tasks", differs, FROM_KEY)


def same_in_any_shard(family: TaskFamily, split: str) -> None:
    """Check that a task has the same bits alone and among others."""
    others = ([0], [4], [3, 4, 5], [5, 1])
    found = differs_by_shard(lambda some: sampled(family, split, tasks=some), sampled(family, split), others)
    if found is not None:
        raise InexactError(
            family,
            f"{split} task {found[0]} is the same in any shard",
            found[1],
            "compute every task from its own key; use no statistics of the batch, and float64 for sums",
        )


def distinct(family: TaskFamily, split: str) -> None:
    """Check that tasks differ by index and, where they are not listed, by seed and in training by meta-step."""
    whole = sampled(family, split)
    first = rows_of(whole, 0)
    if not any(difference(first, rows_of(whole, i)) for i in range(1, COUNT)):
        raise SameTasksError(family, "tasks differ by index", f"{split} tasks 0…{COUNT - 1} are all the same", FROM_KEY)
    if family.listed_tasks(split) is not None:
        return
    others = {"seed": sampled(family, split, seed=1)}
    if split == "train":
        others["meta-step"] = sampled(family, split, meta_step=3)
    for name, other in others.items():
        if not difference(by_name(whole), by_name(other)):
            values = f"{COUNT} {split} tasks are the same for another {name}"
            raise SameTasksError(family, f"tasks differ by {name}", values, FROM_KEY)


def judges_by_row(family: TaskFamily, split: str, predicted: Callable[[Tree], Tree] = lambda target: target) -> None:
    """Check that loss and metric give one finite value per example, from that example alone.

    ``predicted`` converts targets to right predictions, where these are no such tensors.
    """
    task = pytree.tree_map(lambda t: t[0], sampled(family, split))
    real = slice(None) if task.query.mask is None else task.query.mask.bool()
    target = mapped(lambda t: t[real].double() if t.is_floating_point() else t[real], task.query.y)
    rows = len(first(target))
    if rows < 2:
        target, rows = mapped(lambda t: t.repeat(3, *(1,) * (t.dim() - 1)), target), 3 * rows
    right, guess = _predictions(family, split, target, predicted)
    order = torch.arange(rows).roll(1)[:-1]
    for name, judge in (("loss", family.loss), ("metric", family.metric)):
        remedy = (
            f"write {name}(prediction [N, …], target [N, …]) with reduction='none', averaged over all but dimension 0"
        )
        with usable(family, f"its {name} can be computed, also under torch.func.vmap", remedy):
            values, some = judge(guess, target), judge(*(mapped(lambda t: t[order], tree) for tree in (guess, target)))
            together = torch.func.vmap(judge)(*(mapped(lambda t: t.unsqueeze(0), tree) for tree in (guess, target)))
        if tuple(values.shape) != (rows,) or tuple(together.shape) != (1, rows):
            found = f"for {rows} examples it has shape {list(values.shape)}"
            raise ShapeError(family, f"its {name} is one value per example", found, remedy)
        if not_finite({name: values}):
            raise ShapeError(family, f"its {name} is finite", f"it is {values.tolist()}", remedy)
        if some.shape != values[order].shape or not torch.allclose(some.double(), values[order].double(), rtol=1e-6):
            found = f"of the rows {order.tolist()} alone it is {some.tolist()}, and among all {values[order].tolist()}"
            raise RowError(family, f"the {name} of an example depends on that example alone", found, remedy)
    best, usual = (float(family.metric(p, target).double().mean()) for p in (right, guess))
    if (best < usual) if family.higher_is_better else (best > usual):
        raise RowError(
            family,
            f"with higher_is_better={family.higher_is_better} its metric prefers right predictions",
            f"it is {best:.6g} for right predictions and {usual:.6g} for random ones",
            "correct higher_is_better, or the metric",
        )


def _predictions(family: TaskFamily, split: str, target: Tree, predicted: Callable[[Tree], Tree]) -> tuple[Tree, Tree]:
    """Return right predictions and random ones, in float64."""
    generator = seeded(0, "predictions")
    if family.kind != "classification":
        right = predicted(target)
        return right, mapped(lambda t: torch.randn(t.shape, generator=generator, dtype=torch.float64), right)
    ways = family.ways(split)
    right = 20.0 * (target.unsqueeze(-1) == torch.arange(ways)).double()
    return right, torch.randn(*target.shape, ways, generator=generator, dtype=torch.float64)


def agrees_with_sample_task(family: TaskFamily, split: str) -> None:
    """Check that ``sample_task`` gives the tasks of ``sample``, where the family has both."""
    cls = type(family)
    if cls.sample_task is TaskFamily.sample_task or cls.sample is TaskFamily.sample:
        return
    key = TaskKey.of(0, split, 2, list(range(COUNT)))
    with usable(family, "sample_task() gives one task"):
        alone = family.sample_task(key.each()[4], split)
    if differs := difference(rows_of(sampled(family, split), 4), rows_of(pytree.tree_map(lambda t: t[None], alone), 0)):
        raise InexactError(family, "sample_task() and sample() give the same tasks", differs, "share their code")


#: name → property of (family, split), each a function that raises a PropertyError
TASK_PROPERTIES: dict[str, Callable[..., None]] = {
    "shapes": shapes,
    "disjoint": disjoint,
    "pure": pure,
    "same_in_any_shard": same_in_any_shard,
    "distinct": distinct,
    "judges_by_row": judges_by_row,
    "agrees_with_sample_task": agrees_with_sample_task,
}


def travels(family: TaskFamily, *, another_process: bool) -> None:
    """Check that config and pickling give the same family, and that another process samples the same tasks."""
    round_trips.config(family)
    there = round_trips.pickled(family, family)
    there.prepare(torch.device("cpu"))
    protocols = {split: family.protocol(split) for split in SPLITS}
    with usable(family, "its protocol(split) is written to JSON", "return a dict of numbers, texts and lists"):
        json.dumps(protocols)
    for split in SPLITS:
        with other_generators(3):
            differs = difference(by_name(sampled(family, split)), by_name(sampled(there, split)))
        if differs:
            raise RoundTripError(family, f"a pickled copy samples the same {split} tasks", differs, FROM_KEY)
    if not another_process:
        return
    here = hashes(family)
    with usable(
        family, "another process can sample its tasks", "make its module importable there, and its data loadable"
    ):
        found = elsewhere.call(hashes, family)
    for name, digest in here.items():
        if found[name] != digest:
            values = f"{name} has the SHA-256 {digest[:12]}… here and {found[name][:12]}… there"
            raise ImpureError(family, "another process samples the same tasks", values, FROM_KEY)


def hashes(family: TaskFamily) -> dict[str, str]:
    """Return the SHA-256 of every tensor of the first tasks, by split and name."""
    family.prepare(torch.device("cpu"))
    return {
        f"{split} {name}": hashlib.sha256(tensor.contiguous().numpy().tobytes()).hexdigest()
        for split in SPLITS
        for name, tensor in by_name(sampled(family, split)).items()
    }


@one_thread()
def check_tasks(
    family: TaskFamily,
    *,
    splits: Sequence[str] = SPLITS,
    another_process: bool = True,
    predicted: Callable[[Tree], Tree] = lambda target: target,
) -> None:
    """Check a task family: pure in the key, exact across shards, distinct tasks, shapes, loss and metric, round trips.

    Raises a PropertyError that names the property, the values and the remedy. ``predicted`` converts targets [N, …] to
    right predictions where the loss takes others, such as (mean, log-variance). ``another_process=False`` saves the
    seconds that a new Python process takes; only that process shows values that depend on ``hash()`` or on the
    process itself.
    """
    with usable(family, "it can load its data"):
        family.prepare(torch.device("cpu"))
    for split in splits:
        for name, property in TASK_PROPERTIES.items():
            property(family, split, *([predicted] if name == "judges_by_row" else []))
    travels(family, another_process=another_process)
