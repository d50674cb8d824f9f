from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor

from metadist.core.algorithm import Algorithm, TaskContext, Theta
from metadist.core.inner import InnerLoop
from metadist.core.model import BoundModel
from metadist.core.parameters import Parameters
from metadist.core.task import Examples


@dataclass(frozen=True)
class MAML(InnerLoop, Algorithm):
    """Model-agnostic meta-learning (Finn, Abbeel, Levine 2017, algorithm 1): ∇θ L_query(φ_k), through the inner loop.

    ``first_order`` is FOMAML (section 5.2): the inner gradients count as constants.
    """

    first_order: bool = False

    def adapt(self, model: BoundModel, theta: Theta, support: Examples, context: TaskContext) -> Sequence[Parameters]:
        def loss(phi: Parameters, step: int) -> Tensor:
            batch = self.minibatch(support, context.key, step)
            return context.loss(model(phi, batch.x, step=step), batch)

        return [phi for phi, _ in self.descend(loss, theta["model"], first_order=self.first_order)]

    def predict(self, model: BoundModel, phi: Parameters, x: Tensor) -> Tensor:
        return model(phi, x)
