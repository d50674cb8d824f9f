"""Scores with their protocol: what was measured, on how many tasks, and how to measure it again."""

from __future__ import annotations

import hashlib
import json
import math
from dataclasses import asdict, dataclass, field, fields
from typing import Any

import torch

from metadist.core.algorithm import with_inner_steps
from metadist.core.errors import WorkerError
from metadist.core.state import Records, State
from metadist.learners.few_shot import Learner
from metadist.learners.trials import TrialLearner
from metadist.training.scheduler import Scheduler


@dataclass(frozen=True)
class Evaluation:
    """Means over tasks after 0, 1, …, k adaptation steps. ``ci95`` is 1.96 σ/√n of the mean.

    ``divergence_rate`` is the share of tasks whose query loss is not finite, or higher after k steps than before; such
    non-finite tasks are left out of the means.
    """

    split: str
    metric: str
    tasks: int
    mean: list[float]
    ci95: list[float]
    median: list[float]
    loss: list[float]
    divergence_rate: float
    protocol: dict[str, Any]

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

    def as_dict(self) -> dict[str, Any]:
        return as_json(asdict(self))


@dataclass(frozen=True)
class TrialEvaluation(Evaluation):
    """Of a meta-environment: ``mean``, ``ci95`` and ``median`` are those of the return in episode 1, 2, …, n of a trial (or after 0,
    1, …, k gradient steps);
    ``totals`` those of a trial's whole return, by how actions were chosen (greedy, sampled), with the standard error."""

    totals: dict[str, dict[str, float]]
    policy: str
    by_gradient_steps: bool
    #: every trial's return by episode, by how actions were chosen: float64 [tasks, episodes]
    trials: dict[str, torch.Tensor] = field(repr=False, compare=False)
    #: means over trials of the highest value in episode 1, 2, …, n of what the environment measures (success: 1 in any step)
    measured: dict[str, list[float]] = field(default_factory=dict)
    #: by episode (or gradient step): what it brings more than the first in the same trial, mean and standard error
    gained: list[tuple[float, float]] = field(default_factory=list)
    #: what known methods get on the same trials, where they were asked for
    beside: list[dict[str, Any]] = field(default_factory=list)

    def as_dict(self) -> dict[str, Any]:
        shown = {f.name: getattr(self, f.name) for f in fields(self) if f.name != "trials"}
        return as_json(shown)

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


def as_json(value: Any) -> Any:
    """``value`` with null for NaN and Inf, which JSON has not."""
    if isinstance(value, dict):
        return {k: as_json(v) for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [as_json(v) for v in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def evaluate(
    fleet: Scheduler,
    learner: Learner | TrialLearner,
    state: State,
    *,
    run: str,
    meta_step: int,
    seed: int,
    split: str,
    tasks: int,
    inner_steps: int | None,
) -> Evaluation:
    """Judge θ on ``tasks`` tasks of ``split`` on the fleet."""
    round = learner.evaluation(run, meta_step, seed, state, split=split, tasks=tasks, inner_steps=inner_steps)
    records: Records = fleet.run(round)
    if isinstance(learner, TrialLearner):
        return summarise_trials(records, learner, seed=seed, split=split)
    return summarise(records, learner, seed=seed, split=split, inner_steps=inner_steps)


def summarise_trials(records: Records, learner: TrialLearner, *, seed: int, split: str) -> TrialEvaluation:
    totals, all_rows = {}, records
    counted = ~(records.columns["greedy"].isnan() | records.columns["sampled"].isnan()).any(
        1
    )  # left out where environments broke down
    if not counted.any():
        raise WorkerError(f"every one of {records.rows} {split} trials was left out (environment.on_error: skip)")
    records = records.part(counted)
    for name in ("greedy", "sampled"):
        whole = learner.algorithm.total(records.columns[name])
        error = float(whole.std()) / math.sqrt(len(whole)) if len(whole) > 1 else math.nan
        totals[name] = {"mean": float(whole.mean()), "standard_error": error, "median": float(whole.quantile(0.5))}
    chosen = records.columns[learner.policy]
    measured = {
        n.removesuffix(suffix): c.nanmean(0).tolist()
        for n, c in records.columns.items()
        if n.endswith(suffix := f"/{learner.policy}")
    }
    deviation = chosen.std(0) if len(chosen) > 1 else torch.full_like(chosen[0], math.nan)
    more = chosen - chosen[:, :1]
    facts = {
        "split": split,
        "seed": seed,
        "tasks": records.rows,
        "policy": learner.policy,
        "family": type(learner.tasks).__name__,
    }
    return TrialEvaluation(
        split=split,
        metric=learner.tasks.metric_name,
        tasks=records.rows,
        mean=chosen.mean(0).tolist(),
        ci95=(1.96 * deviation / math.sqrt(len(chosen))).tolist(),
        median=chosen.quantile(0.5, dim=0).tolist(),
        loss=(-chosen.mean(0)).tolist(),
        divergence_rate=0.0,
        protocol=_with_task_list({**facts, **learner.tasks.protocol(split)}, all_rows, ("policy",)),
        totals=totals,
        measured=measured,
        gained=list(zip(more.mean(0).tolist(), (more.std(0) / math.sqrt(len(more))).tolist())) if len(more) > 1 else [],
        policy=learner.policy,
        by_gradient_steps=learner.algorithm.by_gradient_steps,
        trials={name: records.columns[name] for name in ("greedy", "sampled")},
    )


def summarise(records: Records, learner: Learner, *, seed: int, split: str, inner_steps: int | None) -> Evaluation:
    name = learner.tasks.metric_name
    metric, loss = records.columns[name], records.columns["loss"]
    finite = torch.isfinite(loss).all(1) & torch.isfinite(metric).all(1)
    diverged = ~finite | (loss[:, -1] > loss[:, 0])
    if bool(finite.any()):
        metric, loss = metric[finite], loss[finite]
    count = metric.shape[0]
    deviation = metric.std(0) if count > 1 else torch.full_like(metric[0], math.nan)
    protocol = _protocol(learner, records, seed, split, inner_steps)
    return Evaluation(
        split=split,
        metric=name,
        tasks=records.rows,
        mean=metric.mean(0).tolist(),
        ci95=(1.96 * deviation / math.sqrt(count)).tolist(),
        median=metric.quantile(0.5, dim=0).tolist(),
        loss=loss.mean(0).tolist(),
        divergence_rate=float(diverged.double().mean()),
        protocol=protocol,
    )


def _protocol(learner: Learner, records: Records, seed: int, split: str, inner_steps: int | None) -> dict[str, Any]:
    algorithm = with_inner_steps(learner.algorithm, inner_steps)
    protocol = {
        "split": split,
        "seed": seed,
        "tasks": records.rows,
        "normalization": learner.normalization,
        "inner_steps": algorithm.inner_steps,
        "family": type(learner.tasks).__name__,
        **learner.tasks.protocol(split),
    }
    return _with_task_list(protocol, records, ("normalization", "inner_steps"))


def _with_task_list(protocol: dict[str, Any], records: Records, aside: tuple[str, ...]) -> dict[str, Any]:
    """A task is a pure function of (seed, split, index) and of what the protocol says but for ``aside``: a hash names the very tasks."""
    listed = {k: v for k, v in protocol.items() if k not in aside}
    indices = records.columns["task"].tolist()
    text = json.dumps([listed, indices], sort_keys=True, default=str)
    return {**protocol, "task_list_sha256": hashlib.sha256(text.encode()).hexdigest()}
