"""Scores with their protocol: what was measured, on how many tasks, and how to measure it again."""

from __future__ import annotations

import hashlib
import json
import math
from dataclasses import asdict, dataclass
from typing import Any

import torch

from metadist.core.learner import Learner, with_inner_steps
from metadist.core.state import Records, State
from metadist.runtime.scheduler import Scheduler


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

    def as_dict(self) -> dict[str, Any]:
        return as_json(asdict(self))


def as_json(value: Any) -> Any:
    """``value`` with null for NaN and Inf, which JSON has not."""
    if isinstance(value, dict):
        return {k: as_json(v) for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [as_json(v) for v in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def evaluate(
    fleet: Scheduler, learner: Learner, state: State, *, run: str, meta_step: int, seed: int, split: str, tasks: int, inner_steps: int | None
) -> Evaluation:
    """Judge θ on ``tasks`` tasks of ``split`` on the fleet."""
    round = learner.evaluation(run, meta_step, seed, state, split=split, tasks=tasks, inner_steps=inner_steps)
    records: Records = fleet.run(round)
    return summarise(records, learner, seed=seed, split=split, inner_steps=inner_steps)


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
        "inner_steps": getattr(algorithm, "inner_steps", 0),
        "family": type(learner.tasks).__name__,
        **learner.tasks.protocol(split),
    }
    # A task is a pure function of (seed, split, index) and of what the protocol says, so this names the very tasks.
    listed = {k: v for k, v in protocol.items() if k not in ("normalization", "inner_steps")}
    indices = records.columns["task"].tolist()
    text = json.dumps([listed, indices], sort_keys=True, default=str)
    return {**protocol, "task_list_sha256": hashlib.sha256(text.encode()).hexdigest()}
