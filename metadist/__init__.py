"""metadist: distributed, task-parallel meta-training.

Importing it does nothing: every public name is imported when it is first used.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

_WHERE = {
    "metadist.api": ("compose", "load", "train"),
    "metadist.algorithms": ("ANIL", "CNP", "MAML", "MetaSGD", "ProtoNet", "RL2", "Reptile"),
    "metadist.config": ("CheckpointSettings", "ControlSettings", "EngineSettings", "EvaluateSettings", "TrackingSettings"),
    "metadist.control.adapt_client": ("Client",),
    "metadist.core.algorithm": ("Algorithm", "TaskContext"),
    "metadist.core.errors": ("MetadistError",),
    "metadist.core.inner": ("InnerLoop",),
    "metadist.core.learner": ("Learner",),
    "metadist.core.meta_environment": ("Continuous", "Discrete", "MetaEnvironment", "Step"),
    "metadist.core.model": ("Model", "use_batch_statistics"),
    "metadist.core.outer": ("OuterLoop",),
    "metadist.core.parameters": ("Parameters",),
    "metadist.core.random": ("TaskKey",),
    "metadist.core.task": ("Classification", "Examples", "Task", "TaskFamily"),
    "metadist.core.trial_learner": ("TrialAlgorithm", "TrialLearner"),
    "metadist.models": ("Conv4", "GRU", "LSTM", "MLP", "Reactive"),
    "metadist.runtime.groups": ("WorkerGroup",),
    "metadist.tasks": ("ImageFolder", "Omniglot", "Sinusoid"),
}
_MODULE = {name: module for module, names in _WHERE.items() for name in names}

__all__ = ["__version__", *_MODULE]


def __getattr__(name: str) -> Any:
    if name not in _MODULE:
        raise AttributeError(f"module 'metadist' has no attribute '{name}'")
    return getattr(importlib.import_module(_MODULE[name]), name)


def __dir__() -> list[str]:
    return sorted([*globals(), *_MODULE])


if TYPE_CHECKING:
    from metadist.algorithms import ANIL, CNP, MAML, RL2, MetaSGD, ProtoNet, Reptile
    from metadist.api import compose, load, train
    from metadist.config import CheckpointSettings, ControlSettings, EngineSettings, EvaluateSettings, TrackingSettings
    from metadist.control.adapt_client import Client
    from metadist.core.algorithm import Algorithm, TaskContext
    from metadist.core.errors import MetadistError
    from metadist.core.inner import InnerLoop
    from metadist.core.learner import Learner
    from metadist.core.meta_environment import Continuous, Discrete, MetaEnvironment, Step
    from metadist.core.model import Model, use_batch_statistics
    from metadist.core.outer import OuterLoop
    from metadist.core.parameters import Parameters
    from metadist.core.random import TaskKey
    from metadist.core.task import Classification, Examples, Task, TaskFamily
    from metadist.core.trial_learner import TrialAlgorithm, TrialLearner
    from metadist.models import GRU, LSTM, MLP, Conv4, Reactive
    from metadist.runtime.groups import WorkerGroup
    from metadist.tasks import ImageFolder, Omniglot, Sinusoid
