"""Adapt Meta-World's meta-learning benchmarks (Yu et al., CoRL 2019; version 3)."""

from __future__ import annotations

import os
import pickle
from contextlib import suppress
from dataclasses import dataclass
from functools import lru_cache
from importlib.metadata import version
from pathlib import Path
from tempfile import NamedTemporaryFile
from typing import Any, Literal
from zipfile import BadZipFile

import numpy as np
import torch

from metadist.core.errors import ConfigError, nearest, one_of
from metadist.core.random import TaskKey
from metadist.environments.simulated import OnError, SimulatedEnvironment, TaskValues
from metadist.rl.environment import Tasks
from metadist.storage.places import cache_root

#: a task's ``parameters``: three or six numbers, padded with zeros
WIDTH = 6

Listed = tuple[np.ndarray, np.ndarray]
"""The tasks of a split: their families [N] int64 and their parameters [N, WIDTH] float64."""


@dataclass(frozen=True, kw_only=True)
class MetaWorld(SimulatedEnvironment):
    """ML1 (one ``family``, goals differ), ML10 or ML45 (families differ, and goals). The goal is hidden.

    Train and test tasks are the benchmark's own lists for ``task_seed``, 50 goals for each family; the test tasks of
    ML10 and ML45 come from five families without training tasks. Meta-World has no validation split: here validation
    tasks have other goals of the training families. Lists of different ``task_seed`` have no goal in common
    (Meta-World's own neighbouring seeds do: the test goals of one are the training goals of the next).

    A task is ``family`` [B] int64 and ``parameters`` [B, 6] float64, the positions of goal and object. ``success`` is
    measured for reports; an episode succeeds where any of its steps does, and does not end there. ``horizon`` is 500 at
    most.
    """

    benchmark: Literal["ML1", "ML10", "ML45"] = "ML1"
    family: str = "reach-v3"
    task_seed: int = 0
    episodes: int = 2
    horizon: int = 500
    on_error: OnError = "retry"

    measures = ("success",)
    needs = ("gymnasium", "mujoco", "metaworld")
    extra = "metaworld"

    def __post_init__(self) -> None:
        self.check_settings()
        one_of("environment.benchmark", self.benchmark, ("ML1", "ML10", "ML45"))
        if self.horizon > 500:
            raise ConfigError(
                f"environment.horizon: {self.horizon} is above 500, the length of a Meta-World episode; expected "
                "1 to 500"
            )
        if not 0 <= self.task_seed < 1 << 30:
            raise ConfigError(f"environment.task_seed: {self.task_seed}; expected 0 to {(1 << 30) - 1}")

    @property
    def title(self) -> str:
        return f"Meta-World {self.benchmark}" + (f" {self.family}" if self.benchmark == "ML1" else "")

    def tasks_of(self, split: str) -> Listed:
        """Return all tasks of ``split``."""
        return listed(self.benchmark, families()[self.first_kind], self.task_seed, split)

    def prepare(self, device: torch.device) -> None:
        self.tasks_of("train")

    def sample(self, keys: TaskKey) -> Tasks:
        families, parameters = self.tasks_of(keys.split)
        chosen = keys.stream("task").integers(len(families), 1).squeeze(-1)
        index = chosen.cpu().numpy()
        return {
            n: torch.from_numpy(t[index]).to(chosen.device)
            for n, t in (("family", families), ("parameters", parameters))
        }

    @property
    def task_fields(self) -> tuple[str, ...]:
        return ("family", "parameters")

    @property
    def first_kind(self) -> int:
        self.check_installed()
        known = families()
        if self.family not in known:
            raise ConfigError(
                f"environment.family: '{self.family}' is not a family of Meta-World{nearest(self.family, known)}"
            )
        return known.index(self.family)

    def kind(self, task: TaskValues) -> int:
        return task["family"]

    def build(self, kind: int) -> Any:
        from metaworld import ALL_V3_ENVIRONMENTS

        return list(ALL_V3_ENVIRONMENTS.values())[kind]()

    def set_task(self, simulator: Any, task: TaskValues) -> None:
        from metaworld.types import Task as MetaWorldTask

        vector = task["parameters"][: simulator._random_reset_space.low.size]
        data = {"rand_vec": vector, "env_cls": type(simulator), "partially_observable": True}
        simulator.set_task(MetaWorldTask(families()[task["family"]], pickle.dumps(data)))

    def protocol(self, split: str) -> dict[str, Any]:
        about: dict[str, Any] = {
            "benchmark": self.benchmark,
            "task_seed": self.task_seed,
            "tasks_listed": len(self.tasks_of(split)[0]),
        }
        return {**super().protocol(split), **about, **({"family": self.family} if self.benchmark == "ML1" else {})}


def families() -> list[str]:
    """Return Meta-World's fifty families, in the order of their numbers."""
    from metaworld import ALL_V3_ENVIRONMENTS

    return list(ALL_V3_ENVIRONMENTS)


@lru_cache(maxsize=16)
def listed(benchmark: str, family: str, task_seed: int, split: str) -> Listed:
    """Return the tasks of ``split``, from a file in the cache if there is one: a list of ML45 takes half a minute."""
    of = family if benchmark == "ML1" else "all"
    name = f"metaworld-{version('metaworld')}-{benchmark}-{of}-{task_seed}-{split}.npz"
    folder = cache_root()
    with (
        suppress(OSError, EOFError, ValueError, KeyError, BadZipFile),
        np.load(folder / name, allow_pickle=False) as file,
    ):
        return file["families"], file["parameters"]
    made = _made(benchmark, family, task_seed, split)
    with suppress(OSError), NamedTemporaryFile(prefix=name, suffix=".npz", dir=_existing(folder), delete=False) as file:
        np.savez(file, families=made[0], parameters=made[1])
        file.flush()
        os.replace(file.name, folder / name)
    return made


def _existing(folder: Path) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    return folder


def _made(benchmark: str, family: str, task_seed: int, split: str) -> Listed:
    import metaworld

    # ML1 takes its test goals from the next seed: every task_seed has three seeds of its own.
    seed = 3 * task_seed + 2 * (split == "validation")
    made = metaworld.ML1(family, seed) if benchmark == "ML1" else getattr(metaworld, benchmark)(seed)
    tasks = made.test_tasks if split == "test" else made.train_tasks
    numbers, known = np.zeros(len(tasks), np.int64), families()
    parameters = np.zeros((len(tasks), WIDTH))
    for i, task in enumerate(tasks):
        vector = pickle.loads(task.data)["rand_vec"]
        numbers[i], parameters[i, : len(vector)] = known.index(task.env_name), vector
    return numbers, parameters
