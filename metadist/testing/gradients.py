"""References for a shard's contribution in float64: ordinary autograd task by task, and finite differences."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from metadist.core.algorithm import Phi, TaskContext, Theta
from metadist.core.differences import apart_by
from metadist.core.inner_loop import InnerLoop
from metadist.core.model import BoundModel
from metadist.core.parameters import Parameters
from metadist.core.random import TaskKey, seeded
from metadist.core.task import Task, alone
from metadist.learners.few_shot import FewShotLearner
from metadist.testing.failures import WrongGradientError
from metadist.testing.running import META_STEP, general_position, in_float64, keys

#: tasks that gradients are checked on
COUNT = 2
#: relative error of a contribution against ordinary autograd, in float64
ROUNDING = 1e-8
#: steps of finite differences, and the error that they may have relative to the gradient's norm
STEPS, TRUNCATION = (1e-5, 1e-6), 1e-5
DIRECTIONS = 1


def states_descent(learner: FewShotLearner) -> bool:
    """Return whether the algorithm states its inner loop by ``descent`` and leaves the steps to ``InnerLoop``."""
    return isinstance(learner.algorithm, InnerLoop) and learner.algorithm.overridden is None


def is_exact(learner: FewShotLearner) -> bool:
    """Return whether the contributions to some slots are gradients of the loss, and no first-order approximation."""
    return bool(learner.meta_gradient.learned) and not learner.algorithm.first_order


def by_autograd(learner: FewShotLearner, theta: Theta, some: TaskKey) -> tuple[dict[str, Tensor], float]:
    """Return Σ over tasks of each one's contribution by slot, and Σ of the losses: no vmap, no transform over θ.

    Where the algorithm states its inner loop by ``descent``, the inner gradients are ordinary autograd's too.
    """
    tasks, sums, losses = learner.sample(some), dict[str, Tensor](), 0.0
    for i, key in enumerate(some.each()):
        task = alone(tasks, i)
        values, loss = _one(learner, theta, key, task)
        losses += loss
        for name, value in values.items():
            vector = learner.slots[name].layout.flatten(value)
            sums[name] = sums[name] + vector if name in sums else vector
    return sums, losses


def _one(learner: FewShotLearner, theta: Theta, key: TaskKey, task: Task) -> tuple[dict[str, Parameters], float]:
    algorithm = learner.algorithm
    context = TaskContext(key, META_STEP, True, learner.tasks, task_ways=task.ways)
    learned = learner.meta_gradient.learned
    leaves = {n: p.map(lambda t: t.detach().clone()) for n, p in theta.items()}
    for name in learned:
        leaves[name].map(Tensor.requires_grad_)
    model = learner.bind(leaves, key, True)
    trajectory = _trajectory(learner, model, leaves, context, task)
    constant = pytree.tree_map(_detached, list(trajectory))
    own = {n: Parameters(p) for n, p in algorithm.contribute(model, theta, constant, task, context).items()}
    if not learned:
        loss = context.loss(algorithm.predict(model, trajectory[-1], task.query.x), task.query)
        return own, float(loss.detach())
    loss, _ = algorithm.objective(model, leaves, trajectory, task, context)
    tensors = [t for name in learned for t in leaves[name].values()]
    found = iter(torch.autograd.grad(loss, tensors))
    gradients = {n: Parameters({name: next(found) for name in leaves[n]}) for n in learned}
    return {**gradients, **own}, float(loss.detach())


def _detached(value: Any) -> Any:
    return value.detach() if isinstance(value, Tensor) else value


def _trajectory(
    learner: FewShotLearner, model: BoundModel, theta: Theta, context: TaskContext, task: Task
) -> Sequence[Phi]:
    """Compute φ_0 … φ_k as ``adapt`` returns them."""
    algorithm = learner.algorithm
    if not states_descent(learner) or not isinstance(algorithm, InnerLoop):
        return algorithm.adapt(model, theta, task.support, context)
    descent = algorithm.descent(model, theta, task.support, context)
    state = descent.start
    trajectory = [descent.finish(*state)]
    for step in range(algorithm.inner_steps):
        phi, moments = state
        # A first-order step differentiates at a constant φ, and its gradient is a constant.
        at = phi.map(lambda t: t.detach().requires_grad_()) if descent.first_order else phi.map(_tracked)
        found = torch.autograd.grad(
            descent.loss(at, step), list(at.values()), create_graph=not descent.first_order, allow_unused=True
        )
        gradient = Parameters({n: torch.zeros_like(at[n]) if g is None else g for n, g in zip(at, found)})
        if not descent.first_order:
            phi = at
        state = algorithm.update(phi, gradient, descent.rate, moments)
        trajectory.append(descent.finish(*state))
    return trajectory


def _tracked(t: Tensor) -> Tensor:
    return t if t.requires_grad else t.detach().requires_grad_()


def check_autograd(learner: FewShotLearner) -> None:
    """Check contributions in float64 against ordinary autograd, task by task."""
    exact = in_float64(learner)
    theta, some = general_position(exact), keys(0, COUNT)
    got = exact.contribute(theta, some, META_STEP)
    expected, loss = by_autograd(exact, theta, some)
    remedy = (
        "look for operations on several tasks together, for custom backward passes, and for detach() or in-place "
        "changes that vmap and ordinary autograd treat differently"
    )
    if differs := apart_by(got.slots, expected, ROUNDING):
        property = "its contributions equal those of ordinary autograd, task by task"
        raise WrongGradientError(learner, property, f"{differs} between the two", remedy)
    if not abs(got.metrics["loss"] - loss) <= ROUNDING * max(1.0, abs(loss)):
        raise WrongGradientError(
            learner,
            "the loss that it reports is that of its tasks, one by one",
            f"the sum over {COUNT} tasks is {got.metrics['loss']:.9g} in one shard and {loss:.9g} task by task",
            remedy,
        )


def check_finite_differences(learner: FewShotLearner) -> None:
    """Check contributions in float64 against differences of the loss that they report, in two directions of a slot."""
    exact = in_float64(learner)
    theta, some = general_position(exact), keys(0, COUNT)
    gradient = exact.contribute(theta, some, META_STEP).slots
    generator = seeded(0, "directions")
    for name in exact.meta_gradient.learned:
        size = float(gradient[name].norm())
        random = [torch.randn(gradient[name].shape, generator=generator).double() for _ in range(DIRECTIONS)]
        for direction in [gradient[name], *random]:
            unit = direction / (direction.norm() or 1.0)
            expected = float(gradient[name] @ unit)
            for h in STEPS:  # a kink of the loss within h spoils one difference, hardly two
                slope = _slope(exact, theta, some, name, unit, h)
                if abs(slope - expected) <= TRUNCATION * max(size, 1e-6):
                    break
            else:
                raise WrongGradientError(
                    learner,
                    f"its contribution to slot '{name}' is the gradient of the loss that it reports",
                    f"in float64 the slope along a direction is {expected:.6g} by the contribution and "
                    f"{slope:.6g} by finite differences (norm of the contribution: {size:.3g})",
                    "correct objective() or the custom backward pass; where terms are left out on purpose (a "
                    "first-order method), pass exact_gradient=False",
                )


def _slope(learner: FewShotLearner, theta: Theta, some: TaskKey, name: str, direction: Tensor, h: float) -> float:
    """Return the central difference of the loss along ``direction`` in slot ``name``."""
    layout = learner.slots[name].layout
    vector = layout.flatten(theta[name])

    def loss(shift: float) -> float:
        moved = {**theta, name: layout.unflatten(vector + shift * direction)}
        return learner.contribute(moved, some, META_STEP).metrics["loss"]

    return (loss(h) - loss(-h)) / (2 * h)
