"""Say whose code failed in a dry run: the family's loss or metric, the model, the algorithm."""

from __future__ import annotations

import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType

import torch
from torch import Tensor

from metadist.core.algorithm import TaskContext
from metadist.core.errors import ConfigError, MetadistError, first_line
from metadist.core.model import described
from metadist.core.state import State
from metadist.core.task import Task
from metadist.core.tree import shown
from metadist.engine.subject import Subject

_TORCH = str(Path(torch.__file__).parent)


def failed(learner: Subject, state: State, task: Task, split: str, error: Exception) -> ConfigError:
    """Return the refusal for ``error``, which the try of one ``task`` of ``split`` raised."""
    frames = [frame for frame, _ in traceback.walk_tb(error.__traceback__)]
    judging = next((f for f in frames if _is_judging(f)), None)
    prediction = None if judging is None else judging.f_locals.get("prediction")
    shapes = f"inputs {shown(task.support.x)} and targets {shown(task.support.y)}"
    about = f"{first_line(error)}{place(error)}"
    takes_trees = learner.tasks.kind != "classification" and prediction is not None
    if judging is not None and (takes_trees or isinstance(prediction, Tensor)):
        target = judging.f_locals["examples"].y
        return ConfigError(
            f"tasks: the {judging.f_code.co_name} of '{type(learner.tasks).__name__}' fails on {split} tasks with "
            f"predictions {_shown(prediction)} and targets {_shown(target)}: {about}{_hint(error, target)}"
        )
    owners = [f.f_locals.get("self") for f in frames]
    in_model = judging is None and any(owner is learner.model.module for owner in owners)
    if not in_model and (returned := _returned(learner, state, task)) is not None:
        return ConfigError(
            f"model: '{type(learner.model.module).__name__}' returns {returned}, and algorithm "
            f"'{type(learner.algorithm).__name__}' needs a tensor [N, outputs]; select it by model.output, or return "
            f"it from forward ({first_line(error)})"
        )
    if not in_model and any(owner is learner.tasks for owner in owners):
        return ConfigError(f"tasks: '{type(learner.tasks).__name__}' fails on {split} tasks: {about}")
    if not in_model and any(owner is not None and type(owner) is type(learner.algorithm) for owner in owners):
        name = type(learner.algorithm).__name__
        return ConfigError(f"algorithm: '{name}' fails on {split} tasks with {shapes}: {about}")
    name = type(learner.model.module).__name__
    return ConfigError(f"model: '{name}' fails on {split} tasks with {shapes}: {about}")


@contextmanager
def own_tasks(learner: Subject, split: str) -> Iterator[None]:
    """Explain an error inside the block, which calls nothing but the family's own code."""
    try:
        yield
    except MetadistError:
        raise
    except Exception as error:
        name = type(learner.tasks).__name__
        raise ConfigError(f"tasks: '{name}' fails on {split} tasks: {first_line(error)}{place(error)}") from error


def _is_judging(frame: FrameType) -> bool:
    """Return whether ``frame`` calls the family's loss or metric."""
    return frame.f_code in (TaskContext.loss.__code__, TaskContext.metric.__code__)


def _returned(learner: Subject, state: State, task: Task) -> str | None:
    """Describe the chosen part of ``forward``'s result where it is no tensor; None where it is one, or fails."""
    if not learner.model.has_forward:
        return None
    theta = state.theta(learner.slots)
    try:
        with torch.no_grad():
            result = learner.bind(theta, None, False)(theta["model"], task.support.x)
    except Exception:  # the failure has another cause than the type of the result
        return None
    return None if isinstance(result, Tensor) else described(result)


def _shown(value: object) -> str:
    if isinstance(value, Tensor):
        return f"{str(value.dtype).removeprefix('torch.')} {list(value.shape)}"
    return "nothing" if value is None else shown(value)


def _hint(error: Exception, target: object) -> str:
    """Return the remedy where PyTorch's loss refuses the dtype of the classes."""
    whole = isinstance(target, Tensor) and not target.is_floating_point() and target.dtype != torch.int64
    return "; give classes as int64 (y.long())" if whole and "Long" in str(error) else ""


def place(error: Exception) -> str:
    """Return file and line of the last call that is not PyTorch's own."""
    lines = [line for line in traceback.extract_tb(error.__traceback__) if not line.filename.startswith(_TORCH)]
    return f" ({lines[-1].filename}:{lines[-1].lineno})" if lines else ""
