"""Differentiate through the minimum of an inner loss g(φ, θ), without the path to it.

With A = ∂²g/∂φ² + δ I at φ and v = ∂F/∂φ of an objective F, the implicit function theorem gives the gradient
dF/dθ = ∂F/∂θ − (∂²g/∂φ∂θ)ᵀ A⁻¹ v (Rajeswaran et al. 2019, lemma 1; Lorraine et al. 2020, section 3). Products with A
alone solve A x = v, by a fixed number of iterations. All functions are of one task, under ``vmap``.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol, TypeVar, Union

import torch
from torch import Tensor
from torch.func import grad

from metadist.core.algorithm import Theta
from metadist.core.engine import Hessian
from metadist.core.inner_loop import Descent, Implicit, InnerLoop
from metadist.core.parameters import Parameters
from metadist.engine.functions import jvp, vjp

T = TypeVar("T")
StepIndex = Union[int, Tensor]
"""An inner step: an int, or a 0-d int64 tensor in compiled shards."""
Held = dict[str, Parameters]
"""Slot → the tensors of θ that the inner loss depends on, or their gradients."""
Iterate = tuple[Parameters, Parameters, Parameters]
"""The solution x so far, its residual v − A x, and the next direction (empty for the Neumann series)."""


class BoundTask(Protocol):
    """One task with its θ."""

    @property
    def theta(self) -> Theta: ...

    def descent(self, theta: Theta | None = None) -> Descent:
        """Return the task's inner loop under its own θ or another."""
        ...


class Piece(Protocol):
    """Run a function of one task over the tasks of a shard, directly or compiled under ``name``."""

    def __call__(
        self, name: str, single: Callable[..., T], each: tuple[object, ...] = (), shared: tuple[int, ...] = ()
    ) -> T: ...


def why_unsolvable(algorithm: InnerLoop) -> str | None:
    """Return the reason why the inner loop of ``algorithm`` has no implicit gradient, or None."""
    name = type(algorithm).__name__
    if algorithm.implicit is None:
        return (
            f"{name} does not state, by `implicit`, that its inner loop ends in a minimum that depends on θ "
            "(imaml does where its regularization is above 0)"
        )
    if algorithm.inner_batch_size is not None:
        return f"algorithm.inner_batch_size: {algorithm.inner_batch_size} gives each inner step a loss of its own"
    if algorithm.whole_trajectory:
        return f"the objective of {name} reads the path to the minimum"
    return f"{name} is first order: it leaves the inner Hessian out" if algorithm.first_order else None


@dataclass(frozen=True)
class Solver:
    """Solve A x = v for one task's inner loss at φ: that of inner step ``step``.

    ``held`` selects the tensors of θ that the loss depends on.
    """

    settings: Implicit
    hessian: Hessian
    held: Callable[[Theta], Held]
    step: int

    def solution(self, piece: Piece, phi: Parameters, v: Parameters) -> Iterate:
        """Return the last iterate of the tasks of a shard; ``phi`` and ``v`` are stacked [T, …]."""
        iterate = self.first(v)
        for _ in range(self.settings.iterations):
            iterate = piece("solve", self.next, (phi, iterate), (self.step,))
        return iterate

    def first(self, v: Parameters) -> Iterate:
        """Return the iterate x = 0."""
        # A copy: a graph that is traced with one tensor in two places takes the two for one in all later calls.
        return v.zeros(), v, v.map(torch.clone) if self.settings.solver == "cg" else Parameters({})

    def next(self, bound: BoundTask, phi: Parameters, iterate: Iterate, step: StepIndex) -> Iterate:
        """Make one step of conjugate gradients, or add one term of step · Σ_i (I − step A)^i v."""
        x, residual, direction = iterate
        if self.settings.solver == "neumann":
            rate = self.settings.step
            return x + residual * rate, residual - self._product(bound, phi, residual, step) * rate, direction
        product = self._product(bound, phi, direction, step)
        square = dot(residual, residual)
        length = _quotient(square, dot(direction, product))
        x, residual = x + direction * length, residual - product * length
        return x, residual, residual + direction * _quotient(dot(residual, residual), square)

    def slope(self, bound: BoundTask, phi: Parameters, step: StepIndex) -> Parameters:
        """Return ∇g at φ, which is zero at a minimum."""
        return _slope(self._loss(bound, step), phi, {})

    def pull(self, bound: BoundTask, phi: Parameters, gradient: Held, x: Parameters, step: StepIndex) -> Held:
        """Return ``gradient`` − (∂²g/∂φ∂θ)ᵀ x, by slot."""
        loss, held = self._loss(bound, step), self.held(bound.theta)
        if self.hessian == "reverse":
            _, pull = vjp(lambda held: _slope(loss, phi, held), held)
            (crossed,) = pull(x)
        else:
            _, crossed = jvp(lambda phi: _slope_by_held(loss, phi, held), (phi,), (x,))
        added = {slot: {n: gradient[slot][n] - t for n, t in values.items()} for slot, values in crossed.items()}
        return {slot: values.replace(added.get(slot, {})) for slot, values in gradient.items()}

    def _loss(self, bound: BoundTask, step: StepIndex) -> _Loss:
        def loss(phi: Parameters, held: Held) -> Tensor:
            given = {slot: bound.theta[slot].replace(values) for slot, values in held.items()}
            return bound.descent({**bound.theta, **given}).loss(phi, step)

        return loss

    def _product(self, bound: BoundTask, phi: Parameters, v: Parameters, step: StepIndex) -> Parameters:
        """Return A v."""
        loss = self._loss(bound, step)
        if self.hessian == "reverse":
            _, pull = vjp(lambda phi: _slope(loss, phi, {}), phi)
            (product,) = pull(v)
        else:
            _, product = jvp(lambda phi: _slope(loss, phi, {}), (phi,), (v,))
        return product + v * self.settings.damping if self.settings.damping else product


_Loss = Callable[[Parameters, Held], Tensor]


def _slope(loss: _Loss, phi: Parameters, held: Held) -> Parameters:
    result: Parameters = grad(loss)(phi, held)
    return result


def _slope_by_held(loss: _Loss, phi: Parameters, held: Held) -> Held:
    result: Held = grad(loss, argnums=1)(phi, held)
    return result


def dot(a: Parameters, b: Parameters) -> Tensor:
    """Return the inner product, a scalar."""
    return torch.stack([(a[name] * b[name]).sum() for name in a]).sum()


def norm(a: Parameters) -> float:
    """Return the Euclidean norm of all values."""
    return float(dot(a, a).sqrt())


def _quotient(a: Tensor, b: Tensor) -> Tensor:
    """Return a / b, and 0 where b is 0: a residual that is zero stays zero."""
    return torch.where(b == 0, torch.zeros_like(a), a / torch.where(b == 0, torch.ones_like(b), b))
