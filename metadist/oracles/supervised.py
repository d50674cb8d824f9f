"""Baselines for supervised tasks: classical methods that see the support set, or the rows of training tasks too.

All compute in float64 on the flattened inputs. A method that can't be computed for a task (logistic regression on one
class) falls back to the majority of the support set.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from metadist.core.errors import ConfigError, first_line, one_of
from metadist.core.random import TaskKey
from metadist.core.task import Examples, TaskFamily
from metadist.core.task_metrics import mixed_rows
from metadist.core.tree import shown

#: training tasks whose rows the pooled methods see
POOLED_TASKS = 1000
#: penalties of ridge regression; the one with the smallest leave-one-out error on the support set is taken
PENALTIES = tuple(10.0**p for p in range(-3, 4))


@dataclass(frozen=True)
class Pooled:
    """Ridge regression on the rows of training tasks, with a random offset of each task.

    ``between`` is the variance of the tasks' offsets, ``within`` that of the rows about them, for each target.
    """

    coefficients: np.ndarray
    intercept: np.ndarray
    between: np.ndarray
    within: np.ndarray


@dataclass(frozen=True)
class Known:
    """The rows of one task as numpy arrays: x [N, D] and y [N] (classes) or [N, targets]; query inputs [Q, D]."""

    x: np.ndarray
    y: np.ndarray
    query: np.ndarray
    outputs: int
    pooled: Pooled | None = None

    def scores(self, classes: np.ndarray) -> np.ndarray:
        """Return one-hot scores [Q, outputs] of predicted classes [Q]."""
        return np.eye(self.outputs)[classes]


Baseline = Callable[[Known], np.ndarray]


def majority(task: Known) -> np.ndarray:
    """Predict the most frequent class of the support set; the smallest of equally frequent ones."""
    return task.scores(np.full(len(task.query), np.bincount(task.y, minlength=task.outputs).argmax()))


def nearest_mean(task: Known) -> np.ndarray:
    """Predict the class whose mean input is nearest."""
    present = np.unique(task.y)
    means = np.stack([task.x[task.y == c].mean(0) for c in present])
    return task.scores(present[_distances(task.query, means).argmin(1)])


def nearest_neighbour(task: Known) -> np.ndarray:
    """Predict the target of the nearest support input (the first of equally near ones)."""
    found = task.y[_distances(task.query, task.x).argmin(1)]
    return task.scores(found) if task.y.ndim == 1 else found


def logistic_regression(task: Known) -> np.ndarray:
    """Fit logistic regression (L2, C = 1) to the support set, standardised."""
    from sklearn.linear_model import LogisticRegression

    present = np.unique(task.y)
    if len(present) < 2:
        return majority(task)
    centre, scale = task.x.mean(0), task.x.std(0)
    scale[scale == 0] = 1.0
    fitted = LogisticRegression(max_iter=1000).fit((task.x - centre) / scale, task.y)
    found = np.full((len(task.query), task.outputs), 0.0)
    found[:, fitted.classes_] = fitted.predict_proba((task.query - centre) / scale)
    return found


def ridge_classifier(task: Known) -> np.ndarray:
    """Fit ridge regression to the one-hot labels of the support set."""
    return _ridge(task.x, np.eye(task.outputs)[task.y], task.query)


def support_mean(task: Known) -> np.ndarray:
    """Predict the mean target of the support set."""
    return np.broadcast_to(task.y.mean(0), (len(task.query), task.y.shape[1]))


def ridge_regression(task: Known) -> np.ndarray:
    """Fit ridge regression with an intercept to the support set."""
    return _ridge(task.x, task.y, task.query)


def pooled_ridge(task: Known) -> np.ndarray:
    """Predict by ridge regression on training tasks, and add the task's offset, shrunken by its reliability.

    The offset is the mean residual of the support set times n τ² / (n τ² + σ²): the best linear prediction of a random
    intercept (Henderson 1975), with the variances τ² between and σ² within the training tasks.
    """
    pooled = task.pooled
    assert pooled is not None
    residual = task.y - (task.x @ pooled.coefficients + pooled.intercept)
    weight = len(task.y) * pooled.between / (len(task.y) * pooled.between + pooled.within)
    return task.query @ pooled.coefficients + pooled.intercept + weight * residual.mean(0)


CLASSIFICATION: Mapping[str, Baseline] = {
    "majority": majority,
    "nearest_mean": nearest_mean,
    "nearest_neighbour": nearest_neighbour,
    "logistic_regression": logistic_regression,
    "ridge": ridge_classifier,
}
REGRESSION: Mapping[str, Baseline] = {
    "support_mean": support_mean,
    "nearest_neighbour": nearest_neighbour,
    "ridge": ridge_regression,
    "pooled_ridge": pooled_ridge,
}


def baselines(tasks: TaskFamily) -> Mapping[str, Baseline]:
    """Return the baselines for ``tasks`` by name."""
    return CLASSIFICATION if tasks.kind == "classification" else REGRESSION


def chosen_baselines(option: str, tasks: TaskFamily, names: Sequence[str]) -> list[str]:
    """Return the names, with ``all`` replaced by every baseline. ConfigError where one is unknown."""
    known = baselines(tasks)
    for name in names:
        one_of(option, name, [*known, "all"])
    return list(known) if "all" in names else list(dict.fromkeys(names))


def measure(tasks: TaskFamily, names: Sequence[str], keys: TaskKey) -> dict[str, Tensor]:
    """Return the metric of each baseline on each task of ``keys``: name → float64 [T].

    The metric is that of the family, on the real rows of the query set. ConfigError where inputs are several tensors,
    where the targets of a regression are not a vector for each row, and where the metric needs other predictions.
    """
    known = baselines(tasks)
    found: dict[str, list[Tensor]] = {name: [] for name in names}
    pooled = pool(tasks, keys.seed) if "pooled_ridge" in names else None
    for key in keys.each():
        task = tasks.sample(TaskKey(key.seed, key.split, key.meta_step, key.tasks.reshape(1)), key.split)
        if not (isinstance(task.support.x, Tensor) and isinstance(task.support.y, Tensor)):
            raise ConfigError(
                f"--compare: '{type(tasks).__name__}' has several tensors as inputs or targets "
                f"(x {shown(task.query.x)}), and baselines need one of each; leave --compare out"
            )
        support, query = (_single(e) for e in (task.support, task.query))
        ways = tasks.ways(keys.split) if task.ways is None else int(task.ways)
        one = Known(_inputs(support.x), _targets(tasks, support), _inputs(query.x), ways, pooled)
        for name in names:
            prediction = torch.from_numpy(np.ascontiguousarray(known[name](one))).to(torch.float64)
            target = query.y if query.y.dtype == torch.int64 else query.y.double()
            shaped = prediction if tasks.kind == "classification" else prediction.reshape(target.shape)
            found[name].append(query.mean(_judged(tasks, name, shaped, target)).double())
    return {name: torch.stack(values) for name, values in found.items()}


def _judged(tasks: TaskFamily, name: str, prediction: Tensor, target: Tensor) -> Tensor:
    """Return the metric of each row. ConfigError where it is for other predictions, such as (mean, variance)."""
    try:
        mixed = tasks.kind != "classification" and mixed_rows(tasks.metric, prediction, target) is not None
        if not mixed:
            return tasks.metric(prediction, target)
        reason = "rows would broadcast"
    except (TypeError, ValueError, IndexError, KeyError) as error:
        reason = first_line(error)
    raise ConfigError(
        f"--compare: {name} predicts {list(prediction.shape)}, and the metric of '{type(tasks).__name__}' does not "
        f"take it ({reason}); leave --compare out"
    )


def pool(tasks: TaskFamily, seed: int, count: int = POOLED_TASKS) -> Pooled:
    """Fit ridge regression to the rows of the first ``count`` training tasks, and the variances of their offsets."""
    keys = TaskKey.of(seed, "train", 0, range(count))
    sampled = tasks.sample(keys, "train")
    x, y, group = [], [], []
    for i in range(count):
        for part in (sampled.support, sampled.query):
            rows = _real(Examples(part.x[i], part.y[i], None if part.mask is None else part.mask[i]))
            x.append(_inputs(rows.x))
            y.append(_targets(tasks, rows))
            group.append(np.full(len(x[-1]), i))
    inputs, targets, groups = np.concatenate(x), np.concatenate(y), np.concatenate(group)
    centre, mean = inputs.mean(0), targets.mean(0)
    gram = (inputs - centre).T @ (inputs - centre) + 1e-6 * len(inputs) * np.eye(inputs.shape[1])
    coefficients = np.linalg.solve(gram, (inputs - centre).T @ (targets - mean))
    residual = targets - mean - (inputs - centre) @ coefficients
    sizes = np.bincount(groups, minlength=count)[:, None]
    offsets = np.stack([np.bincount(groups, r, minlength=count) for r in residual.T], axis=1) / sizes
    within = ((residual - offsets[groups]) ** 2).sum(0) / max(1, len(residual) - count)
    # The variance of a mean residual is τ² + σ²/n: the moments' estimate of τ², at least 0.
    between = np.maximum((offsets**2 - within / sizes).mean(0), 1e-12)
    return Pooled(coefficients, mean - centre @ coefficients, between, np.maximum(within, 1e-12))


def _ridge(x: np.ndarray, y: np.ndarray, query: np.ndarray) -> np.ndarray:
    """Fit ridge regression with an intercept in the dual; the penalty has the least leave-one-out error."""
    centre, scale, mean = x.mean(0), x.std(0), y.mean(0)
    scale[scale == 0] = 1.0
    a, b = (x - centre) / scale, (query - centre) / scale
    values, vectors = np.linalg.eigh(a @ a.T)
    rotated, best = vectors.T @ (y - mean), None
    for penalty in PENALTIES:
        inverse = 1 / (np.maximum(values, 0) + penalty * len(x))
        # Leave-one-out residuals of kernel ridge regression, with the leverage 1/n of the intercept (Allen 1974).
        diagonal = (vectors**2 * (inverse * penalty * len(x))).sum(1) - 1 / len(x)
        residual = penalty * len(x) * (vectors @ (inverse[:, None] * rotated)) / np.maximum(diagonal, 1e-8)[:, None]
        error = float((residual**2).sum())
        if best is None or error < best[0]:
            best = error, vectors @ (inverse[:, None] * rotated)
    assert best is not None
    return b @ (a.T @ best[1]) + mean


def _distances(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """Return squared distances [len(a), len(b)] from differences, which do not cancel far from the origin."""
    return np.stack([((a - row) ** 2).sum(1) for row in b], axis=1)


def _single(examples: Examples) -> Examples:
    mask = None if examples.mask is None else examples.mask[0]
    return _real(Examples(examples.x[0], examples.y[0], mask))


def _real(examples: Examples) -> Examples:
    """Return the rows that are not padding."""
    if examples.mask is None:
        return examples
    return Examples(examples.x[examples.mask.bool()], examples.y[examples.mask.bool()])


def _inputs(x: Tensor) -> np.ndarray:
    return x.reshape(len(x), -1).double().numpy()


def _targets(tasks: TaskFamily, examples: Examples) -> np.ndarray:
    if tasks.kind == "classification":
        return examples.y.numpy()
    if examples.y.dim() > 2:
        raise ConfigError(
            f"--compare: targets of {type(tasks).__name__} have shape {list(examples.y.shape)}; baselines of "
            "regression need [rows] or [rows, targets]"
        )
    return examples.y.reshape(len(examples.y), -1).double().numpy()
