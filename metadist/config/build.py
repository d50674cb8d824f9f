"""Build an experiment from a config document."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Sequence
from dataclasses import is_dataclass
from typing import Any, Union, cast

from metadist.config.catalog import ALGORITHM, ENVIRONMENT, MODEL, TASK_FAMILY
from metadist.config.components import component, judge_by, model_factory, named
from metadist.config.experiment import ALLOWED, Component, Experiment, setting_types
from metadist.config.schema import Document, as_plain, typed
from metadist.config.trust import allowed_modules, check_trust
from metadist.core.algorithm import Algorithm
from metadist.core.carried import CarriedAlgorithm
from metadist.core.errors import ConfigError, nearest
from metadist.core.model import Variants
from metadist.core.task import TaskFamily
from metadist.learners.base import AnyAlgorithm
from metadist.rl.algorithm import TrialAlgorithm
from metadist.rl.environment import MetaEnvironment


def build(document: Document, trust: Sequence[str] = ()) -> Experiment:
    """Check every key and build every part. ConfigError names the key, the value and the allowed values.

    The document is the user's own: it may name any module. ``trust``: modules whose functions may be called like those
    of the user's own modules.
    """
    key = _check_keys(document)
    tasks = _tasks(key, document, trust)
    algorithm = _algorithm(key, document["algorithm"], trust)
    options = dict(named("model", document["model"]))
    typed("model.freeze", options.pop("freeze", []), tuple[str, ...])
    typed("model.output", options.pop("output", None), Union[str, int, None])
    factory = model_factory(component("model", options, MODEL, deferred=True, trust=trust), tasks, algorithm)
    types = setting_types()
    given = {name: typed(name, document[name], types[name]) for name in types if document.get(name) is not None}
    return Experiment(
        tasks=Component(tasks, _described(key, document[key], tasks)),
        model=Component(factory, _described("model", document["model"], _owner(factory))),
        algorithm=Component(algorithm, _described("algorithm", document["algorithm"], algorithm)),
        **cast(Document, given),
    )


def build_foreign(document: Document, source: str, trust: Sequence[str] = ()) -> Experiment:
    """Build an experiment from a document that may be somebody else's: one of ``source``.

    Raises ConfigError, before anything is imported, where it names modules that are not in ``trust``.
    """
    check_trust(document, source, trust)
    return build(document, allowed_modules(trust))


def build_environment(document: Document, trust: Sequence[str] = ()) -> MetaEnvironment:
    """Build the meta-environment of a document and nothing else."""
    if "environment" not in document:
        raise ConfigError("key 'environment' is missing; expected environment: {name: …}")
    made = component("environment", document["environment"], ENVIRONMENT, trust=trust)
    if not isinstance(made, MetaEnvironment):
        raise ConfigError(f"environment.name: {type(made).__name__} is not a metadist.MetaEnvironment")
    return made


def _check_keys(document: Document) -> str:
    """Return the key of the tasks: ``tasks`` or ``environment``."""
    for name in document:
        if name not in ALLOWED:
            raise ConfigError(f"unknown key '{name}'{nearest(str(name), ALLOWED)}; allowed: {', '.join(ALLOWED)}")
    if "tasks" in document and "environment" in document:
        raise ConfigError("tasks, environment: give one of them: a family of supervised tasks, or a meta-environment")
    key = "environment" if "environment" in document else "tasks"
    for name in (key, "model", "algorithm"):
        if name not in document:
            other = " (or environment: {name: …})" if name == "tasks" else ""
            raise ConfigError(f"key '{name}' is missing; expected {name}: {{name: …}}{other}")
    return key


def _tasks(key: str, document: Document, trust: Sequence[str]) -> TaskFamily | MetaEnvironment:
    made: object
    if key == "environment":
        made = build_environment(document, trust)
    else:
        made = component("tasks", document["tasks"], TASK_FAMILY, trust=trust)
    if not isinstance(made, (TaskFamily, MetaEnvironment)):
        raise ConfigError(f"tasks.name: {type(made).__name__} is not a metadist.TaskFamily")
    if key == "tasks" and not isinstance(made, TaskFamily):
        raise ConfigError(
            f"tasks.name: {type(made).__name__} is a meta-environment; give it as environment: {{name: …}}"
        )
    judge_by(made, document, trust)
    return made


def _algorithm(key: str, given: Any, trust: Sequence[str]) -> AnyAlgorithm:
    wanted: tuple[type[AnyAlgorithm], ...] = (
        (TrialAlgorithm,) if key == "environment" else (Algorithm, CarriedAlgorithm)
    )
    made = component("algorithm", given, ALGORITHM, trust=trust)
    if not isinstance(made, wanted):
        fits = [name for name, cls in ALGORITHM.own.items() if issubclass(cls, wanted)]
        raise ConfigError(
            f"algorithm.name: {type(made).__name__} is not a metadist.{wanted[0].__name__}; with {key}: "
            f"{', '.join(sorted(fits))}, or your own"
        )
    return made


def _described(key: str, given: Any, made: Any) -> Document:
    """Return the document of a component with the defaults of its class filled in."""
    options = dict(named(key, given))
    return {"name": options.get("name"), **(as_plain(made) if is_dataclass(made) else options), **options}


def _owner(factory: Any) -> Any:
    """Return the model config whose method builds the module, or the factory itself."""
    if isinstance(factory, functools.partial) and inspect.ismethod(factory.func):
        return factory.func.__self__
    if isinstance(factory, Variants):
        return factory.owner
    return factory
