"""Build tasks, environments, models and algorithms from their names and options."""

from __future__ import annotations

import copy
import functools
import importlib
import inspect
import sys
import traceback
from collections.abc import Callable, Mapping
from dataclasses import is_dataclass
from pathlib import Path
from typing import Any, cast

from torch import nn

from metadist.config.catalog import resolve
from metadist.config.plugins import Kind
from metadist.config.schema import Document, explained, settings, typed
from metadist.config.settings import MetricSettings
from metadist.core.algorithm import Algorithm
from metadist.core.errors import ConfigError, nearest
from metadist.core.task import TaskFamily
from metadist.core.task_metrics import BUILT_IN
from metadist.models import MODELS, ModelConfig, PolicyConfig
from metadist.rl.algorithm import TrialAlgorithm
from metadist.rl.environment import Continuous, MetaEnvironment


def named(key: str, value: object) -> Document:
    """Return the mapping ``{name: …}`` that a component's section is; a bare name is short for it."""
    if isinstance(value, str):
        return {"name": value}
    if not isinstance(value, dict):
        raise ConfigError(f"{key}: expected {{name: …}}, got {value!r}")
    return value


def component(key: str, value: object, kind: Kind[type], deferred: bool = False) -> object:
    """Build the object that ``value`` names: by a name of metadist or of a plug-in, or by ``package.module:Class``.

    ``deferred``: a class that is no dataclass is not called; the result is a ``functools.partial`` of it. Raises
    ConfigError that names ``key``, the value and what is expected.
    """
    options = dict(named(key, value))
    name = options.pop("name", None)
    if not isinstance(name, str):
        raise ConfigError(
            f"{key}.name is missing; expected one of {', '.join(sorted(kind.own))}, or package.module:Class of your own"
        )
    found = import_path(name, f"{key}.name") if ":" in name else resolve(f"{key}.name", name, kind)
    if is_dataclass(found):
        return settings(key, options, cast(type, found))
    if isinstance(found, (TaskFamily, MetaEnvironment, Algorithm, TrialAlgorithm, nn.Module)):
        if options:
            raise ConfigError(f"{key}: '{name}' is an object already and takes no {', '.join(options)}")
        return found
    if not callable(found):
        raise ConfigError(f"{key}.name: '{name}' is {found!r}; expected a class or a function")
    _check_arguments(key, found, options)
    if deferred:
        return functools.partial(found, **options)
    with explained(key, found):
        return found(**options)


def _check_arguments(key: str, callable_: Callable[..., Any], options: Mapping[str, Any]) -> None:
    try:
        signature = inspect.signature(callable_)
    except ValueError:  # some built-in functions have no signature
        return
    try:
        signature.bind(**options)
    except TypeError as error:
        raise ConfigError(f"{key}: {getattr(callable_, '__name__', callable_)}{signature}: {error}") from error


def import_path(path: str, key: str) -> object:
    """Import ``package.module:name``, with the working directory importable. Raises ConfigError that names ``key``."""
    if "" not in sys.path and str(Path.cwd()) not in sys.path:
        sys.path.insert(0, str(Path.cwd()))
    module, _, name = path.partition(":")
    try:
        imported = importlib.import_module(module)
    except ImportError as error:
        raise ConfigError(
            f"{key}: '{path}': {error}; modules are looked for in the working directory and on PYTHONPATH"
        ) from error
    except Exception as error:
        line = traceback.extract_tb(error.__traceback__)[-1]
        where = "" if isinstance(error, SyntaxError) else f" ({line.filename}, line {line.lineno})"
        raise ConfigError(f"{key}: '{path}' can't be imported: {type(error).__name__}: {error}{where}") from error
    if not hasattr(imported, name):
        names = [n for n in vars(imported) if not n.startswith("_")]
        raise ConfigError(f"{key}: module '{module}' has no '{name}'{nearest(name, names)}")
    return getattr(imported, name)


