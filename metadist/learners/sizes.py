"""The sizes of training tasks, and the compiled graphs that serve them."""

from __future__ import annotations

from collections.abc import Callable
from functools import cached_property

import torch.utils._pytree as pytree

from metadist.core.algorithm import Algorithm
from metadist.core.random import TaskKey
from metadist.core.task import Task, TaskFamily, with_rows
from metadist.core.tree import first
from metadist.engine.buckets import Buckets

#: groups of tasks of drawn sizes that are looked at for one of each size of a compiled graph
GROUPS_SEARCHED = 64


class Sizes:
    """The sizes of the training tasks that ``sample`` draws from ``tasks``, in shards of ``shard_size`` tasks."""

    def __init__(
        self, tasks: TaskFamily, algorithm: Algorithm, sample: Callable[[TaskKey], Task], shard_size: int
    ) -> None:
        self._tasks, self._algorithm, self._sample, self._shard_size = tasks, algorithm, sample, shard_size

    @cached_property
    def buckets(self) -> Buckets:
        """The sizes that tasks of drawn sizes are padded to in compiled shards."""
        return Buckets.of(self._tasks, self._algorithm)

    def several_graphs(self) -> str | None:
        """Return why few graphs cannot serve the tasks, or None."""
        if self._tasks.group_size("train") is not None:
            name = type(self._tasks).__name__
            unknown = f"'{name}' does not state possible_sizes(), from which few graphs are chosen"
            return None if self._tasks.possible_sizes("train") else unknown
        size = self._shard_size  # two shards tell
        one, other = (self._sample(TaskKey.of(0, "train", 0, range(i * size, i * size + size))) for i in (0, 1))
        shapes = [[t.shape for t in pytree.tree_leaves(task)] for task in (one, other)]
        alike = shapes[0] == shapes[1] and one.support.mask is None and one.query.mask is None
        return None if alike else "tasks differ in size, and each size would be compiled"

    def keys_of_graphs(self, seed: int) -> list[TaskKey]:
        """Return the keys of tasks that need every graph."""
        size = self._tasks.group_size("train")
        if size is None:
            return [TaskKey.of(seed, "train", 0, range(self._shard_size))]
        found = dict[tuple[int, int], TaskKey]()
        for index in range(GROUPS_SEARCHED):
            keys = TaskKey.of(seed, "train", 0, [index * size])
            task = self._sample(keys)
            rows = (first(e.y).shape[1] for e in (task.support, task.query))
            found.setdefault(self.buckets.rows(*rows), keys)
            if len(found) == len(self.buckets.sizes):
                break
        return list(found.values())

    def largest(self, keys: TaskKey) -> Task:
        """Return the tasks of ``keys``, padded to the largest size where sizes are drawn."""
        tasks = self._sample(keys)
        if self._tasks.group_size(keys.split) is None or (largest := self.buckets.largest) is None:
            return tasks
        return with_rows(tasks, *largest)
