"""Build tasks, environments, models and algorithms from their names and options."""

from __future__ import annotations

import copy
import functools
import inspect
from collections.abc import Callable, Mapping, Sequence
from dataclasses import fields, is_dataclass
from typing import Any, cast

from torch import nn

from metadist.config.catalog import resolve
from metadist.config.plugins import Kind
from metadist.config.schema import Document, explained, settings, typed
from metadist.config.settings import MetricSettings
from metadist.core.carried import CarriedAlgorithm
from metadist.core.errors import ConfigError
from metadist.core.imports import author, home_of, import_path, split_path, within
from metadist.core.task import TaskFamily
from metadist.core.task_metrics import BUILT_IN
from metadist.learners.base import AnyAlgorithm
from metadist.models import MODELS, ModelConfig, PolicyConfig, VariantsConfig
from metadist.rl.algorithm import TrialAlgorithm
from metadist.rl.environment import Continuous, MetaEnvironment


def named(key: str, value: object) -> Document:
    """Return the mapping ``{name: …}`` that a component's section is; a bare name is short for it."""
    if isinstance(value, str):
        return {"name": value}
    if not isinstance(value, dict):
        raise ConfigError(f"{key}: expected {{name: …}}, got {value!r}")
    return value


def component(key: str, value: object, kind: Kind[type], deferred: bool = False, trust: Sequence[str] = ()) -> object:
    """Build the object that ``value`` names: by a name of metadist or of a plug-in, or by ``package.module:Class``.

    ``deferred``: a class that is no dataclass is not called; the result is a ``functools.partial`` of it. ``trust``:
    modules whose functions may be called like those of the user. Raises ConfigError that names ``key``, the value and
    what is expected.
    """
    options = dict(named(key, value))
    name = options.pop("name", None)
    if not isinstance(name, str):
        raise ConfigError(
            f"{key}.name is missing; expected one of {', '.join(sorted(kind.own))}, or package.module:Class of your own"
        )
    found = _own(name, f"{key}.name", kind, trust) if ":" in name else resolve(f"{key}.name", name, kind)
    if is_dataclass(found) and inspect.isclass(found):
        _check_imports(key, options, found, trust)
        return settings(key, options, cast(type, found))
    if isinstance(found, kind.makes):
        if options:
            raise ConfigError(f"{key}: '{name}' is an object already and takes no {', '.join(options)}")
        return found
    maker = cast(Callable[..., object], found)
    _check_arguments(key, maker, options)
    if deferred:
        return functools.partial(maker, **options)
    with explained(key, maker):
        return maker(**options)


def _own(path: str, key: str, kind: Kind[type], trust: Sequence[str]) -> object:
    """Import a part of the user's own, and check before anything is called that it is of the kind.

    Raises ConfigError unless it is a class that ``kind`` accepts, an object of ``kind.makes``, or a function of
    the user's own that may make one.
    """
    found = import_path(path, key)
    if isinstance(found, kind.makes):
        return found
    if inspect.isclass(found) and kind.accepts(found):
        if not issubclass(found, kind.makes):
            _check_author(found, path, key, (*trust, "metadist"))
        return found
    if inspect.isclass(found):
        raise ConfigError(f"{key}: '{path}' is the class {found.__name__}; expected {kind.expected}")
    return _own_function(found, path, key, "a class or a function", trust)


def _own_function(found: object, path: str, key: str, expected: str, trust: Sequence[str]) -> Callable[..., object]:
    """Return ``found`` if it is callable and the user's own. Raises ConfigError that names ``key`` elsewhere."""
    if not callable(found) or inspect.isclass(found):
        raise ConfigError(f"{key}: '{path}' is {found!r}; expected {expected}")
    _check_author(found, path, key, trust)
    return found


def _check_author(found: object, path: str, key: str, trust: Sequence[str]) -> None:
    """Raise ConfigError unless the user, or a module in ``trust``, defines ``found``."""
    home = home_of(found, path)
    if author(home) != "user" and not within(home, trust):
        raise ConfigError(
            f"{key}: '{path}' is defined by {home}, and a config may call functions of your own alone; wrap it in a "
            "function of a module in the working directory or on PYTHONPATH (a package that requires metadist is your "
            "own, too)"
        )


