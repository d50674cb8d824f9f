"""Run Python simulators behind the batched interface: the state of a batch is a list of simulators."""

from __future__ import annotations

import logging
import weakref
from collections import defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, fields
from functools import cached_property
from importlib import import_module
from importlib.metadata import version
from typing import Any, ClassVar, Literal

import numpy as np
import torch
from torch import Tensor

from metadist.core.errors import ConfigError, WorkerError, nearest, one_of
from metadist.core.random import TaskKey
from metadist.environments.spaces import Misbehaved, Spaces, number
from metadist.rl.environment import Actions, MetaEnvironment, Step, Tasks

log = logging.getLogger(__name__)

OnError = Literal["retry", "skip", "abort"]
TaskValues = dict[str, Any]
"""One task: numbers and arrays by field name."""


class EnvironmentFault(Exception):
    """An environment raised, or returned an invalid value. The message names the environment and the task."""


@dataclass(eq=False)
class RunningTrials:
    """A batch of B trials in progress: each trial's task, simulator, episode and step.

    ``clock`` counts the steps of the current episode. ``over`` marks episodes that have ended.
    """

    tasks: list[TaskValues]
    simulators: list[Any]
    measured: Any
    kinds: list[int]
    episode: list[int]
    clock: list[int]
    over: list[bool]
    #: trials that do not count, because their simulator failed
    broken: list[bool]