def model_factory(
    model: object, tasks: TaskFamily | MetaEnvironment, algorithm: Algorithm | TrialAlgorithm
) -> Callable[[], nn.Module]:
    """Return the function that builds the module for ``tasks``.

    ``model`` is an ``nn.Module`` (each call copies it), a ``ModelConfig``, a ``PolicyConfig`` (with a
    meta-environment), or a function that builds a module. Raises ConfigError where ``model`` is of another type or
    does not go with ``tasks``.
    """
    if isinstance(model, nn.Module):
        return functools.partial(_copy, model)
    if isinstance(tasks, MetaEnvironment):
        return _policy_factory(model, tasks)
    if not isinstance(model, type) and isinstance(model, ModelConfig) and isinstance(algorithm, Algorithm):
        if tasks.input_shape is None:
            raise ConfigError(
                f"tasks: {type(tasks).__name__} must state its input_shape for model '{type(model).__name__}'"
            )
        return functools.partial(model.build, tuple(tasks.input_shape), algorithm.outputs(tasks))
    if isinstance(model, PolicyConfig):
        raise ConfigError(
            f"model.name: '{type(model).__name__}' is a policy, which goes with environment, not with tasks"
        )
    if not callable(model):
        raise ConfigError(
            "model: expected a torch.nn.Module, a function that builds one, or a class with build(), got "
            f"{type(model).__name__}"
        )
    return model


def _policy_factory(model: object, environment: MetaEnvironment) -> Callable[[], nn.Module]:
    if not isinstance(model, PolicyConfig):
        fits = [name for name, cls in MODELS.items() if issubclass(cls, PolicyConfig)]
        raise ConfigError(
            f"model.name: '{type(model).__name__}' is no policy; with environment: {', '.join(sorted(fits))}, or a "
            "class "
            "of your own with build_policy()"
        )
    actions = environment.actions
    return functools.partial(
        model.build_policy, environment.observation_size, actions.size, isinstance(actions, Continuous)
    )


def _copy(module: nn.Module) -> nn.Module:
    return copy.deepcopy(module)


#: the keys that replace how a family judges predictions
JUDGES = ("loss", "metric", "task_metrics")
PER_EXAMPLE = "(prediction [N, …], target [N, …]) → one value per example [N]"
PER_TASK = "(prediction [N, …], target [N, …], mask [N]) → one number per task"


def judge_by(tasks: TaskFamily | MetaEnvironment, document: Mapping[str, Any]) -> None:
    """Give the family the loss, the metric and the metrics of whole tasks that ``document`` names."""
    given = {name: document[name] for name in JUDGES if document.get(name) is not None}
    if given and isinstance(tasks, MetaEnvironment):
        raise ConfigError(f"{', '.join(given)}: for supervised tasks; a meta-environment is judged by its returns")
    if "loss" in given:
        object.__setattr__(tasks, "loss", user_function(str(typed("loss", given["loss"], str)), "loss"))
    if "metric" in given:
        metric = given["metric"]
        chosen = settings("metric", {"name": metric} if isinstance(metric, str) else metric, MetricSettings)
        if chosen.name in BUILT_IN:
            raise ConfigError(
                f"metric: '{chosen.name}' is a metric of whole tasks, and metric is one of examples; give it as "
                f"task_metrics: [{chosen.name}]"
            )
        object.__setattr__(tasks, "metric", user_function(chosen.name, "metric"))
        object.__setattr__(tasks, "metric_name", chosen.name.partition(":")[2])
        object.__setattr__(tasks, "higher_is_better", chosen.higher_is_better)
    if "task_metrics" in given:
        names = cast("tuple[str, ...]", typed("task_metrics", given["task_metrics"], tuple[str, ...]))
        found = tuple(user_function(n, "task_metrics", PER_TASK) if ":" in n else n for n in names)
        object.__setattr__(tasks, "task_metrics", found)


def user_function(path: str, key: str, expected: str = PER_EXAMPLE) -> Callable[..., object]:
    """Import the loss or metric at ``path``. Raises ConfigError that names ``key`` where it is no function."""
    found = import_path(path, key)
    if not callable(found):
        raise ConfigError(f"{key}: '{path}' is {found!r}; expected a function {expected}")
    return found
