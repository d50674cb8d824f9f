"""MAML: model-agnostic meta-learning."""

from __future__ import annotations

from dataclasses import dataclass

from metadist.core.algorithm import TaskContext, Theta
from metadist.core.inner_loop import Descent, InnerLoop
from metadist.core.model import BoundModel
from metadist.core.parameters import Parameters
from metadist.core.task import Examples
from metadist.core.tree import Tree


@dataclass(frozen=True)
class MAML(InnerLoop):
    """MAML (Finn, Abbeel, Levine 2017, algorithm 1): contributes ∇θ L_query(φ_k), through the inner loop.

    ``first_order`` is FOMAML (section 5.2): the inner gradients count as constants.
    """

    first_order: bool = False

    def descent(self, model: BoundModel, theta: Theta, support: Examples, context: TaskContext) -> Descent:
        phi = theta["model"]
        return Descent(
            self.support_loss(model, support, context), phi, self.inner_lr, self.fresh(phi), self.first_order
        )

    def predict(self, model: BoundModel, phi: Parameters, x: Tree) -> Tree:
        return model(phi, x)
