"""Meta-SGD: MAML with learned inner rates."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import torch

from metadist.algorithms.maml import MAML
from metadist.core.algorithm import TaskContext, Theta
from metadist.core.errors import ConfigError, within
from metadist.core.inner_loop import Descent
from metadist.core.model import BoundModel, Model
from metadist.core.parameters import Layout, Parameters
from metadist.core.state import Slot
from metadist.core.task import Examples


@dataclass(frozen=True)
class MetaSGD(MAML):
    """Meta-SGD (Li et al. 2017, algorithm 1): a learned rate for every parameter, φ = θ − α ∘ ∇L(θ).

    α is the slot ``inner_lr``. Every rate starts at ``inner_lr`` (the paper draws them at random). The outer optimiser
    updates α at the rate ``lr_of_inner_lr`` (null: ``outer.lr``). Rates can become negative, as in the paper.
    """

    lr_of_inner_lr: float | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        within(0, math.inf, **{"algorithm.lr_of_inner_lr": self.lr_of_inner_lr})
        if self.inner_optimizer != "sgd":
            raise ConfigError(
                f"algorithm.inner_optimizer: {self.inner_optimizer}, but meta_sgd learns the rates of sgd; use sgd"
            )

    def slots(self, model: Model, parameters: Parameters) -> dict[str, tuple[Slot, Parameters]]:
        rates = parameters.map(lambda p: torch.full_like(p, self.inner_lr))
        return {"inner_lr": (Slot(Layout.of(rates), lr=self.lr_of_inner_lr, weight_decay=0.0), rates)}

    def descent(self, model: BoundModel, theta: Theta, support: Examples, context: TaskContext) -> Descent:
        return replace(super().descent(model, theta, support, context), rate=theta["inner_lr"])
