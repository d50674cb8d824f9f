"""iMAML: meta-learning with implicit gradients."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from metadist.core.algorithm import TaskContext, Theta
from metadist.core.errors import at_least, one_of, within
from metadist.core.inner_loop import Descent, Implicit, InnerLoop
from metadist.core.model import BoundModel, InnerStep
from metadist.core.parameters import Parameters
from metadist.core.task import Examples


@dataclass(frozen=True)
class IMAML(InnerLoop):
    """iMAML (Rajeswaran, Finn, Kakade, Levine 2019, algorithm 2): contributes (I + H/λ)⁻¹ ∇L_query(φ_k).

    The inner loop minimises L_support(φ) + λ/2 ‖φ − θ‖², and H is the Hessian of L_support at φ_k. λ is
    ``regularization`` in training and ``test_regularization`` in evaluation and service, where the reference code has
    none. The linear system ((1 + ``damping``) I + H/λ) x = ∇L_query is solved by ``solver_iterations`` steps of
    conjugate gradients (``cg``), or by as many terms of the Neumann series (``neumann``), Σ_i (I − s A)^i with
    A = (1 + ``damping``) λ I + H and s = ``neumann_step`` (null: ``inner_lr``). With ``engine.differentiation``
    ``unrolled`` or ``mixed``, no system is solved: the contribution is the exact gradient of the ``inner_steps`` steps.
    """

    inner_steps: int = 5
    regularization: float = 2.0
    test_regularization: float = 0.0
    solver: Literal["cg", "neumann"] = "cg"
    solver_iterations: int = 5
    damping: float = 1.0
    neumann_step: float | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        one_of("algorithm.solver", self.solver, ("cg", "neumann"))
        at_least(1, **{"algorithm.solver_iterations": self.solver_iterations})
        names = ("regularization", "test_regularization", "damping", "neumann_step")
        within(0, math.inf, **{f"algorithm.{name}": getattr(self, name) for name in names})

    @property
    def implicit(self) -> Implicit | None:
        if not self.regularization:  # the minimum does not depend on θ
            return None
        step = self.inner_lr if self.neumann_step is None else self.neumann_step
        return Implicit(self.solver, self.solver_iterations, self.damping * self.regularization, step)

    def descent(self, model: BoundModel, theta: Theta, support: Examples, context: TaskContext) -> Descent:
        start, plain = theta["model"], self.support_loss(model, support, context)
        strength = self.regularization if context.training else self.test_regularization

        def regularised(phi: Parameters, step: InnerStep) -> Tensor:
            distance = torch.stack([t.sum() for t in (phi - start).square().values()]).sum()
            return plain(phi, step) + distance * (strength / 2)

        loss = regularised if strength else plain
        return Descent(loss, start, self.inner_lr, self.fresh(start))

    def predict(self, model: BoundModel, phi: Parameters, x: Tensor) -> Tensor:
        prediction: Tensor = model(phi, x)
        return prediction
