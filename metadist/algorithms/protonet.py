"""Prototypical networks."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from metadist.core.algorithm import Algorithm, TaskContext, Theta
from metadist.core.engine import Engine
from metadist.core.model import BoundModel, Model
from metadist.core.parameters import Parameters
from metadist.core.task import Examples, TaskFamily
from metadist.core.tree import Tree

Prototypes = tuple[Parameters, Tensor, Tensor, Tensor]
"""(θ, prototypes [ways, D] about a centre, whether a class has support examples [ways, 1], the centre [D])."""


@dataclass(frozen=True)
class ProtoNet(Algorithm):
    """Prototypical networks (Snell, Swersky, Zemel 2017, eq. 1–2): logits are −‖f(x) − c_k‖², with class means c_k."""

    any_ways = True

    def release(self, engine: Engine) -> int:
        return 2  # embeddings are centred

    def outputs(self, family: TaskFamily) -> int | None:
        return None

    def compatible(self, family: TaskFamily, model: Model) -> str | None:
        return (
            None if family.kind == "classification" else "prototypes are class means, and these tasks have no classes"
        )

    def adapt(self, model: BoundModel, theta: Theta, support: Examples, context: TaskContext) -> Sequence[Prototypes]:
        embedded = model(theta["model"], support.x, step=0).flatten(1)
        # Not one_hot: it reads the values of its argument, which vmap forbids.
        member = (support.y.unsqueeze(-1) == torch.arange(context.ways, device=support.y.device)).to(embedded.dtype)
        if support.mask is not None:
            member = member * support.mask.to(embedded.dtype).unsqueeze(-1)
        count = member.sum(0).unsqueeze(-1)
        # Distances do not depend on the origin, but their rounding error does: without the common offset of the
        # embeddings no digits cancel. A constant, because no distance depends on it.
        centre = (member.sum(1) @ embedded / count.sum().clamp(min=1)).detach()
        return [(theta["model"], (member.T @ (embedded - centre)) / count.clamp(min=1), count > 0, centre)]

    def predict(self, model: BoundModel, phi: Prototypes, x: Tree) -> Tensor:
        parameters, prototypes, present, centre = phi
        embedded = model(parameters, x).flatten(1) - centre
        # ‖a − b‖², expanded: a matrix product in place of a [N, ways, D] difference.
        logits = 2 * embedded @ prototypes.T - embedded.square().sum(1, keepdim=True) - prototypes.square().sum(1)
        # A class without support examples, in a task of fewer ways, is never predicted.
        return torch.where(present.squeeze(-1), logits, -torch.inf)
