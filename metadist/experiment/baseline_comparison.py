"""Compare a trained meta-learner with baselines on the same tasks."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from metadist.core.random import TaskKey
from metadist.core.round import EvaluationRequest
from metadist.core.state import Records
from metadist.learners.few_shot import FewShotLearner
from metadist.oracles.supervised import chosen_baselines, measure

OPTION = "--compare"


def check_baselines(learner: FewShotLearner, names: Sequence[str]) -> None:
    """Raise ConfigError for a baseline that the learner's tasks do not have."""
    chosen_baselines(OPTION, learner.tasks, names)


def paired_with_baselines(
    learner: FewShotLearner, request: EvaluationRequest, records: Records, names: Sequence[str]
) -> list[dict[str, Any]]:
    """Return a row for the learner before adaptation, after adaptation, and for each baseline, on the same tasks.

    A row has the mean metric with its standard error, and the mean paired difference of the adapted learner, positive
    where the learner is better. Tasks on which one of the two has no finite value are not in the difference.
    """
    tasks = learner.tasks
    keys = TaskKey.of(request.key.seed, request.split, 0, records.columns["task"].tolist())
    ours = records.columns[tasks.metric_name]
    found = {
        "this learner": ours[:, -1],
        "this learner, 0 steps": ours[:, 0],
        **measure(tasks, chosen_baselines(OPTION, tasks, names), keys),
    }
    if ours.shape[1] == 1:
        del found["this learner, 0 steps"]
    return [_row(name, values, ours[:, -1], tasks.higher_is_better) for name, values in found.items()]


def _row(name: str, values: Tensor, ours: Tensor, higher_is_better: bool) -> dict[str, Any]:
    ahead = (ours - values) if higher_is_better else (values - ours)
    ahead, there = ahead[torch.isfinite(ahead)], values[torch.isfinite(values)]
    return {
        "name": name,
        "mean": float(there.mean()),
        "error": _standard_error(there),
        "tasks": len(ahead),
        "difference": float(ahead.mean()),
        "difference_error": _standard_error(ahead),
    }


def _standard_error(values: Tensor) -> float:
    return float(values.std()) / math.sqrt(len(values)) if len(values) > 1 else math.nan
