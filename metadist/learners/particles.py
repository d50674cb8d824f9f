"""The particles of one shard: their tasks and states, stacked along a leading dimension, and the form that is kept."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.utils._pytree as pytree
from torch import Tensor

from metadist.core.algorithm import Theta
from metadist.core.carried import CarriedContext, ParticleState
from metadist.core.engine import Engine
from metadist.core.model import Model
from metadist.core.parameters import Parameters
from metadist.core.random import TaskKey
from metadist.core.state import Records
from metadist.core.task import Task, TaskFamily
from metadist.engine.meta_gradient import fixed


@dataclass(frozen=True)
class Particles:
    """``started`` and ``ends`` (int64 [P]): the meta-steps in which each particle started, and will start afresh.

    ``state`` is a pytree of tensors [P, …].
    """

    started: Tensor
    ends: Tensor
    state: ParticleState

    def records(self) -> Records:
        """Return the particles as records, one row per particle."""
        leaves = pytree.tree_leaves(self.state)
        return Records(
            {"started": self.started.cpu(), "ends": self.ends.cpu(), **{str(i): t for i, t in enumerate(leaves)}}
        )

    @classmethod
    def of(cls, records: Records, structure: pytree.TreeSpec) -> Particles:
        """Return what ``records()`` made of particles with a state of this ``structure``."""
        started, ends, *leaves = records.columns.values()
        return cls(started.cpu(), ends.cpu(), pytree.tree_unflatten(leaves, structure))

    def row(self, position: int) -> ParticleState:
        """Return the state of one particle."""
        return pytree.tree_map(lambda t: t[position], self.state)

    def ending(self, rows: Tensor, meta_step: int) -> Particles:
        """Let the particles of the mask ``rows`` [P] start afresh in ``meta_step``; their states become zero."""

        def cleared(t: Tensor) -> Tensor:
            return torch.where(rows.to(t.device).view(-1, *(1,) * (t.dim() - 1)), torch.zeros_like(t), t)

        ends = torch.where(rows.cpu(), torch.full_like(self.ends, meta_step), self.ends)
        return Particles(self.started, ends, pytree.tree_map(cleared, self.state))


@dataclass(frozen=True)
class Contexts:
    """Makes the contexts of particles: of one particle for ``start``, of stacked ones inside ``vmap``."""

    model: Model
    family: TaskFamily
    theta: Theta
    device: torch.device
    engine: Engine = Engine()

    def of(self, key: TaskKey, started: int | Tensor, meta_step: int, task: Task) -> CarriedContext:
        """Return the context of the single particle of ``key``; tensors may be those of a ``vmap``."""
        training = key.split == "train"
        life = replace(key, meta_step=started)
        return CarriedContext(
            key,
            meta_step,
            training,
            self.family,
            task_ways=task.ways,
            life=life,
            age=meta_step - started,
            task=task,
            model=self.model.bind(fixed(self.theta), key, training, self.engine),
        )

    def starting(self, key: TaskKey, meta_step: int, task: Task) -> CarriedContext:
        """Return the context of a particle that starts now; ``fresh()`` builds a network for it."""
        there = self.of(key.to(self.device), int(key.meta_step), meta_step, task)
        return replace(there, fresh=lambda: fresh_parameters(self.model, key).map(lambda t: t.to(self.device)))


def fresh_parameters(model: Model, life: TaskKey) -> Parameters:
    """Return the learned parameters of the network, initialised by the start of a particle's life."""
    low, high = (int(word) for word in life.words(network=2)[0])
    return model.initial(low | (high & 0x7FFFFFFF) << 32)[0]


def stacked(states: Sequence[ParticleState]) -> ParticleState:
    """Stack the states of single particles; ValueError where they differ in structure, shapes or dtypes."""
    spec = pytree.tree_structure(states[0])
    rows: list[list[Tensor]] = []
    for state in states:
        if pytree.tree_structure(state) != spec:
            raise ValueError("the states of two particles differ in structure; expected the same from every start")
        rows.append(pytree.tree_leaves(state))
    return pytree.tree_unflatten([torch.stack(list(leaves)) for leaves in zip(*rows)], spec)


def by_particle(function: Callable[..., Any], vectorized: bool) -> Callable[..., Any]:
    """Map ``function`` of single particles over stacked arguments: by ``vmap``, or one after another."""
    if vectorized:
        mapped: Callable[..., Any] = torch.func.vmap(function)
        return mapped

    def one_by_one(*arguments: Any) -> Any:
        return stacked([function(*row) for row in _rows(arguments)])

    return one_by_one


def _rows(arguments: tuple[Any, ...]) -> Iterator[tuple[Any, ...]]:
    for position in range(len(pytree.tree_leaves(arguments)[0])):
        yield pytree.tree_map(lambda t, position=position: t[position], arguments)
