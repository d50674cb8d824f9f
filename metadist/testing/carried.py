"""A population of particles in plain Python, the reference for the carried learner, and an algorithm to try it on."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from metadist.core.algorithm import Theta
from metadist.core.carried import CarriedAlgorithm, CarriedContext, CarriedContribution
from metadist.core.engine import Engine
from metadist.core.model import InnerStep, Model
from metadist.core.parameters import Layout, Parameters
from metadist.core.random import TaskKey
from metadist.core.state import Slot
from metadist.core.task import Task, TaskFamily
from metadist.engine.meta_gradient import fixed
from metadist.learners.particles import fresh_parameters


@dataclass
class Particle:
    """One particle: the meta-step in which it started, the one in which it starts afresh, and its state."""

    started: int
    ends: int
    state: Any


class Population:
    """Particles 0 … ``size`` − 1 of ``algorithm``, which advance one after another: no vmap, no shards, no driver."""

    def __init__(
        self,
        algorithm: CarriedAlgorithm,
        model: Model,
        family: TaskFamily,
        *,
        size: int = 1,
        seed: int = 0,
        engine: Engine = Engine(),
    ) -> None:
        self.engine = engine
        self.algorithm, self.model, self.family, self.size, self.seed = algorithm, model, family, size, seed
        self.particles: dict[int, Particle] = {}

    def context(
        self, theta: Theta, particle: int, meta_step: int, started: int, split: str = "train"
    ) -> CarriedContext:
        """Return the context of ``particle`` in ``meta_step``, which started in meta-step ``started``."""
        key = TaskKey.of(self.seed, split, meta_step, [particle]).each()[0]
        alone = TaskKey.of(self.seed, split, started, [particle])
        task: Task = pytree.tree_map(lambda t: t[0], self.family.sample(alone, split))
        task = task.to(torch.device("cpu"), self.model.dtype)
        model = self.model.variant(split, particle)
        return CarriedContext(
            key,
            meta_step,
            split == "train",
            self.family,
            task_ways=task.ways,
            life=alone.each()[0],
            age=meta_step - started,
            task=Task(task.support.cleared(), task.query.cleared(), task.ways),
            model=model.bind(fixed(theta), key, split == "train", self.engine),
            fresh=partial(fresh_parameters, model, alone.each()[0]),
        )

    def advance(self, theta: Theta, meta_step: int) -> list[CarriedContribution]:
        """Advance every particle by one meta-step, from meta-step 0 on, and return its contribution."""
        return [self._advanced(theta, number, meta_step) for number in range(self.size)]

    def _advanced(self, theta: Theta, number: int, meta_step: int) -> CarriedContribution:
        particle = self.particles.get(number)
        if particle is None or particle.ends <= meta_step:
            context = self.context(theta, number, meta_step, meta_step)
            life = self.algorithm.lifetime(context)
            if particle is None and self.algorithm.staggered:
                life = 1 + int(context.key.stream("phase").integers(life, 1))
            particle = Particle(meta_step, meta_step + life, self.algorithm.start(theta, context))
            self.particles[number] = particle
        context = self.context(theta, number, meta_step, particle.started)
        state, contribution = self.algorithm.advance(theta, particle.state, context)
        particle.state = pytree.tree_map(torch.Tensor.detach, state)
        return contribution


@dataclass(frozen=True)
class LearnedRate(CarriedAlgorithm):
    """Learn the rate of gradient descent by truncated unrolls: the smallest algorithm with carried state.

    θ is the logarithm of the rate. A meta-step takes ``window`` inner steps and contributes the gradient of the mean
    query loss after each of them, with the state before the window as a constant; a life is ``windows`` meta-steps
    long. ``ballast`` is a number of floats that every state carries along, to measure the transport of large states.
    """

    window: int = 2
    windows: int = 4
    rate: float = 0.02
    ballast: int = 0
    evaluation_steps: int = 12

    def slots(self, model: Model, parameters: Parameters) -> dict[str, tuple[Slot, Parameters]]:
        dtype = next(iter(parameters.values())).dtype
        rate = Parameters({"log_rate": torch.tensor(self.rate, dtype=dtype).log()})
        return {"model": (Slot(Layout.of(parameters), "constant"), parameters), "rate": (Slot(Layout.of(rate)), rate)}

    def lifetime(self, context: CarriedContext) -> int:
        return self.windows

    def start(self, theta: Theta, context: CarriedContext) -> dict[str, Any]:
        state: dict[str, Any] = {"phi": context.fresh(), "steps": torch.zeros((), dtype=torch.int64)}
        if self.ballast:
            state["ballast"] = context.life.stream("ballast").uniform(self.ballast)
        return state

    def step(self, theta: Theta, state: dict[str, Any], context: CarriedContext, index: InnerStep) -> dict[str, Any]:
        def loss(phi: Parameters) -> Tensor:
            return context.loss(context.model(phi, context.task.support.x, step=index), context.task.support)

        phi = state["phi"] - theta["rate"]["log_rate"].exp() * torch.func.grad(loss)(state["phi"])
        return {**state, "phi": phi, "steps": state["steps"] + 1}

    def predict(self, theta: Theta, state: dict[str, Any], x: Tensor, context: CarriedContext) -> Tensor:
        prediction: Tensor = context.model(state["phi"], x)
        return prediction

    def advance(
        self, theta: Theta, state: dict[str, Any], context: CarriedContext
    ) -> tuple[dict[str, Any], CarriedContribution]:
        def objective(rate: Parameters) -> tuple[Tensor, Any]:
            reached, losses = state, []
            for index in range(self.window):
                reached = self.step({**theta, "rate": rate}, reached, context, index)
                prediction = self.predict(theta, reached, context.task.query.x, context)
                losses.append(context.loss(prediction, context.task.query))
            return torch.stack(losses).mean(), (reached, losses[-1])

        gradient, (reached, last) = torch.func.grad(objective, has_aux=True)(theta["rate"])
        reached = pytree.tree_map(torch.Tensor.detach, reached)
        return reached, CarriedContribution({"rate": gradient}, {"loss": last.detach()})
