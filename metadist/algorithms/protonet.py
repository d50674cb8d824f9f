from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from metadist.core.algorithm import Algorithm, TaskContext, Theta
from metadist.core.model import BoundModel, Model
from metadist.core.parameters import Parameters
from metadist.core.task import Examples, TaskFamily


@dataclass(frozen=True)
class ProtoNet(Algorithm):
    """Prototypical networks (Snell, Swersky, Zemel 2017, eq. 1–2): logits are −‖f(x) − c_k‖² to the class means."""

    def outputs(self, family: TaskFamily) -> int | None:
        return None

    def compatible(self, family: TaskFamily, model: Model) -> str | None:
        return None if family.kind == "classification" else "prototypes are class means, and these tasks have no classes"

    def adapt(self, model: BoundModel, theta: Theta, support: Examples, context: TaskContext) -> Sequence[tuple[Parameters, Tensor]]:
        embedded = model(theta["model"], support.x, step=0).flatten(1)
        ways = context.family.ways(context.key.split)
        member = torch.nn.functional.one_hot(support.y, ways).to(embedded.dtype)
        if support.mask is not None:
            member = member * support.mask.to(embedded.dtype).unsqueeze(-1)
        prototypes = (member.T @ embedded) / member.sum(0).unsqueeze(-1)
        return [(theta["model"], prototypes)]

    def predict(self, model: BoundModel, phi: tuple[Parameters, Tensor], x: Tensor) -> Tensor:
        parameters, prototypes = phi
        embedded = model(parameters, x).flatten(1)
        # ‖a − b‖² expanded: a matrix product in place of a [N, ways, D] difference.
        return 2 * embedded @ prototypes.T - embedded.square().sum(1, keepdim=True) - prototypes.square().sum(1)
