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
from metadist.learners.intervals import Sampling
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
    where the learner is better. Errors are over the sources of the tasks, where several tasks share one. Tasks on
    which one of the two has no finite value are not in the difference.
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
    sampling = Sampling(records.rows, records.columns.get("source"), tasks.listed_tasks(request.split))
    sign = 1 if tasks.higher_is_better else -1
    rows = []
    for name, values in found.items():
        mean, error, _ = _summary(values, sampling)
        difference, difference_error, count = _summary(sign * (ours[:, -1] - values), sampling)
        row = {"name": name, "mean": mean, "error": error, "tasks": count}
        rows.append({**row, "difference": difference, "difference_error": difference_error})
    return rows


def _summary(values: Tensor, sampling: Sampling) -> tuple[float, float, int]:
    """Return the mean of the finite values, its standard error, and their number."""
    finite = torch.isfinite(values)
    there, count = values[finite], int(finite.sum())
    error = float(sampling.part(finite).error(there.unsqueeze(1))) if count else math.nan
    return float(there.mean()), error, count
