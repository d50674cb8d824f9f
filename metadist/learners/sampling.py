"""Sample the tasks of a shard from a family, and refuse what no learner can compute on."""

from __future__ import annotations

import torch

from metadist.core.errors import ConfigError
from metadist.core.model import Model
from metadist.core.random import TaskKey
from metadist.core.task import Task, TaskFamily


def sampled(family: TaskFamily, keys: TaskKey, model: Model, device: torch.device) -> Task:
    """Return the tasks of ``keys`` on ``device``, in the dtype of ``model``. The keys stay on the CPU."""
    task = family.sample(keys, keys.split)
    if not isinstance(task, Task):
        raise ConfigError(
            f"tasks: sample of '{type(family).__name__}' returns {type(task).__name__}; expected "
            "Task(Examples(x, y), Examples(x, y))"
        )
    task = task.to(device, model.dtype)
    return Task(task.support.cleared(), task.query.cleared(), task.ways)


def is_padded(task: Task) -> bool:
    """Return whether rows of the tasks are padding."""
    return task.support.mask is not None or task.query.mask is not None


def refuse_statistics_of_padding(model: Model) -> None:
    """Raise ConfigError where ``model`` normalises over a batch, which here has padded rows."""
    if model.normalises_over_batch:
        raise ConfigError(
            "model: batch normalisation over padded rows would mix padding into the statistics; these tasks "
            "differ in size, so use norm: group or layer (or a task family whose tasks are of one size)"
        )
