"""Conditional neural processes."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor

from metadist.core.algorithm import Algorithm, TaskContext, Theta
from metadist.core.model import BoundModel, Model
from metadist.core.parameters import Parameters
from metadist.core.task import Examples, Task, TaskFamily, like_target
from metadist.core.tree import Tree

Encoded = tuple[Parameters, Tensor]
"""(θ, the representation of the support set)."""


@dataclass(frozen=True)
class CNP(Algorithm):
    """Conditional neural process (Garnelo et al. 2018, eq. 1–3): one pass over the support set, no gradient step.

    The model needs the methods ``encode(x, y, mask) -> r`` and ``decode(r, x) -> (mean, standard deviation)``, both
    [N, D]. The objective is the Gaussian negative log-likelihood of the query set.
    """

    def compatible(self, family: TaskFamily, model: Model) -> str | None:
        if family.kind != "regression":
            return "its Gaussian likelihood needs real-valued targets"
        if model.missing("encode", "decode"):
            return "the model needs encode(x, y, mask) and decode(r, x); model 'cnp' has them"
        if model.output is not None:
            return "model.output chooses a part of what forward returns, and encode and decode are called instead"
        return None

    def adapt(self, model: BoundModel, theta: Theta, support: Examples, context: TaskContext) -> Sequence[Encoded]:
        parameters = theta["model"]
        return [(parameters, model(parameters, support.x, support.y, support.mask, method="encode", step=0))]

    def predict(self, model: BoundModel, phi: Encoded, x: Tree) -> Tensor:
        return self._decode(model, phi, x)[0]

    def _decode(self, model: BoundModel, phi: Encoded, x: Tree) -> tuple[Tensor, Tensor]:
        parameters, representation = phi
        mean, deviation = model(parameters, representation, x, method="decode")
        return mean, deviation

    def objective(
        self, model: BoundModel, theta: Theta, trajectory: Sequence[Encoded], task: Task, context: TaskContext
    ) -> tuple[Tensor, Tensor]:
        mean, deviation = self._decode(model, trajectory[-1], task.query.x)
        mean, target = like_target("the Gaussian likelihood", mean, task.query.y)
        nll = ((target - mean) / deviation).square() / 2 + deviation.log() + math.log(2 * math.pi) / 2
        return task.query.mean(nll.flatten(1).sum(1)), mean
