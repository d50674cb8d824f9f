"""Scores and their protocol: the metric, the tasks, and everything that is needed to measure again."""

from __future__ import annotations

import hashlib
import json
import math
from dataclasses import asdict, dataclass, field, fields
from typing import TypeVar, cast

import torch

from metadist.core.errors import WorkerError
from metadist.core.state import Records
from metadist.rl.algorithm import EPISODES_SHOWN

T = TypeVar("T")
#: adaptation steps whose scores are recorded one by one; the last one always is
STEPS_SHOWN = (0, 1, 2, 3, 5, 10, 20, 50)


@dataclass(frozen=True)
class Evaluation:
    """Means over tasks after 0, 1, …, k adaptation steps. ``ci95`` is 1.96 σ/√n of the mean.

    ``divergence_rate`` is the share of tasks whose query loss is not finite, or higher after k steps than before.
    Tasks with values that are not finite do not enter the means.
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
    #: scores of known methods on the same tasks, where they were requested
    beside: list[dict[str, object]] = field(default_factory=list, kw_only=True)

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
        """Return ``eval/<split>/…``: the metric by adaptation step, and the last one's interval, median and
        divergence rate.
        """
        prefix, last = f"eval/{self.split}/{self.metric}", len(self.mean) - 1
        values = {f"{prefix}/step_{k}": self.mean[k] for k in range(last + 1) if k in STEPS_SHOWN or k == last}
        values |= {prefix: self.mean[last], f"{prefix}/ci95": self.ci95[last], f"{prefix}/median": self.median[last]}
        return values | {
            f"eval/{self.split}/loss": self.loss[last],
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
        return values | {prefix: self.score, f"{prefix}/ci95": self.score_ci95, f"{prefix}/median": self.score_median}

    def as_dict(self) -> dict[str, object]:
        """Return plain data for JSON, without the returns of single trials."""
        shown = {f.name: getattr(self, f.name) for f in fields(self) if f.name != "trials"}
        return as_json(shown)

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


def score_tasks(records: Records, metric: str, split: str, protocol: dict[str, object]) -> Evaluation:
    """Reduce records with the columns ``loss`` and ``metric`` [T, k+1] to scores."""
    values, loss = records.columns[metric], records.columns["loss"]
    finite = torch.isfinite(loss).all(1) & torch.isfinite(values).all(1)
    diverged = ~finite | (loss[:, -1] > loss[:, 0])
    if bool(finite.any()):
        values, loss = values[finite], loss[finite]
    count = values.shape[0]
    deviation = values.std(0) if count > 1 else torch.full_like(values[0], math.nan)
    return Evaluation(
        split=split,
        metric=metric,
        tasks=records.rows,
        mean=values.mean(0).tolist(),
        ci95=(1.96 * deviation / math.sqrt(count)).tolist(),
        median=values.quantile(0.5, dim=0).tolist(),
        loss=loss.mean(0).tolist(),
        divergence_rate=float(diverged.double().mean()),
        protocol=with_task_list(protocol, records, ("normalization", "inner_steps")),
    )


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
