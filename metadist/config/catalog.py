"""The kinds of components that a config names: metadist's own tables, and the types that plug-ins must have."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import is_dataclass

from torch import nn

from metadist.algorithms import ALGORITHMS
from metadist.config.plugins import Kind, find, plugins
from metadist.core.algorithm import Algorithm
from metadist.core.carried import CarriedAlgorithm
from metadist.core.errors import ConfigError, nearest
from metadist.core.task import TaskFamily
from metadist.environments import ENVIRONMENTS
from metadist.models import MODELS
from metadist.rl.algorithm import TrialAlgorithm
from metadist.rl.environment import MetaEnvironment
from metadist.tasks import TASKS


def _class_of(*bases: type) -> Callable[[object], bool]:
    return lambda found: inspect.isclass(found) and issubclass(found, bases)


def _makes_modules(found: object) -> bool:
    """Whether ``found`` is a function, a module's class, or a class of model settings."""
    if not inspect.isclass(found):
        return inspect.isroutine(found)
    settings = is_dataclass(found) and (hasattr(found, "build") or hasattr(found, "build_policy"))
    return issubclass(found, nn.Module) or settings


ALGORITHM = Kind(
    "algorithms",
    ALGORITHMS,
    _class_of(Algorithm, TrialAlgorithm, CarriedAlgorithm),
    "a class derived from metadist.Algorithm, metadist.CarriedAlgorithm or metadist.TrialAlgorithm",
    (Algorithm, TrialAlgorithm, CarriedAlgorithm),
)
TASK_FAMILY = Kind(
    "tasks", TASKS, _class_of(TaskFamily), "a class derived from metadist.TaskFamily", (TaskFamily, MetaEnvironment)
)
ENVIRONMENT = Kind(
    "environments",
    ENVIRONMENTS,
    _class_of(MetaEnvironment),
    "a class derived from metadist.MetaEnvironment",
    (TaskFamily, MetaEnvironment),
)
MODEL = Kind(
    "models",
    MODELS,
    _makes_modules,
    "a dataclass with build() or build_policy(), or a class or function that makes a torch.nn.Module",
    (nn.Module,),
)


def resolve(key: str, name: str, kind: Kind[type]) -> type:
    """Return the class that ``name`` stands for: metadist's own, or else that of a plug-in.

    Raises ConfigError that names ``key`` where there is none, or where the plug-in is unusable.
    """
    if name in kind.own:
        return kind.own[name]
    try:
        found = find(kind, name)
    except ConfigError as error:
        raise ConfigError(f"{key}: {error}") from error
    if found is not None:
        return found
    others = plugins(kind)
    known = sorted([*kind.own, *others.usable])
    unreadable = "".join(f"; {line}" for line in others.unreadable)
    raise ConfigError(
        f"{key}: '{name}' is not one of {', '.join(known)}{nearest(name, known)} (your own: package.module:Class)"
        f"{unreadable}"
    )
