"""Find values that are no pure function of their key: compute them again under other conditions and compare the bits.

The dry run and ``metadist.testing`` share these functions.
"""

from __future__ import annotations

import random
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor

from metadist.core.differences import difference, flat
from metadist.core.errors import ConfigError
from metadist.core.task import Task
from metadist.core.tree import first

#: the global generators that code may draw from
GENERATORS = ("torch", "numpy.random", "random")
#: seeds under which the first uniform numbers of all global generators are below .05, and above .95: a branch that is
#: taken at random is taken under one of them
SALTS = (1208, 56)
#: relative to the largest value of a tensor: vectorised functions round by a task's place in the shard
ROUNDING = 1e-5
FROM_KEY = (
    "draw from key.generator() for one task, or from keys.stream(name); never from torch, numpy.random, random, time, "
    "os.urandom or hash(), and keep nothing from one call to the next"
)

Named = Mapping[str, Tensor]


class ImpureConfigError(ConfigError):
    """``subject`` lacks ``property``: a value is no pure function of its key. ``values`` show it."""

    def __init__(self, subject: str, property: str, values: str, remedy: str) -> None:
        super().__init__(f"{subject} {property}: {values}; {remedy}")
        self.property, self.values, self.remedy = property, values, remedy

    def __reduce__(self) -> tuple[type[ConfigError], tuple[str]]:
        return (ConfigError, (str(self),))


@contextmanager
def other_generators(salt: int, changed: Sequence[str] = GENERATORS) -> Iterator[None]:
    """Seed the ``changed`` global generators with ``salt``; restore all their states afterwards."""
    numpy = sys.modules.get("numpy.random")  # code that draws from NumPy has imported it
    before = random.getstate(), None if numpy is None else numpy.get_state()
    # CUDA is not started for its generators: a driver may have no need of it.
    devices = list(range(torch.cuda.device_count())) if torch.cuda.is_initialized() else []
    with torch.random.fork_rng(devices=devices):
        try:
            if "torch" in changed:
                torch.default_generator.manual_seed(salt)
                if devices:
                    torch.cuda.manual_seed_all(salt)
            if "numpy.random" in changed and numpy is not None:
                numpy.seed(salt)
            if "random" in changed:
                random.seed(salt)
            yield
        finally:
            random.setstate(before[0])
            if numpy is not None:
                numpy.set_state(before[1])


def impurity(compute: Callable[[], Named], first: Named | None = None, salts: Sequence[int] = SALTS) -> str | None:
    """Compute again under other states of the global generators; return a difference and its source, or None.

    ``first`` is an earlier result of ``compute``; without it, the first result is one under ``salts[-1]``.
    """
    if first is None:
        with other_generators(salts[-1]):
            first = compute()
        salts = salts[:-1]
    for salt in salts:
        with other_generators(salt):
            again = compute()
        if differs := difference(first, again):
            return f"{differs}, from {source_of(compute)}"
    return None


def source_of(compute: Callable[[], Named]) -> str:
    """Name the source of the differences between two calls of ``compute``."""

    def under(*changed: str) -> Named:
        with other_generators(SALTS[0]), other_generators(SALTS[1], changed):
            return compute()

    reference = under()
    if difference(reference, under()) is None:
        found = [name for name in GENERATORS if difference(reference, under(name))]
        if found:
            return f"the global generator of {' and of '.join(found)}"
    return "time, os.urandom, a generator without a seed, or values that are kept between calls"


def rows_of(task: Task, index: int) -> dict[str, Tensor]:
    """Return the real rows of one task of a stack; the padding depends on the shard."""
    found = dict[str, Tensor]()
    for name, e in (("support", task.support), ("query", task.query)):
        real = slice(None) if e.mask is None else e.mask[index].bool()
        found |= {n: t[index][real] for n, t in flat({f"{name}.x": e.x, f"{name}.y": e.y}).items()}
    return found if task.ways is None else {**found, "ways": task.ways[index]}


def differs_by_shard(
    sample: Callable[[Sequence[int]], Task], among: Task, others: Sequence[Sequence[int]], rounding: float = 0.0
) -> tuple[int, str] | None:
    """Sample the tasks of ``others`` (lists of indices); return the first that differs from its row of ``among``.

    ``among`` holds tasks 0, 1, …. The result is the task's index and the difference in words.
    """
    count = len(first(among.support.x))
    for some in others:
        there = sample(some)
        for row, index in enumerate(some):
            if differs := difference(rows_of(among, index), rows_of(there, row), rounding):
                return index, f"among tasks 0…{count - 1} and among {list(some)} {differs}"
    return None
