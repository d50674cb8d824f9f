"""Metrics of single examples, averaged over the real rows of a task, and metrics of whole tasks (balanced accuracy, …).

A metric of whole tasks is a function of (prediction [N, …], target [N, …], mask [N]), where the rows outside the mask
are padding. The built-in ones run under ``torch.func.vmap`` and compute in float64.
"""

from __future__ import annotations

import traceback
from collections.abc import Iterator
from dataclasses import dataclass
from typing import ClassVar, cast

import torch
from torch import Tensor
from torch.func import vmap

from metadist.core.errors import ConfigError, first_line, nearest
from metadist.core.task import Examples, LossFunction, TaskFamily, TaskMetricFunction, UnlikeTargets
from metadist.core.tree import Tree, at, first, mapped, shown

#: bins of equal width in the calibration error
CALIBRATION_BINS = 15


def metric_of_tasks(family: TaskFamily, prediction: Tree, query: Examples) -> Tensor:
    """Return the family's metric of every task [T], averaged over the real rows. Padded rows never reach the metric.

    ``prediction`` is [T, N, …], and ``query`` holds the stacked query sets. ConfigError where tasks are padded and the
    family's loss of a real row depends on padded rows.
    """
    if query.mask is None:
        metrics: Tensor = vmap(lambda p, e: e.mean(family.metric(p, e.y)))(prediction, query)
        return metrics
    _refuse_loss_over_padding(family, prediction, query)
    return torch.stack([real.mean(family.metric(p, real.y)) for p, real in _real_rows(prediction, query)])


def mixed_rows(judge: LossFunction, prediction: Tree, target: Tree) -> tuple[float, float] | None:
    """Judge the last row among all rows and alone: return both values where they differ, or None.

    They differ where rows of unlike shapes broadcast against each other: predictions [N, 1] and targets [N].
    """
    last = slice(-1, None)
    among, alone = judge(prediction, target)[-1], judge(*(mapped(lambda t: t[last], t) for t in (prediction, target)))
    if torch.allclose(among.double(), alone.double(), rtol=1e-4, atol=1e-6, equal_nan=True):
        return None
    return float(among), float(alone.flatten()[-1])


def _real_rows(prediction: Tree, query: Examples) -> Iterator[tuple[Tree, Examples]]:
    """Yield the prediction and the query set of every task, without the padded rows."""
    for task in range(len(first(query.y))):
        every = _one_of(query, task)
        yield every.real(at(prediction, task)), Examples(every.real(every.x), every.real(every.y))


def _one_of(query: Examples, task: int) -> Examples:
    return Examples(at(query.x, task), at(query.y, task), None if query.mask is None else query.mask[task])


def _refuse_loss_over_padding(family: TaskFamily, prediction: Tree, query: Examples) -> None:
    """Compare the loss of the real rows alone and among padded rows, on the task with the most padding."""
    assert query.mask is not None
    task = int(query.mask.sum(1).argmin())
    p, every = at(prediction, task), _one_of(query, task)
    among, alone = every.real(family.loss(p, every.y)), family.loss(every.real(p), every.real(every.y))
    if among.shape != alone.shape or not torch.allclose(among, alone, rtol=1e-4, atol=1e-6, equal_nan=True):
        raise ConfigError(
            f"loss: the loss of '{type(family).__name__}' changes where a task is padded to the size of another "
            f"(mean over {len(alone)} real rows: {float(alone.mean()):.6g}, among {every.rows - len(alone)} padded "
            f"rows: {float(among.mean()):.6g}); compute the loss of an example from that example alone, or sample "
            "tasks of one size"
        )


