"""Quadratic tasks, whose adapted parameters and meta-gradients have a closed form for any number of inner steps.

A task is a linear regression without noise. With the ``Linear`` model its loss is quadratic in the parameters θ [d]:
L(θ) = mean_j (x_j · θ − y_j)² = ½ (θ − c)ᵀ H (θ − c), where H = 2/N XᵀX [d, d] and c [d] is the least-squares solution.
k steps of gradient descent at rate α end in φ_k = c + (I − αH)^k (θ − c). The support and the query set have an H and a
c each; ``Quadratics.shift`` is the distance between the two optima.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from metadist.core.random import TaskKey
from metadist.core.task import Examples, Task, TaskFamily


@dataclass(frozen=True)
class Quadratics(TaskFamily):
    """Linear regressions y = x · c in ``dimension`` variables; c is normal around ``centre``.

    x is float32 [rows, dimension]. The query set's optimum is c plus a normal vector of size ``shift``.
    """

    dimension: int = 3
    rows: int = 6
    centre: float = 4.0
    shift: float = 0.5

    outputs = 1

    @property
    def input_shape(self) -> tuple[int, ...]:  # type: ignore[override]
        return (self.dimension,)

    def sample(self, keys: TaskKey, split: str) -> Task:
        d = self.dimension
        c = self.centre + keys.stream("c").normal(1, d).double()
        other = c + self.shift * keys.stream("shift").normal(1, d).double()

        def examples(name: str, optimum: Tensor) -> Examples:
            x = keys.stream(name).normal(self.rows, d)
            # Term by term and in float64: the last bit of a sum may depend on how many tasks are sampled together.
            y = torch.zeros_like(x[..., :1], dtype=torch.float64)
            for i in range(d):
                y = y + x[..., i : i + 1].double() * optimum[..., i : i + 1]
            return Examples(x, y.float())

        return Task(examples("support", c), examples("query", other))

    def sample_task(self, key: TaskKey, split: str) -> Task:
        return self.sample(key, split)


@dataclass(frozen=True)
class Linear:
    """The model of ``Quadratics``: x ↦ x · θ, with one parameter tensor ``weight`` [1, dimension]."""

    def build(self, input_shape: tuple[int, ...], outputs: int | None) -> nn.Module:
        return nn.Linear(input_shape[0], outputs or 1, bias=False)


def hessian(examples: Examples) -> Tensor:
    """Return H = 2/N XᵀX of one set of examples: float64 [d, d]."""
    x = examples.x.double()
    return 2.0 / len(x) * x.T @ x


def optimum(examples: Examples) -> Tensor:
    """Return the least-squares solution c of one set of examples: float64 [d]."""
    x, y = examples.x.double(), examples.y.double().flatten()
    return torch.linalg.solve(x.T @ x, x.T @ y)


def contraction(task: Task, inner_lr: float, inner_steps: int) -> Tensor:
    """Return (I − αH)^k of the support set, ∂φ_k / ∂θ: float64 [d, d]."""
    h = hessian(task.support)
    return torch.linalg.matrix_power(torch.eye(len(h), dtype=torch.float64) - inner_lr * h, inner_steps)


def adapted(task: Task, theta: Tensor, inner_lr: float, inner_steps: int) -> Tensor:
    """Return φ_k after ``inner_steps`` of gradient descent on the support set from ``theta`` [d]: float64 [d]."""
    c = optimum(task.support)
    return c + contraction(task, inner_lr, inner_steps) @ (theta.double() - c)


def maml_loss(task: Task, theta: Tensor, inner_lr: float, inner_steps: int) -> float:
    """Return MAML's objective, the query loss at φ_k."""
    x, y = task.query.x.double(), task.query.y.double().flatten()
    return float((x @ adapted(task, theta, inner_lr, inner_steps) - y).square().mean())


def maml_gradient(task: Task, theta: Tensor, inner_lr: float, inner_steps: int, *, first_order: bool = False) -> Tensor:
    """Return ∇θ of MAML's objective (Finn et al. 2017): (I − αH)^k B (φ_k − d), with B and d of the query set.

    ``first_order`` leaves the factor (I − αH)^k out (FOMAML). Float64 [d].
    """
    phi = adapted(task, theta, inner_lr, inner_steps)
    pull = hessian(task.query) @ (phi - optimum(task.query))
    return pull if first_order else contraction(task, inner_lr, inner_steps) @ pull


def reptile_delta(task: Task, theta: Tensor, inner_lr: float, inner_steps: int) -> Tensor:
    """Return Reptile's contribution θ − φ_k (Nichol et al. 2018): (I − (I − αH)^k)(θ − c). Float64 [d]."""
    return theta.double() - adapted(task, theta, inner_lr, inner_steps)
