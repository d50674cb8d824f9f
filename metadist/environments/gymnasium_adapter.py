"""Adapt any Gymnasium environment that has ``sample_tasks`` and ``set_task``."""

from __future__ import annotations

import inspect
import os
import sys
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cached_property
from importlib import import_module
from typing import Any

import numpy as np
import torch

from metadist.core.errors import ConfigError, nearest
from metadist.core.imports import split_path
from metadist.core.random import TaskKey
from metadist.environments.simulated import OnError, SimulatedEnvironment, TaskValues, as_text
from metadist.rl.environment import Tasks

#: the field name of a task that is not a dict
ONLY = "task"


@dataclass(frozen=True, kw_only=True)
class Gymnasium(SimulatedEnvironment):
    """A meta-environment of the user's Gymnasium 1.x environment.

    ``make`` is ``package.module:function``. Called with ``arguments``, the function returns an environment with

    - ``sample_tasks(count, generator)`` → ``count`` tasks, sampled from ``generator`` (numpy.random.Generator) alone.
      The method can also take ``split``, to separate train, validation and test tasks. For the older form
      ``sample_tasks(count)``, the environment's own ``np_random`` and ``numpy.random`` are keyed by the task. A task
      is a number, an array, or a dict of both, always with the same fields and shapes.
    - ``set_task(task)``, for a task as it was sampled.
    - ``reset(seed=…)``, after which nothing depends on earlier episodes.

    ``measures`` are entries of a step's info that are measured for reports.
    """

    make: str = field(default="", metadata={"imports": "a function that returns a Gymnasium environment"})
    arguments: dict[str, Any] = field(default_factory=dict)
    episodes: int = 2
    horizon: int = 200
    on_error: OnError = "retry"
    measures: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        self.check_settings()
        if split_path(self.make) is None:
            raise ConfigError(
                f"environment.make: '{self.make}'; expected package.module:function, a function that returns a "
                "Gymnasium environment"
            )

    @property
    def title(self) -> str:
        return self.make

    @cached_property
    def task_fields(self) -> tuple[str, ...]:
        return tuple(self._template)

    @cached_property
    def _template(self) -> TaskValues:
        """Return the first task; all others must have its fields and shapes."""
        return self._drawn(TaskKey.of(0, "train", 0, [0]))[0]

    def build(self, kind: int) -> Any:
        module, _, name = self.make.partition(":")
        if "" not in sys.path and os.getcwd() not in sys.path:
            sys.path.insert(0, os.getcwd())
        try:
            imported = import_module(module)
        except ImportError as error:
            raise ConfigError(
                f"environment.make: '{self.make}': {error}; expected a module in the working directory or on PYTHONPATH"
            ) from error
        if not callable(maker := getattr(imported, name, None)):
            raise ConfigError(
                f"environment.make: module '{module}' has no function '{name}'{nearest(name, vars(imported))}"
            )
        try:
            made = maker(**self.arguments)
        except Exception as error:
            raise ConfigError(
                f"environment.make: {self.make}({_listed(self.arguments)}) raised {type(error).__name__}: {error}"
            ) from error
        for method in ("reset", "step", "sample_tasks", "set_task"):
            if not callable(_attribute(made, method)):
                raise ConfigError(f"environment.make: {self.make} made a {type(made).__name__} without {method}()")
        return made

    def set_task(self, simulator: Any, task: TaskValues) -> None:
        _attribute(simulator, "set_task")(task[ONLY] if set(task) == {ONLY} else task)

    def sample(self, keys: TaskKey) -> Tasks:
        template = self._template
        drawn = self._drawn(keys)
        for task in drawn:
            self._check(task, template)
        return {
            n: torch.from_numpy(np.stack([np.asarray(task[n]) for task in drawn])).to(keys.tasks.device)
            for n in template
        }

    def _drawn(self, keys: TaskKey) -> list[TaskValues]:
        """Sample one task for each key, each from its own generator."""
        simulator = self._one(0)
        sample = _attribute(simulator, "sample_tasks")
        taken = inspect.signature(sample).parameters
        found = []
        for words in keys.stream("task").bits(4).cpu().tolist():
            generator = np.random.default_rng(words)
            with _keyed_generators(simulator, generator, words):
                options = {n: v for n, v in (("generator", generator), ("split", keys.split)) if n in taken}
                try:
                    (task,) = sample(1, **options)
                except Exception as error:
                    raise ConfigError(
                        f"environment {self.title}: sample_tasks(1) raised {type(error).__name__}: {error}; expected "
                        "one task"
                    ) from error
            found.append(self._as_data(task))
        self._idle[0].append(simulator)
        return found

    def _as_data(self, task: Any) -> TaskValues:
        parts = dict(task) if isinstance(task, Mapping) else {ONLY: task}
        for name, value in parts.items():
            array = np.asarray(value)
            if not isinstance(name, str) or array.dtype.kind not in "fiub":
                raise ConfigError(
                    f"environment {self.title}: a task's field {name!r} is {str(value)[:80]!r}; expected a number or "
                    "an array of numbers"
                )
        if not parts:
            raise ConfigError(
                f"environment {self.title}: a task has no fields; expected a number, an array, or a dict of both"
            )
        return {name: np.asarray(value) for name, value in parts.items()}

    def _check(self, task: TaskValues, template: TaskValues) -> None:
        for name in task:
            if name not in template:
                raise ConfigError(
                    f"environment {self.title}: unknown task field '{name}'{nearest(name, template)}; the first task "
                    f"has: {_listed(template)}"
                )
        for name, first in template.items():
            if name not in task:
                raise ConfigError(
                    f"environment {self.title}: task field '{name}' is missing in {as_text(task)}; the first task has: "
                    f"{_listed(template)}"
                )
            if task[name].shape != first.shape or task[name].dtype != first.dtype:
                raise ConfigError(
                    f"environment {self.title}: task field '{name}' is {task[name].dtype} {list(task[name].shape)}, "
                    f"and was {first.dtype} {list(first.shape)} in the first task"
                )

    def protocol(self, split: str) -> dict[str, Any]:
        return {**super().protocol(split), "make": self.make, "arguments": self.arguments}


def _attribute(environment: Any, name: str) -> Any:
    """Return an attribute of the environment or of one that it wraps (Gymnasium's wrappers forward no attributes)."""
    while environment is not None:
        if hasattr(environment, name):
            return getattr(environment, name)
        environment = getattr(environment, "env", None)
    return None


@contextmanager
def _keyed_generators(simulator: Any, generator: np.random.Generator, words: list[int]) -> Iterator[None]:
    """Key the environment's own generator and NumPy's global one by the task."""
    inner = getattr(simulator, "unwrapped", simulator)
    before = np.random.get_state()
    np.random.seed(words)
    if hasattr(type(inner), "np_random"):
        inner.np_random = generator
    try:
        yield
    finally:
        np.random.set_state(before)


def _listed(names: Iterable[str]) -> str:
    return ", ".join(names)