# Metrics of whole tasks -----------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class TaskMetric:
    """A metric of whole tasks, by name. A ``table`` is summed over tasks; other metrics are scalars.

    ``kind`` is the kind of tasks that it is for (None: any). A ``built_in`` function runs under ``vmap``; others are
    called task by task, with the real rows alone.
    """

    #: names that other columns of an evaluation have
    reserved: ClassVar[tuple[str, ...]] = ("loss", "task", "source", "ways")

    name: str
    function: TaskMetricFunction
    kind: str | None = None
    table: bool = False
    built_in: bool = False

    def of_tasks(self, prediction: Tree, query: Examples, ways: Tensor | None = None) -> Tensor:
        """Return the metric of predictions [T, S, N, …] (S: adaptation steps): float64 [T, S], or [T, S, …] of tables.

        ``ways`` [T] is the number of classes of each task where tasks differ in it; a function of the user's own gets
        the logits of these classes. A scalar is NaN where a prediction for a real row is not finite. Raises ConfigError
        where targets are no classes, and where the function fails or returns no number.
        """
        targets = first(query.y)
        mask = torch.ones(targets.shape[:2], device=targets.device) if query.mask is None else query.mask
        if not self.built_in:
            counts = [None] * len(first(prediction)) if ways is None else ways.tolist()
            each = zip(self._each(prediction, query), counts)
            return torch.stack([self._by_step(_logits(p, count), real) for (p, real), count in each])
        if not isinstance(prediction, Tensor) or not isinstance(query.y, Tensor):
            raise ConfigError(
                f"task_metrics: '{self.name}' judges one tensor, and the model predicts {shown(prediction)} for "
                f"targets {shown(query.y)}; select a part by model.output, or write a metric of your own"
            )
        if self.kind == "regression" and prediction.shape[2:] != query.y.shape[1:]:
            raise UnlikeTargets(f"the metric '{self.name}'", prediction[0, 0], query.y[0])
        if self.kind == "classification":
            self._check_classes(query.y[mask.bool()], prediction.shape[-1])
        # Zero times NaN is NaN: a padded row must be cleared, not only masked.
        real = mask.bool().view(len(mask), 1, -1, *(1,) * (prediction.dim() - 3))
        cleared = torch.where(real, prediction.double(), 0)
        by_step = vmap(self.function, in_dims=(0, None, None))
        found = cast(Tensor, vmap(by_step)(cleared, query.y, mask.bool()))
        finite = cleared.isfinite()
        if ways is not None:
            absent = torch.arange(prediction.shape[-1], device=ways.device) >= ways.unsqueeze(-1)
            finite = finite | absent.unsqueeze(1).unsqueeze(1)
        return found if self.table else torch.where(finite.flatten(2).all(-1), found, torch.nan)

    @staticmethod
    def _each(prediction: Tree, query: Examples) -> Iterator[tuple[Tree, Examples]]:
        for by_row, real in _real_rows(mapped(lambda t: t.transpose(1, 2), prediction), query):
            yield mapped(lambda t: t.transpose(0, 1), by_row), real

    def _by_step(self, prediction: Tree, query: Examples) -> Tensor:
        every = torch.ones(query.rows, dtype=torch.bool, device=first(query.y).device)
        try:
            steps = range(len(first(prediction)))
            found = [self.function(at(prediction, step), query.y, every) for step in steps]
        except Exception as error:  # the user's own code
            last = traceback.extract_tb(error.__traceback__)[-1]
            raise ConfigError(
                f"task_metrics: '{self.name}' fails: {first_line(error)} ({last.filename}:{last.lineno})"
            ) from error
        return torch.stack([self._number(value) for value in found])

    def _number(self, found: object) -> Tensor:
        try:
            value = torch.as_tensor(found, dtype=torch.float64).detach()
        except (TypeError, ValueError, RuntimeError):
            value = torch.empty(0)
        if value.numel() != 1:
            shown = f"shape {list(value.shape)}" if isinstance(found, Tensor) else repr(found)
            raise ConfigError(
                f"task_metrics: '{self.name}' returns {shown} for one task; expected one number "
                "(a metric of single examples is given as metric)"
            )
        return value.reshape(())

    def _check_classes(self, target: Tensor, classes: int) -> None:
        if target.is_floating_point() or bool(((target < 0) | (target >= classes)).any()):
            raise ConfigError(
                f"task_metrics: '{self.name}' needs integer targets in [0, {classes}), got {target.dtype} from "
                f"{target.min().item()} to {target.max().item()}; leave it out, or write your own metric"
            )


def task_metrics_of(family: TaskFamily) -> tuple[TaskMetric, ...]:
    """Return the metrics of whole tasks that ``family.task_metrics`` names.

    ConfigError for an unknown name, a name given twice, and a metric of another kind of tasks.
    """
    found = list[TaskMetric]()
    for given in family.task_metrics:
        found.append(_built_in(given, family) if isinstance(given, str) else TaskMetric(_name(given), given))
    names = [family.metric_name, *TaskMetric.reserved]
    for metric in found:
        if metric.name in names:
            raise ConfigError(f"task_metrics: '{metric.name}' is taken; give the function another name")
        names.append(metric.name)
    return tuple(found)


def _name(function: TaskMetricFunction) -> str:
    if not callable(function):
        raise ConfigError(
            f"task_metrics: {function!r} is no metric; expected one of {', '.join(BUILT_IN)}, or a function "
            "(prediction [N, …], target [N, …], mask [N]) → one number per task"
        )
    return str(getattr(function, "__name__", type(function).__name__))


def _built_in(name: str, family: TaskFamily) -> TaskMetric:
    suited = [n for n, metric in BUILT_IN.items() if metric.kind == family.kind]
    if name not in suited:
        kind = f" is for {BUILT_IN[name].kind};" if name in BUILT_IN else " is unknown;"
        raise ConfigError(
            f"task_metrics: '{name}'{kind} '{type(family).__name__}' is {family.kind}: expected one of "
            f"{', '.join(suited)}, or package.module:function of your own{nearest(name, suited)}"
        )
    return BUILT_IN[name]


