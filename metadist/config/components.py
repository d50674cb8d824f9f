"""Build tasks, environments, models and algorithms from their names and options."""

from __future__ import annotations

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

from metadist.config.schema import Document, explained, settings
from metadist.core.algorithm import Algorithm
from metadist.core.errors import ConfigError, nearest
from metadist.core.task import TaskFamily
from metadist.rl.algorithm import TrialAlgorithm
from metadist.rl.environment import Continuous, MetaEnvironment


def component_document(key: str, value: Any) -> Document:
    """Return the name and the options of a component, as a mapping of its own."""
    if isinstance(value, str):
        return {"name": value}
    if not isinstance(value, dict):
        raise ConfigError(f"{key}: expected {{name: …}}, got {value!r}")
    return dict(value)


def component(key: str, value: Any, known: Mapping[str, type], deferred: bool = False) -> Any:
    """An object named in a dict of ours or by ``package.module:Class``; ``deferred`` gives (class, arguments) for classes not ours."""
    options = component_document(key, value)
    name = options.pop("name", None)
    if not isinstance(name, str):
        raise ConfigError(
            f"{key}.name is missing; expected one of {', '.join(sorted(known))}, or package.module:Class of your own"
        )
    if ":" in name:
        cls = import_path(name, f"{key}.name")
    elif name in known:
        cls = known[name]
    else:
        raise ConfigError(
            f"{key}.name: '{name}' is not one of {', '.join(sorted(known))}{nearest(name, known)} (your own: package.module:Class)"
        )
    if is_dataclass(cls):
        return settings(key, options, cast(type, cls))
    if isinstance(cls, (TaskFamily, MetaEnvironment, Algorithm, TrialAlgorithm, nn.Module)):
        if options:
            raise ConfigError(f"{key}: '{name}' is an object already and takes no {', '.join(options)}")
        return cls
    if not callable(cls):
        raise ConfigError(f"{key}.name: '{name}' is {cls!r}; expected a class or a function")
    _check_arguments(key, cls, options)
    if deferred:
        return functools.partial(cls, **options)
    with explained(key, cls):
        return cls(**options)


def _check_arguments(key: str, callable_: Any, options: Mapping[str, Any]) -> None:
    try:
        signature = inspect.signature(callable_)
    except ValueError:  # some built-in ones have none
        return
    try:
        signature.bind(**options)
    except TypeError as error:
        raise ConfigError(f"{key}: {getattr(callable_, '__name__', callable_)}{signature}: {error}") from error


def import_path(path: str, key: str) -> Any:
    """``package.module:name``, with the working directory importable."""
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


def model_factory(model: Any, tasks: TaskFamily | MetaEnvironment, algorithm: Any) -> Callable[[], nn.Module]:
    if isinstance(model, nn.Module):
        return functools.partial(_itself, model)
    if isinstance(tasks, MetaEnvironment):
        if not hasattr(model, "build_policy"):
            from metadist.models import MODELS

            fits = [n for n, cls in MODELS.items() if hasattr(cls, "build_policy")]
            raise ConfigError(
                f"model.name: '{type(model).__name__}' is no policy; with environment: {', '.join(sorted(fits))}"
            )
        return functools.partial(
            model.build_policy, tasks.observation_size, tasks.actions.size, isinstance(tasks.actions, Continuous)
        )
    if not hasattr(model, "build") and hasattr(model, "build_policy"):
        raise ConfigError(
            f"model.name: '{type(model).__name__}' is a policy, which goes with environment, not with tasks"
        )
    if hasattr(model, "build"):
        if tasks.input_shape is None:
            raise ConfigError(
                f"tasks: {type(tasks).__name__} must state its input_shape for model '{type(model).__name__}'"
            )
        return functools.partial(model.build, tuple(tasks.input_shape), algorithm.outputs(tasks))
    if not callable(model):
        raise ConfigError(
            f"model: expected a torch.nn.Module, a function that builds one, or a class with build(), got {type(model).__name__}"
        )
    return model


def _itself(module: nn.Module) -> nn.Module:
    import copy

    return copy.deepcopy(module)


def user_function(path: str, key: str) -> Any:
    found = import_path(path, key)
    if not callable(found):
        raise ConfigError(
            f"{key}: '{path}' is {found!r}; expected a function (prediction [N, …], target [N, …]) → one value per example [N]"
        )
    return found