def _check_imports(key: str, options: Mapping[str, Any], cls: type, trust: Sequence[str]) -> None:
    """Check the options of a dataclass that are import paths themselves, by the metadata ``imports`` of their field."""
    for each in fields(cls):
        path = options.get(each.name)
        if "imports" in each.metadata and isinstance(path, str) and split_path(path):
            where = f"{key}.{each.name}"
            found = import_path(path, where)
            if inspect.isclass(found):
                _check_author(found, path, where, trust)
            else:
                _own_function(found, path, where, str(each.metadata["imports"]), trust)


def _check_arguments(key: str, callable_: Callable[..., Any], options: Mapping[str, Any]) -> None:
    try:
        signature = inspect.signature(callable_)
    except ValueError:  # some built-in functions have no signature
        return
    try:
        signature.bind(**options)
    except TypeError as error:
        raise ConfigError(f"{key}: {getattr(callable_, '__name__', callable_)}{signature}: {error}") from error


def model_factory(
    model: object, tasks: TaskFamily | MetaEnvironment, algorithm: AnyAlgorithm
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
    if not isinstance(model, type) and isinstance(model, ModelConfig) and not isinstance(algorithm, TrialAlgorithm):
        if tasks.input_shape is None:
            raise ConfigError(
                f"tasks: {type(tasks).__name__} must state its input_shape for model '{type(model).__name__}'"
            )
        shape, outputs = tuple(tasks.input_shape), algorithm.outputs(tasks)
        if not isinstance(model, VariantsConfig):
            return functools.partial(model.build, shape, outputs)
        if isinstance(algorithm, CarriedAlgorithm):
            return model.variants(shape, outputs)
        raise ConfigError(
            f"model.name: '{type(model).__name__}' has another shape for each task, and algorithm "
            f"'{type(algorithm).__name__}' learns one network for all; use a learned optimiser, or model mlp"
        )
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
            "class of your own with build_policy()"
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


def judge_by(tasks: TaskFamily | MetaEnvironment, document: Mapping[str, Any], trust: Sequence[str] = ()) -> None:
    """Give the family the loss, the metric and the metrics of whole tasks that ``document`` names."""
    given = {name: document[name] for name in JUDGES if document.get(name) is not None}
    if given and isinstance(tasks, MetaEnvironment):
        raise ConfigError(f"{', '.join(given)}: for supervised tasks; a meta-environment is judged by its returns")
    if "loss" in given:
        object.__setattr__(tasks, "loss", user_function(str(typed("loss", given["loss"], str)), "loss", trust))
    if "metric" in given:
        metric = given["metric"]
        chosen = settings("metric", {"name": metric} if isinstance(metric, str) else metric, MetricSettings)
        if chosen.name in BUILT_IN:
            raise ConfigError(
                f"metric: '{chosen.name}' is a metric of whole tasks, and metric is one of examples; give it as "
                f"task_metrics: [{chosen.name}]"
            )
        object.__setattr__(tasks, "metric", user_function(chosen.name, "metric", trust))
        object.__setattr__(tasks, "metric_name", chosen.name.partition(":")[2])
        object.__setattr__(tasks, "higher_is_better", chosen.higher_is_better)
    if "task_metrics" in given:
        names = cast("tuple[str, ...]", typed("task_metrics", given["task_metrics"], tuple[str, ...]))
        found = tuple(user_function(n, "task_metrics", trust, PER_TASK) if ":" in n else n for n in names)
        object.__setattr__(tasks, "task_metrics", found)


def user_function(path: str, key: str, trust: Sequence[str] = (), expected: str = PER_EXAMPLE) -> Callable[..., object]:
    """Import the loss or metric at ``path``. Raises ConfigError that names ``key`` where it is no function."""
    return _own_function(import_path(path, key), path, key, f"a function {expected}", trust)
