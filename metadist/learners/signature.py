"""Describe and check a learner's own tasks: the signature of its model, and labels and shapes in the dry run."""

from __future__ import annotations

import json
import logging

import torch
import torch.utils._pytree as pytree
from torch import Tensor

from metadist.core.algorithm import TaskContext, at_most_one_step
from metadist.core.differences import flat
from metadist.core.errors import ConfigError, first_line
from metadist.core.random import TaskKey
from metadist.core.signature import InvalidInput, Signature, refuse_classes
from metadist.core.task import Examples, Task, possible
from metadist.core.tree import at, named, shown
from metadist.engine.subject import Subject, initial_theta
from metadist.learners.culprit import own_tasks

log = logging.getLogger(__name__)


def describe(learner: Subject, seed: int) -> Signature:
    """Return the signature of sampled tasks: two shards of training and one of validation."""
    size = learner.outer.shard_size
    drawn = (("train", 0), ("train", size), ("validation", 0))
    tasks = []
    for split, start in drawn:
        with own_tasks(learner, split):
            tasks.append(learner.sample(TaskKey.of(seed, split, 0, range(start, start + size))))
    classes = _ways(learner, "test") if learner.tasks.kind == "classification" else None
    found = Signature.of_tasks(tasks, classes, learner.algorithm.any_ways)
    return found if classes is not None else _with_prediction(learner, found, tasks[-1], seed)


def _with_prediction(learner: Subject, signature: Signature, tasks: Task, seed: int) -> Signature:
    """Return ``signature`` with the shapes of a prediction, where it is unlike its targets."""
    task, theta = pytree.tree_map(lambda t: t[0], tasks), initial_theta(learner, seed)
    key = TaskKey.of(seed, "validation", 0, [0]).each()[0].to(learner.device)
    with torch.no_grad():
        model, context = learner.bind(theta, None, False), TaskContext(key, 0, False, learner.tasks)
        phi = at_most_one_step(learner.algorithm).adapt(model, theta, task.support, context)[-1]
        return signature.predicting(learner.algorithm.predict(model, phi, task.query.x), task.query.y)


def describe_earlier(learner: Subject, seed: int) -> Signature:
    """Return the signature for a run of a version that did not record it.

    The family's statements suffice for classification. Otherwise tasks are sampled; where that fails, because the data
    is not here, the statements must do.
    """
    family = learner.tasks
    declared = Signature.declared(family, learner.model.dtype, learner.algorithm.any_ways)
    if family.kind == "classification" and family.input_shape is not None:
        return declared
    try:
        return describe(learner, seed)
    except Exception as error:  # the family's own code
        log.info("the shapes of the run's tasks are those that '%s' states: %s", type(family).__name__, error)
        return declared


def check_tasks(learner: Subject, tasks: Task, split: str) -> None:
    """Check stacked ``tasks`` of ``split``: one target for each input, of one shape, and classes in range.

    Raises ConfigError that names the family. A target of another shape broadcasts, and a loss learns from that.
    """
    family = learner.tasks
    name = f"tasks: '{type(family).__name__}'"
    _check_protocol(learner, split)
    trees = {}
    for part, e in (("support", tasks.support), ("query", tasks.query)):
        x, y = named(e.x, f"{name}: x"), named(e.y, f"{name}: y")
        lengths = [tuple(t.shape[:2]) for t in (*x.values(), *y.values(), e.mask) if t is not None]
        if len(set(lengths)) > 1 or len(lengths[0]) < 2 or not lengths[0][1]:
            one_task = (at(tree, 0) if lengths[0] else tree for tree in (e.x, e.y))
            shapes = " and ".join(f"{n} {shown(tree)}" for n, tree in zip("xy", one_task))
            raise ConfigError(
                f"{name}: the {part} set of {split} tasks has {shapes}; expected x [N, …] and y [N, …] with the same "
                "N ≥ 1"
            )
        trees[part] = {n: tuple(t.shape[2:]) for n, t in y.items()}
    if trees["support"] != trees["query"]:
        support, query = (shown(at(e.y, 0)) for e in (tasks.support, tasks.query))
        raise ConfigError(
            f"{name}: targets of {split} tasks are {support} in the support set and {query} in the query set; give "
            "both one shape (y.unsqueeze(-1), or y.squeeze(-1))"
        )
    if family.kind == "classification":
        for part, e in (("support", tasks.support), ("query", tasks.query)):
            _check_classes(f"{name}: the {part} set of {split} tasks", e, _ways(learner, split))
        if tasks.ways is not None:
            _check_own_ways(f"{name}: {split} task", tasks, tasks.ways, _ways(learner, split))