class SimulatedEnvironment(MetaEnvironment):
    """Subclass it as a frozen dataclass, and write ``sample``, ``build`` and ``set_task``.

    A simulator is an environment in Gymnasium's sense: ``reset(seed=…)`` and ``step(action)``. Its seed comes from the
    trial's noise, so a trial is a pure function of its key, provided that nothing after ``reset(seed=…)`` depends on
    earlier episodes: a simulator runs one trial after another. A simulator that raised is never used again.

    ``on_error`` says what follows where a simulator raises or returns an invalid step: ``retry`` (compute the shard
    once more; the same failure twice ends the run), ``skip`` (leave the trial out: none of its steps is valid) or
    ``abort`` (end the run immediately).
    """

    reset_noise = 2
    on_error: OnError = "retry"
    #: entries of a step's info that are measured for reports
    measures: tuple[str, ...] = ()
    #: required modules, and the extra that installs them
    needs: ClassVar[tuple[str, ...]] = ("gymnasium",)
    extra: ClassVar[str] = "rl"

    # A subclass writes these ------------------------------------------------------------------------------------------

    def build(self, kind: int) -> Any:
        """Return a new simulator for tasks of ``kind``."""
        raise NotImplementedError

    def set_task(self, simulator: Any, task: TaskValues) -> None:
        """Give ``task`` to the simulator, for all episodes until the next call."""
        raise NotImplementedError

    def kind(self, task: TaskValues) -> int:
        """Return the kind of simulator for ``task``; override it where one kind does not suit all tasks."""
        return 0

    @property
    def first_kind(self) -> int:
        """Return the kind of simulator whose spaces hold for all kinds."""
        return 0

    @cached_property
    def task_fields(self) -> tuple[str, ...]:
        """Return the names of a task's fields."""
        return tuple(self.sample(TaskKey.of(0, "train", 0, [0])))

    # Spaces and settings ----------------------------------------------------------------------------------------------

    @cached_property
    def spaces(self) -> Spaces:
        simulator = self._one(self.first_kind)
        self._idle[self.first_kind].append(simulator)
        return Spaces(
            self.title, getattr(simulator, "observation_space", None), getattr(simulator, "action_space", None)
        )

    @property
    def observation_size(self) -> int:
        return self.spaces.observation_size

    @property
    def actions(self) -> Actions:
        return self.spaces.actions

    def protocol(self, split: str) -> dict[str, Any]:
        return {**super().protocol(split), **{name: version(name) for name in self.needs}}

    def check_settings(self) -> None:
        """Check the settings that all subclasses have. Call it in ``__post_init__``."""
        one_of("environment.on_error", self.on_error, ("retry", "skip", "abort"))
        self.check_least(episodes=1, horizon=1)

    # Simulators: kept between trials, not sent to other processes ----------------------------------------------------

    @cached_property
    def _idle(self) -> defaultdict[int, list[Any]]:
        return defaultdict(list)

    def __getstate__(self) -> dict[str, Any]:
        return {f.name: getattr(self, f.name) for f in fields(self)}  # type: ignore[arg-type]

    def _one(self, kind: int) -> Any:
        if self._idle[kind]:
            return self._idle[kind].pop()
        self.check_installed()
        return self.build(kind)

    def check_installed(self) -> None:
        """Raise ConfigError where a required module is not installed."""
        for name in self.needs:
            try:
                import_module(name)
            except ModuleNotFoundError as error:
                raise ConfigError(
                    f"environment {self.title} needs {name}, which is not installed: "
                    f"pip install 'metadist[{self.extra}]'"
                ) from error

    # Trials -----------------------------------------------------------------------------------------------------------

    def reset(self, tasks: Tasks, noise: Tensor) -> tuple[RunningTrials, Tensor]:
        values = self._values(tasks)
        count = len(values)
        measured = np.full((count, len(self.measures)), np.nan, np.float32)
        state = RunningTrials(
            values, [None] * count, measured, [0] * count, [0] * count, [0] * count, [True] * count, [False] * count
        )
        weakref.finalize(state, _give_back, self._idle, state.kinds, state.simulators).atexit = False
        return state, self._begin(state, range(count), noise, np.zeros((count, self.observation_size), np.float32))

    def restart(
        self, tasks: Tasks, state: RunningTrials, observation: Tensor, ended: Tensor, noise: Tensor
    ) -> tuple[RunningTrials, Tensor]:
        shown = observation.cpu().numpy().copy()
        return state, self._begin(state, ended.nonzero().flatten().tolist(), noise, shown)

    def _begin(self, state: RunningTrials, rows: Iterable[int], noise: Tensor, shown: Any) -> Tensor:
        """Begin an episode in ``rows``; return ``shown`` [B, O] with their observations replaced."""
        words = (noise.double() * 2**24).long()
        seeds = (words[:, 0] * 2**24 + words[:, 1]).tolist()
        for row in rows:
            if state.broken[row]:
                continue
            try:
                if state.episode[row] == 0:
                    self._take(state, row)
                found = state.simulators[row].reset(seed=seeds[row])
                shown[row] = self.observed(_parts(found, "reset()", ("observation", "info"))[0])
                state.episode[row], state.clock[row], state.over[row] = state.episode[row] + 1, 0, False
            except Exception as error:
                self._broken(state, row, error)
        return torch.from_numpy(shown).to(noise.device)

    def _take(self, state: RunningTrials, row: int) -> None:
        state.kinds[row] = self.kind(state.tasks[row])
        simulator = self._one(state.kinds[row])
        self.set_task(simulator, state.tasks[row])
        state.simulators[row] = simulator

    def step(self, tasks: Tasks, state: RunningTrials, action: Tensor, noise: Tensor) -> Step:
        actions, count = self.spaces.taken(action.detach().cpu().numpy()), len(state.simulators)
        shown, reward = np.zeros((count, self.observation_size), np.float32), np.zeros(count, np.float32)
        terminated = np.array(state.over)
        state.measured.fill(np.nan)
        for row in range(count):
            if not state.over[row]:
                try:
                    reward[row], terminated[row] = self._advance(state, row, actions[row], shown[row])
                except Exception as error:
                    self._broken(state, row, error)
                    terminated[row] = True
        measured = {
            name: torch.from_numpy(state.measured[:, i].copy()).to(action.device)
            for i, name in enumerate(self.measures)
        }
        observation, rewards, ends = (torch.from_numpy(t).to(action.device) for t in (shown, reward, terminated))
        return Step(state, observation, rewards, ends, measured)

    def _advance(self, state: RunningTrials, row: int, action: Any, shown: Any) -> tuple[float, bool]:
        """Step one trial: return its reward and whether the episode ended; write the observation to ``shown`` [O]."""
        found = _parts(
            state.simulators[row].step(action), "step()", ("observation", "reward", "terminated", "truncated", "info")
        )
        observation, reward, terminated, truncated, info = found
        state.clock[row] += 1
        shown[:] = self.observed(observation)
        ended = bool(terminated) or bool(truncated)
        state.over[row] = ended or state.clock[row] >= self.horizon
        for i, name in enumerate(self.measures):
            if name in info:
                state.measured[row, i] = number(info[name], f"info['{name}']")
        return self._finite(number(reward, "the reward"), "the reward"), ended

    def observed(self, observation: Any) -> Any:
        """Return the policy's observation: an array [O]."""
        return self._finite(self.spaces.observed(observation), "the observation")

    def _finite(self, value: Any, what: str) -> Any:
        # With ``retry`` the rollout refuses NaN, and names the tasks' numbers.
        if self.on_error != "retry" and not np.isfinite(value).all():
            raise Misbehaved(f"{what} has NaN or Inf; expected finite numbers")
        return value

    def left_out(self, state: RunningTrials) -> Tensor | None:
        return torch.tensor(state.broken) if any(state.broken) else None

    def _broken(self, state: RunningTrials, row: int, error: Exception) -> None:
        """Act on a failure as ``on_error`` says. The simulator's state is unknown, so it is not used again."""
        if isinstance(error, ConfigError):
            raise error
        state.simulators[row], state.over[row], state.broken[row] = None, True, True
        what = str(error) if isinstance(error, Misbehaved) else f"raised {type(error).__name__}: {error}"
        where = (
            f"episode {state.episode[row]}, after {state.clock[row]} steps"
            if state.episode[row]
            else "before its first step"
        )
        message = f"environment {self.title}, task {as_text(state.tasks[row])}, {where}: {what}"
        if self.on_error == "abort":
            raise WorkerError(f"{message} (environment.on_error: abort)") from error
        if self.on_error == "retry":
            raise EnvironmentFault(message) from error
        log.warning("%s; the trial is left out", message)

    def _values(self, tasks: Tasks) -> list[TaskValues]:
        """Split a batch of tasks into single tasks of numbers and arrays."""
        known = self.task_fields
        for name in tasks:
            if name not in known:
                raise ConfigError(
                    f"unknown task field '{name}'{nearest(name, known)}; a task of {self.title} has: {', '.join(known)}"
                )
        for name in known:
            if name not in tasks:
                raise ConfigError(f"task field '{name}' is missing; a task of {self.title} has: {', '.join(known)}")
        columns = {name: value.cpu().numpy() for name, value in tasks.items()}
        count = len(next(iter(columns.values())))
        return [
            {n: c[row].item() if c.ndim == 1 else c[row].copy() for n, c in columns.items()} for row in range(count)
        ]


def _give_back(idle: defaultdict[int, list[Any]], kinds: list[int], simulators: list[Any]) -> None:
    for kind, simulator in zip(kinds, simulators):
        if simulator is not None:
            idle[kind].append(simulator)


def _parts(found: Any, call: str, expected: tuple[str, ...]) -> Any:
    if not isinstance(found, tuple) or len(found) != len(expected):
        got = f"{len(found)} values" if isinstance(found, tuple) else f"a {type(found).__name__}"
        raise Misbehaved(f"{call} returned {got}; expected ({', '.join(expected)})")
    if not isinstance(found[-1], Mapping):
        raise Misbehaved(f"the info of {call} is a {type(found[-1]).__name__}; expected a dict")
    return found


def as_text(task: TaskValues) -> str:
    """Return the task as text for messages."""
    return (
        "{"
        + ", ".join(f"{n}: {np.array2string(np.asarray(v), precision=6, threshold=12)}" for n, v in task.items())
        + "}"
    )
