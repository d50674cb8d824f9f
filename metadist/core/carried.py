"""The interface of an algorithm with state that outlives a meta-step: a population of particles.

A particle is one run of an inner process that is longer than a meta-step: the training of a network by a learned
optimiser, a truncated unroll. Each meta-step advances every particle by a window, and the particle's state waits for
the next meta-step. ``outer.meta_batch_size`` is the size of the population.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar, Union

import torch
import torch.utils._pytree as pytree
from torch import Tensor

from metadist.core.algorithm import TaskContext, Theta
from metadist.core.engine import RELEASE, Engine
from metadist.core.errors import ConfigError
from metadist.core.model import BoundModel, InnerStep, Model
from metadist.core.parameters import Parameters
from metadist.core.random import TaskKey
from metadist.core.state import Slot
from metadist.core.task import Task, TaskFamily

ParticleState = Any
"""The state of one particle: a pytree of tensors with the same structure, shapes and dtypes in every meta-step."""


@dataclass(frozen=True)
class CarriedContribution:
    """One particle's contribution to a meta-step: a gradient (or statistic) by slot, its weight, and metrics by name.

    The outer update receives Σ weight · slots / Σ weight over the population; metrics (scalars) are averaged likewise.
    """

    slots: Mapping[str, Parameters]
    metrics: Mapping[str, Tensor]
    weight: Union[float, Tensor] = 1.0


pytree.register_pytree_node(
    CarriedContribution,
    lambda c: ([dict(c.slots), dict(c.metrics), c.weight], None),
    lambda values, _: CarriedContribution(*values),
    serialized_type_name="metadist.core.CarriedContribution",
)


def first_lifetimes(longest: int, keys: TaskKey) -> Tensor:
    """Return the lengths of the first lives of particles, 1 … ``longest``, so that later starts are spread."""
    return 1 + keys.stream("phase").integers(longest, 1).squeeze(-1)


def _not_here() -> Parameters:
    raise ConfigError("algorithm: context.fresh() builds a network and cannot run under vmap; call it in start")


@dataclass(frozen=True)
class CarriedContext(TaskContext):
    """Everything that an algorithm may know besides θ and the particle's state.

    ``key`` is of this meta-step and this particle: it keys noise and minibatches. ``life`` is of the meta-step in which
    the particle started: it keys all that stays the same until the next start. ``age`` is the number of meta-steps
    since then. ``task`` is the particle's task, drawn by ``life``; ``model`` is the network of the config, called as
    ``model(phi, x, step=index)``. In ``start``, ``fresh()`` returns its parameters, initialised by ``life``.
    """

    life: TaskKey = field(kw_only=True)
    age: Union[int, Tensor] = field(kw_only=True)
    task: Task = field(kw_only=True)
    model: BoundModel = field(kw_only=True)
    fresh: Callable[[], Parameters] = field(default=_not_here, kw_only=True)

    @property
    def particle(self) -> Tensor:
        """The particle's number in the population, a 0-d int64 tensor."""
        return self.key.tasks


class CarriedAlgorithm:
    """Subclass as a frozen dataclass (its fields are its config), and write ``lifetime``, ``start``, ``advance``,
    ``step`` and ``predict``.

    All methods are of one particle and draw random numbers from ``context.key`` or ``context.life``. ``advance``,
    ``step`` and ``predict`` run under ``torch.func.vmap`` over the particles of a shard (one after another where
    ``vectorized`` is false), and must not branch in Python on values of tensors. ``start`` and ``lifetime`` run for
    one particle at a time.
    """

    #: whether ``advance``, ``step`` and ``predict`` run under vmap; false for code that vmap does not support
    vectorized: ClassVar[bool] = True
    #: whether the particles of meta-step 0 start at random ages, so that later starts are spread over the meta-steps
    staggered: ClassVar[bool] = True
    #: whether ``engine.differentiation`` chooses how ``advance`` estimates its gradient (``engine/estimators.py``)
    estimated: ClassVar[bool] = False
    #: inner steps of an evaluation: more than in training, because a learned optimiser must go on beyond its window
    evaluation_steps: int = 100

    def release(self, engine: Engine) -> int:
        """Return the release of metadist's arithmetic that last changed the bits of this algorithm under ``engine``."""
        return RELEASE

    def slots(self, model: Model, parameters: Parameters) -> dict[str, tuple[Slot, Parameters]]:
        """Return the slots besides ``model``: name → (slot, initial values).

        An algorithm that learns no initial parameters returns ``model`` as a slot with rule ``constant``.
        """
        return {}

    def outputs(self, family: TaskFamily) -> int | None:
        """Return the number of outputs that the model needs, or None for an embedding of any size."""
        return family.outputs

    def compatible(self, family: TaskFamily, model: Model) -> str | None:
        """Return the reason why this algorithm cannot learn these tasks with this model, or None."""
        return None if model.has_forward else "the model has no forward(x)"

    def optimizer(self, theta: Theta, parameters: Iterable[Any]) -> torch.optim.Optimizer:
        """Return the learned optimiser of the parameters of a user's own network. ConfigError where there is none."""
        raise ConfigError(f"optimizer: algorithm '{type(self).__name__}' learns no optimiser")

    def lifetime(self, context: CarriedContext) -> int:
        """Return after how many meta-steps, 1 or more, the particle that starts now starts afresh, with another task.

        A pure function of ``context.key``, for example a length that is drawn from it.
        """
        raise NotImplementedError

    def start(self, theta: Theta, context: CarriedContext) -> ParticleState:
        """Return the state of a particle before its first inner step."""
        raise NotImplementedError

    def advance(
        self, theta: Theta, state: ParticleState, context: CarriedContext
    ) -> tuple[ParticleState, CarriedContribution]:
        """Return the state after one meta-step, without a gradient history, and the contribution to the outer update.

        The contribution has every slot with rule ``gradient`` or ``average``, and always the same metrics.
        """
        raise NotImplementedError

    def step(self, theta: Theta, state: ParticleState, context: CarriedContext, index: InnerStep) -> ParticleState:
        """Return the state after one inner step. An evaluation calls it ``evaluation_steps`` times from ``start``.

        ``index`` counts the inner steps under ``context.key`` from 0: ``context.key.stream(name, step=index)`` draws
        what this step needs.
        """
        raise NotImplementedError

    def predict(self, theta: Theta, state: ParticleState, x: Tensor, context: CarriedContext) -> Tensor:
        """Return the predictions [N, …] of the particle's network for the inputs ``x`` [N, …]."""
        raise NotImplementedError