def _check_protocol(learner: Subject, split: str) -> None:
    """Refuse a protocol that no report can hold: the first one would be written at the first validation."""
    with own_tasks(learner, split):
        learner.tasks.sizes(split)
        stated = learner.tasks.protocol(split)
        try:
            json.dumps(stated)
        except (TypeError, ValueError) as error:
            raise ConfigError(
                f"tasks: protocol('{split}') of '{type(learner.tasks).__name__}' is no plain data for a report "
                f"({first_line(error)}); expected a dict of numbers, text and lists"
            ) from error


def _ways(learner: Subject, split: str) -> int:
    with own_tasks(learner, split):
        return learner.tasks.ways(split)


def _check_classes(where: str, examples: Examples, ways: int) -> None:
    y = examples.y
    if not isinstance(y, Tensor):
        raise ConfigError(f"{where} has targets {shown(at(y, 0))}; expected one tensor of classes, int64 [N]")
    if y.dim() != 2 or y.is_floating_point() or y.is_complex() or y.dtype == torch.bool:
        dtype = "floating-point" if y.is_floating_point() else str(y.dtype).removeprefix("torch.")
        raise ConfigError(
            f"{where} has targets {dtype} {list(y.shape[1:])}; expected classes as whole numbers, int64 [N] from 0 to "
            f"{ways - 1} (y.long()), or another kind than 'classification'"
        )
    real = y if examples.mask is None else y[examples.mask.bool()]
    try:
        refuse_classes(real, ways)
    except InvalidInput as error:
        raise ConfigError(f"{where}: {error}; outputs of the family, or ways(split), states their number") from None


def _check_own_ways(where: str, tasks: Task, own: Tensor, ways: int) -> None:
    """Refuse a number of classes that no task can have, and labels that a task lacks: the loss would be infinite."""
    alone = own.shape == tasks.query.y.shape[:1] and not own.is_floating_point()
    if not alone or bool(((own < 1) | (own > ways)).any()):
        raise ConfigError(
            f"{where}s have ways {str(own.tolist())[:80]}; expected one int64 number from 1 to {ways} for each"
        )
    for part, e in (("support", tasks.support), ("query", tasks.query)):
        most = (e.y if e.mask is None else e.y.masked_fill(~e.mask.bool(), 0)).amax(1)
        for index in (most >= own).nonzero().flatten().tolist()[:1]:
            raise ConfigError(
                f"{where} {index} has class {int(most[index])} in the {part} set, and {int(own[index])} ways; number "
                f"its classes from 0 to {int(own[index]) - 1}, or give it more ways"
            )


def _reads_absent_classes(learner: Subject, task: Task) -> bool:
    """Return whether the loss of uniform logits over the task's own classes is not finite."""
    if task.ways is None:
        return False
    rows, ways = len(task.query.y), learner.tasks.ways("train") + 1
    uniform = possible(torch.zeros(rows, ways, dtype=learner.model.dtype, device=learner.device), task.ways)
    return not bool(torch.isfinite(learner.tasks.loss(uniform, task.query.y)).all())


def check_loss(learner: Subject, task: Task, split: str, loss: Tensor) -> None:
    """Refuse a ``task`` whose ``loss`` is not finite because of its own values, or of classes that it does not have.

    Not where tasks with NaN or Inf are to be left out.
    """
    if bool(torch.isfinite(loss)):
        return
    if _reads_absent_classes(learner, task):
        raise ConfigError(
            f"tasks: the loss of '{type(learner.tasks).__name__}' is not finite where the logits of classes that a "
            "task does not have are −∞; read the logit of the target and the softmax alone, as cross-entropy does"
        )
    if learner.non_finite == "skip":
        return
    parts = {
        f"{part}.{name}": t
        for part, e in (("support", task.support), ("query", task.query))
        for name, t in flat({"x": e.x, "y": e.y}).items()
    }
    bad = [name for name, t in parts.items() if not bool(torch.isfinite(t).all())]
    if bad:
        raise ConfigError(
            f"tasks: '{type(learner.tasks).__name__}' has NaN or Inf in {', '.join(bad)} of {split} tasks, and the "
            "loss is then not finite; clean the data, or leave such tasks out with engine.non_finite: skip"
        )
