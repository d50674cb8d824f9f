"""metadist: distributed, task-parallel meta-training.

Importing it does nothing: every public name is imported when it is first used.
"""

from __future__ import annotations

import importlib
import importlib.abc
import importlib.machinery
import sys
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

_WHERE = {
    "metadist.api": ("compose", "load", "train"),
    "metadist.algorithms": ("ANIL", "CNP", "IMAML", "MAML", "MetaSGD", "ProtoNet", "RL2", "Reptile"),
    "metadist.config.engine": ("EngineSettings",),
    "metadist.config.groups": ("WorkerGroup",),
    "metadist.config.settings": ("CheckpointSettings", "ControlSettings", "EvaluateSettings", "TrackingSettings"),
    "metadist.serving.client": ("Client",),
    "metadist.core.algorithm": ("Algorithm", "Phi", "TaskContext", "Theta"),
    "metadist.core.carried": ("CarriedAlgorithm", "CarriedContext", "CarriedContribution"),
    "metadist.core.engine": ("Engine",),
    "metadist.core.errors": ("MetadistError",),
    "metadist.engine.estimators": ("Unrolled",),
    "metadist.core.inner_loop": ("Descent", "InnerLoop", "InnerState", "Moments"),
    "metadist.experiment.interruption": ("TrainingInterrupted",),
    "metadist.learners": ("Learner",),
    "metadist.rl.algorithm": ("PolicySearch", "TrialAlgorithm", "TrialContext"),
    "metadist.rl.policy": ("Policy",),
    "metadist.rl.trial": ("Trials", "advantages", "rollout"),
    "metadist.rl.environment": ("Continuous", "Discrete", "MetaEnvironment", "Step"),
    "metadist.core.meta_step": ("MetaStep",),
    "metadist.core.model": ("BoundModel", "Model", "use_batch_statistics"),
    "metadist.core.outer": ("OuterLoop", "SlotOptimizer"),
    "metadist.core.parameters": ("Layout", "Parameters"),
    "metadist.core.random": ("TaskKey",),
    "metadist.core.round": ("Round",),
    "metadist.core.state": ("Contribution", "Records", "Slot", "State"),
    "metadist.core.task": ("Classification", "Examples", "Task", "TaskFamily"),
    "metadist.learners.trials": ("TrialLearner",),
    "metadist.models": ("Conv4", "GRU", "LSTM", "MLP", "Reactive"),
    "metadist.tasks": ("ImageFolder", "Omniglot", "Sinusoid"),
}
_MODULE = {name: module for module, names in _WHERE.items() for name in names}

#: modules of version 0.1 whose names stand in configs, MLflow models and Ray Serve manifests → their place now
_MOVED = {
    "metadist.bench": "metadist.benchmarks",
    "metadist.envs": "metadist.environments",
    "metadist.mlflow_model": "metadist.serving.mlflow_model",
    "metadist.runtime": "metadist.workers",
    "metadist.runtime.ray_serve": "metadist.serving.ray",
}

__all__ = ["__version__", *_MODULE]


def __getattr__(name: str) -> Any:
    if name not in _MODULE:
        raise AttributeError(f"module 'metadist' has no attribute '{name}'")
    return getattr(importlib.import_module(_MODULE[name]), name)


def __dir__() -> list[str]:
    return sorted([*globals(), *_MODULE])


class _Moved(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    """Import a moved module under its old name. The module is the same object under both names."""

    def find_spec(self, name: str, path: Any = None, target: Any = None) -> importlib.machinery.ModuleSpec | None:
        parent, _, last = name.rpartition(".")
        new = _MOVED.get(name) or (f"{_MOVED[parent]}.{last}" if parent in _MOVED else None)
        return None if new is None else importlib.machinery.ModuleSpec(name, self, loader_state=new)

    def create_module(self, spec: importlib.machinery.ModuleSpec) -> Any:
        module = importlib.import_module(spec.loader_state)
        spec.loader_state = module.__spec__
        return module

    def exec_module(self, module: Any) -> None:
        # The import system has put the old name's spec into the module.
        module.__spec__ = module.__spec__.loader_state


sys.meta_path.insert(0, _Moved())

if TYPE_CHECKING:
    from metadist.algorithms import ANIL, CNP, IMAML, MAML, RL2, MetaSGD, ProtoNet, Reptile
    from metadist.api import compose, load, train
    from metadist.config.engine import EngineSettings
    from metadist.config.groups import WorkerGroup
    from metadist.config.settings import CheckpointSettings, ControlSettings, EvaluateSettings, TrackingSettings
    from metadist.core.algorithm import Algorithm, Phi, TaskContext, Theta
    from metadist.core.carried import CarriedAlgorithm, CarriedContext, CarriedContribution
    from metadist.core.engine import Engine
    from metadist.core.errors import MetadistError
    from metadist.core.inner_loop import Descent, InnerLoop, InnerState, Moments
    from metadist.core.meta_step import MetaStep
    from metadist.core.model import BoundModel, Model, use_batch_statistics
    from metadist.core.outer import OuterLoop, SlotOptimizer
    from metadist.core.parameters import Layout, Parameters
    from metadist.core.random import TaskKey
    from metadist.core.round import Round
    from metadist.core.state import Contribution, Records, Slot, State
    from metadist.core.task import Classification, Examples, Task, TaskFamily
    from metadist.engine.estimators import Unrolled
    from metadist.experiment.interruption import TrainingInterrupted
    from metadist.learners import Learner
    from metadist.learners.trials import TrialLearner
    from metadist.models import GRU, LSTM, MLP, Conv4, Reactive
    from metadist.rl.algorithm import PolicySearch, TrialAlgorithm, TrialContext
    from metadist.rl.environment import Continuous, Discrete, MetaEnvironment, Step
    from metadist.rl.policy import Policy
    from metadist.rl.trial import Trials, advantages, rollout
    from metadist.serving.client import Client
    from metadist.tasks import ImageFolder, Omniglot, Sinusoid
