"""Reptile: first-order meta-learning by parameter differences."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from metadist.core.algorithm import TaskContext, Theta
from metadist.core.engine import Engine
from metadist.core.errors import ConfigError, one_of
from metadist.core.inner_loop import Descent, InnerLoop, InnerState, Moments
from metadist.core.model import BoundModel, Model
from metadist.core.parameters import Layout, Parameters
from metadist.core.state import Slot
from metadist.core.task import Examples
from metadist.core.tree import Tree


@dataclass(frozen=True)
class Reptile(InnerLoop):
    """Reptile (Nichol, Achiam, Schulman 2018, algorithm 2): contributes θ − φ_k. The paper's ε is ``outer.lr`` of SGD.

    With ``moments: fresh``, the inner optimiser's moments start at zero for every task. With ``carried``, they start at
    the mean over the tasks of the previous meta-step; the reference code carries them from task to task.
    """

    moments: str = "fresh"

    def __post_init__(self) -> None:
        super().__post_init__()
        one_of("algorithm.moments", self.moments, ("fresh", "carried"))
        if self.moments == "carried" and self.inner_optimizer == "sgd" and not self.inner_momentum:
            raise ConfigError(
                "algorithm.moments: carried, but plain sgd has no moments; use inner_optimizer: adam or moments: fresh"
            )

    def release(self, engine: Engine) -> int:
        carried = self.moments == "carried" and self.inner_optimizer == "adam"  # the count is a tensor
        return 2 if carried else super().release(engine)

    def slots(self, model: Model, parameters: Parameters) -> dict[str, tuple[Slot, Parameters]]:
        if self.moments == "fresh":
            return {}
        zeros, dtype = parameters.zeros(), next(iter(parameters.values())).dtype
        count = Parameters({"count": torch.zeros((), dtype=dtype)})
        return {
            "inner_first": (Slot(Layout.of(zeros), "average"), zeros),
            "inner_second": (Slot(Layout.of(zeros), "average"), zeros),
            "inner_count": (Slot(Layout.of(count), "average"), count),
        }

    def descent(self, model: BoundModel, theta: Theta, support: Examples, context: TaskContext) -> Descent:
        phi = theta["model"]
        moments = self.fresh(phi)
        if self.moments == "carried":
            count = theta["inner_count"]["count"].double()
            moments = Moments(theta["inner_first"], theta["inner_second"], count)
        loss = self.support_loss(model, support, context)
        return Descent(loss, phi, self.inner_lr, moments, finish=lambda phi, moments: (phi, moments))

    def predict(self, model: BoundModel, phi: InnerState, x: Tree) -> Tree:
        return model(phi[0], x)

    def delta(self, theta: Theta, phi: InnerState) -> dict[str, Parameters]:
        parameters, moments = phi
        delta = {"model": theta["model"] - parameters}
        if self.moments == "carried":
            count = Parameters({"count": torch.as_tensor(moments.count).to(theta["inner_count"]["count"].dtype)})
            delta |= {"inner_first": moments.first, "inner_second": moments.second, "inner_count": count}
        return delta