# The built-in ones: prediction [N, classes] (logits) and target [N], or both [N, …] in regression ---------------------


def _one_hot(labels: Tensor, classes: int, mask: Tensor) -> Tensor:
    return (labels.unsqueeze(-1) == torch.arange(classes, device=labels.device)).double() * mask.unsqueeze(-1)


def confusion_matrix(prediction: Tensor, target: Tensor, mask: Tensor) -> Tensor:
    """Count the real rows by class (first dimension) and predicted class: [classes, classes]."""
    classes = prediction.shape[-1]
    return _one_hot(target, classes, mask).mT @ _one_hot(prediction.argmax(-1), classes, mask)


def balanced_accuracy(prediction: Tensor, target: Tensor, mask: Tensor) -> Tensor:
    """Return the mean recall of the classes that the targets have (Brodersen et al. 2010)."""
    counts = confusion_matrix(prediction, target, mask)
    rows, right = counts.sum(1), counts.diagonal(dim1=-2, dim2=-1)
    return torch.where(rows > 0, right / rows, 0).sum() / (rows > 0).sum()


def macro_f1(prediction: Tensor, target: Tensor, mask: Tensor) -> Tensor:
    """Return the mean F1 of the classes that the targets or the predictions have."""
    counts = confusion_matrix(prediction, target, mask)
    size, right = counts.sum(0) + counts.sum(1), counts.diagonal(dim1=-2, dim2=-1)
    return torch.where(size > 0, 2 * right / size, 0).sum() / (size > 0).sum()


def roc_auc(prediction: Tensor, target: Tensor, mask: Tensor) -> Tensor:
    """Return the area under the ROC curve, by ranks of probabilities; ties count half (Fawcett 2006, sec. 7).

    Two classes: that of class 1. More: the mean over one class against the rest, for the classes that the targets
    have. NaN where the targets have one class only.
    """
    classes = prediction.shape[-1]
    positive = _one_hot(target, classes, mask).mT
    scores = prediction.softmax(-1).masked_fill(~mask.unsqueeze(-1), torch.inf).mT.contiguous()
    ordered = scores.sort(-1).values
    below, up_to = (torch.searchsorted(ordered, scores, right=right) for right in (False, True))
    rank = (below + up_to + 1).double() / 2
    hits = positive.sum(-1)
    misses = mask.sum() - hits
    area = ((rank * positive).sum(-1) - hits * (hits + 1) / 2) / (hits * misses)
    if classes == 2:
        return area[1]
    defined = (hits > 0) & (misses > 0)
    return torch.where(defined, area, 0).sum() / defined.sum()


def calibration_error(prediction: Tensor, target: Tensor, mask: Tensor) -> Tensor:
    """Return the expected calibration error of the predicted class, in 15 bins (Guo et al. 2017, eq. 3)."""
    confidence, guess = prediction.softmax(-1).max(-1)
    bins = (confidence * CALIBRATION_BINS).ceil().long().clamp(min=1) - 1
    gap = (guess == target).double() - confidence
    return (gap @ _one_hot(bins, CALIBRATION_BINS, mask)).abs().sum() / mask.sum()


def r2(prediction: Tensor, target: Tensor, mask: Tensor) -> Tensor:
    """Return 1 − residual / total sum of squares, averaged over a target's dimensions; NaN for constant targets."""
    weight = mask.double().unsqueeze(-1)
    p, y = (torch.where(weight > 0, t.double().reshape(len(mask), -1), 0) for t in (prediction, target))
    centred = (y - (y * weight).sum(0) / weight.sum()) * weight
    residual, total = ((y - p) * weight).square().sum(0), centred.square().sum(0)
    return torch.where(total > 0, 1 - residual / total, torch.nan).mean()


def mae(prediction: Tensor, target: Tensor, mask: Tensor) -> Tensor:
    """Return the mean absolute error over rows and the dimensions of a target."""
    errors = (prediction - target).double().abs().reshape(len(mask), -1).mean(1)
    return torch.where(mask, errors, 0).sum() / mask.sum()


BUILT_IN = {
    function.__name__: TaskMetric(function.__name__, function, kind, table=function is confusion_matrix, built_in=True)
    for kind, functions in (
        ("classification", (balanced_accuracy, macro_f1, roc_auc, calibration_error, confusion_matrix)),
        ("regression", (r2, mae)),
    )
    for function in functions
}


def _logits(prediction: Tree, count: int | None) -> Tree:
    """Return the logits of the first ``count`` classes; None for all."""
    return prediction if count is None else mapped(lambda t: t[..., :count], prediction)
