"""Scores and their protocol: the metric, the tasks, and everything that is needed to measure again."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, fields
from typing import TypeVar, cast

import torch

from metadist.core.errors import WorkerError
from metadist.core.random import TaskKey
from metadist.core.state import Records
from metadist.core.task import TaskFamily
from metadist.core.task_metrics import TaskMetric
from metadist.learners.intervals import Sampling, over_tasks
from metadist.rl.algorithm import EPISODES_SHOWN

T = TypeVar("T")
#: adaptation steps whose scores are recorded one by one; the last one always is
STEPS_SHOWN = (0, 1, 2, 3, 5, 10, 20, 50)


@dataclass(frozen=True)
class TaskScore:
    """Scores by one metric after 0, 1, …, k adaptation steps, over the tasks whose loss and metric are finite.

    ``ci95`` is half the 95 % confidence interval of the mean (``Sampling``), and ``ci95_tasks`` the one that takes
    tasks as independent draws, where that is another. ``left_out`` counts the other tasks.
    """

    mean: list[float]
    ci95: list[float]
    median: list[float]
    left_out: int
    ci95_tasks: list[float] | None = None

    @classmethod
    def of(cls, values: torch.Tensor, finite: torch.Tensor, sampling: Sampling) -> TaskScore:
        """Reduce values [T, k+1] over the rows that ``finite`` [T] selects; all where it selects none (NaN)."""
        chosen = finite if bool(finite.any()) else torch.ones_like(finite)
        part = values[chosen]
        return cls(
            part.mean(0).tolist(),
            sampling.part(chosen).half_width(part).tolist(),
            part.quantile(0.5, dim=0).tolist(),
            int((~finite).sum()),
            None if sampling.independent else over_tasks(part).tolist(),
        )

    def metrics(self, prefix: str) -> dict[str, float]:
        """Return the mean by adaptation step, and interval, median and number of left-out tasks of the last one."""
        last = len(self.mean) - 1
        values = {f"{prefix}/step_{k}": self.mean[k] for k in range(last + 1) if k in STEPS_SHOWN or k == last}
        values |= {prefix: self.mean[last], f"{prefix}/ci95": self.ci95[last], f"{prefix}/median": self.median[last]}
        if self.ci95_tasks is not None:
            values[f"{prefix}/ci95_tasks"] = self.ci95_tasks[last]
        return {**values, f"{prefix}/left_out": float(self.left_out)}


@dataclass(frozen=True)
class Evaluation:
    """Means over tasks after 0, 1, …, k adaptation steps. ``ci95`` is half the 95 % confidence interval of the mean.

    Where tasks share sources, or are listed, ``ci95_tasks`` is the interval that takes them as independent draws.
    ``left_out`` counts the tasks that do not enter ``mean``, ``ci95`` and ``median``, because their loss or metric is
    not finite; ``loss`` is the mean over tasks with finite losses. ``divergence_rate`` is the share of the tasks with
    finite losses whose query loss is higher after k steps than before, and ``loss_rose`` their number.
    ``task_metrics`` holds the scores by metrics of whole tasks, and ``tables`` the sums of tables (confusion matrices)
    over tasks after k steps.
    """

    split: str
    metric: str
    tasks: int
    mean: list[float]
    ci95: list[float]
    median: list[float]
    loss: list[float]
    divergence_rate: float
    protocol: dict[str, object]
    ci95_tasks: list[float] | None = field(default=None, kw_only=True)
    left_out: int = field(default=0, kw_only=True)
    loss_rose: int = field(default=0, kw_only=True)
    task_metrics: dict[str, TaskScore] = field(default_factory=dict, kw_only=True)
    tables: dict[str, list[list[float]]] = field(default_factory=dict, kw_only=True)
    #: scores of known methods on the same tasks, where they were requested
    beside: list[dict[str, object]] = field(default_factory=list, kw_only=True)

    @property
    def drawn(self) -> int:
        """The number of tasks, those that were left out included."""
        return self.tasks

    @property
    def left_out_note(self) -> str:
        """Text that stands with every score: "n of N left out: not finite", or nothing where all tasks count."""
        return left_out_note(self.left_out, self.drawn)

    @property
    def counted(self) -> tuple[str, int]:
        """The meaning of a position in ``mean``, and the number of the first one: adaptation steps count from 0."""
        return "step", 0

    @property
    def score(self) -> float:
        """The mean metric after the last step."""
        return self.mean[-1]

    @property
    def score_ci95(self) -> float:
        return self.ci95[-1]

    @property
    def score_median(self) -> float:
        return self.median[-1]

    def metrics(self) -> dict[str, float]:
        """Return ``eval/<split>/…``: every metric by adaptation step, with interval, median and number of left-out
        tasks, and the divergence rate.
        """
        mine = TaskScore(self.mean, self.ci95, self.median, self.left_out, self.ci95_tasks)
        values = dict[str, float]()
        for name, score in {self.metric: mine, **self.task_metrics}.items():
            values |= score.metrics(f"eval/{self.split}/{name}")
        return values | {
            f"eval/{self.split}/loss": self.loss[-1],
            f"eval/{self.split}/divergence_rate": self.divergence_rate,
        }

    def as_dict(self) -> dict[str, object]:
        """Return plain data for JSON."""
        return as_json(asdict(self))


@dataclass(frozen=True)
class TrialEvaluation(Evaluation):
    """Scores in a meta-environment.

    ``mean``, ``ci95`` and ``median`` are those of the return in episode 1, 2, …, n of a trial, or after 0, 1, …, k
    gradient steps. ``totals`` are those of the whole return of a trial, by the choice of actions (greedy, sampled),
    with the standard error.
    """

    totals: dict[str, dict[str, float]]
    policy: str
    by_gradient_steps: bool
    #: the return of every trial by episode, by the choice of actions: float64 [tasks, episodes]
    trials: dict[str, torch.Tensor] = field(repr=False, compare=False)
    #: means over trials of the highest measurement of the environment in episode 1, 2, …, n (success: 1 in any step)
    measured: dict[str, list[float]] = field(default_factory=dict)
    #: by episode (or gradient step): its return minus that of the first in the same trial, mean and standard error
    gained: list[tuple[float, float]] = field(default_factory=list)

    def metrics(self) -> dict[str, float]:
        """Return ``eval/<split>/…``: the return by episode (or gradient step) and by the choice of actions."""
        prefix, last = f"eval/{self.split}/{self.metric}", len(self.mean) - 1
        name, first = self.counted
        values = {
            f"{prefix}/{name}_{k + first}": self.mean[k]
            for k in range(last + 1)
            if k + 1 in EPISODES_SHOWN or k == last
        }
        values |= {f"{prefix}/{policy}": total["mean"] for policy, total in self.totals.items()}
        values |= {prefix: self.score, f"{prefix}/ci95": self.score_ci95, f"{prefix}/median": self.score_median}
        return {**values, f"{prefix}/left_out": float(self.left_out)}

    def as_dict(self) -> dict[str, object]:
        """Return plain data for JSON, without the returns of single trials."""
        shown = {f.name: getattr(self, f.name) for f in fields(self) if f.name != "trials"}
        return as_json(shown)

    @property
    def drawn(self) -> int:
        return self.tasks + self.left_out

    @property
    def left_out_note(self) -> str:
        return left_out_note(self.left_out, self.drawn, "environment failed")

    @property
    def counted(self) -> tuple[str, int]:
        """The meaning of a position in ``mean``, and the number of the first one: episodes count from 1."""
        return ("step", 0) if self.by_gradient_steps else ("episode", 1)

    @property
    def score(self) -> float:
        """The mean return of a trial."""
        return self.totals[self.policy]["mean"]

    @property
    def score_ci95(self) -> float:
        return 1.96 * self.totals[self.policy]["standard_error"]

    @property
    def score_median(self) -> float:
        return self.totals[self.policy]["median"]


def as_json(value: T) -> T:
    """Replace NaN and Inf by None, since JSON has neither, and tuples by lists."""
    return cast(T, _without_infinities(value))


def _without_infinities(value: object) -> object:
    if isinstance(value, dict):
        return {k: _without_infinities(v) for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [_without_infinities(v) for v in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def left_out_note(left_out: float, drawn: int, reason: str = "not finite") -> str:
    """Return "n of N left out: reason", or nothing where none was left out."""
    return f"{left_out:.0f} of {drawn} left out: {reason}" if left_out else ""


def score_tasks(
    records: Records, metric: str, task_metrics: Sequence[TaskMetric], listed: int | None, protocol: dict[str, object]
) -> Evaluation:
    """Reduce records with the columns ``loss`` and ``metric`` [T, k+1], and those of ``task_metrics``, to scores.

    ``listed`` is the number of tasks where they are a list. The protocol has ``split``.
    """
    columns = records.columns
    sampling = Sampling(records.rows, columns.get("source"), listed)
    loss = columns["loss"]
    finite = torch.isfinite(loss).all(1)
    rose = int((finite & (loss[:, -1] > loss[:, 0])).sum())
    scores, tables = dict[str, TaskScore](), dict[str, list[list[float]]]()
    for name in (metric, *(m.name for m in task_metrics if not m.table)):
        scores[name] = TaskScore.of(columns[name], finite & torch.isfinite(columns[name]).all(1), sampling)
    for name in (m.name for m in task_metrics if m.table):
        tables[name] = columns[name][finite, -1].sum(0).tolist()
    mine = scores.pop(metric)
    return Evaluation(
        split=str(protocol["split"]),
        metric=metric,
        tasks=records.rows,
        mean=mine.mean,
        ci95=mine.ci95,
        median=mine.median,
        loss=(loss[finite] if bool(finite.any()) else loss).mean(0).tolist(),
        divergence_rate=rose / int(finite.sum()) if bool(finite.any()) else math.nan,
        protocol={
            **with_task_list(protocol, records, ("normalization", "inner_steps")),
            "interval": sampling.described(),
        },
        ci95_tasks=mine.ci95_tasks,
        left_out=mine.left_out,
        loss_rose=rose,
        task_metrics=scores,
        tables=tables,
    )


def sources_of(family: TaskFamily, keys: TaskKey) -> torch.Tensor | None:
    """Return the sources of the tasks, int64 [T, sources of a task], or None where the family names none."""
    found = [family.sources(key, keys.split) for key in keys.each()]
    if any(source is None for source in found):
        return None
    return torch.tensor([source if isinstance(source, tuple) else (source,) for source in found])


def counted_trials(records: Records, split: str) -> Records:
    """Drop the trials whose environment broke down. WorkerError where none is left."""
    counted = ~(records.columns["greedy"].isnan() | records.columns["sampled"].isnan()).any(1)
    if not counted.any():
        raise WorkerError(f"every one of {records.rows} {split} trials was left out (environment.on_error: skip)")
    return records.part(counted)


def summary_of(whole: torch.Tensor) -> dict[str, float]:
    """Return mean, standard error and median of the whole returns of trials [T]."""
    error = float(whole.std()) / math.sqrt(len(whole)) if len(whole) > 1 else math.nan
    return {"mean": float(whole.mean()), "standard_error": error, "median": float(whole.quantile(0.5))}


def with_task_list(protocol: dict[str, object], records: Records, aside: tuple[str, ...]) -> dict[str, object]:
    """Add a hash that names the tasks: a task is a function of (seed, split, index) and of the protocol without
    ``aside``.
    """
    listed = {k: v for k, v in protocol.items() if k not in aside}
    indices = records.columns["task"].tolist()
    text = json.dumps([listed, indices], sort_keys=True, default=str)
    return {**protocol, "task_list_sha256": hashlib.sha256(text.encode()).hexdigest()}
