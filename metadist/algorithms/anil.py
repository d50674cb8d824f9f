from __future__ import annotations

import fnmatch
from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor

from metadist.algorithms.maml import MAML
from metadist.core.algorithm import TaskContext, Theta
from metadist.core.errors import ConfigError
from metadist.core.model import BoundModel, Model
from metadist.core.parameters import Parameters
from metadist.core.task import Examples, TaskFamily


@dataclass(frozen=True)
class ANIL(MAML):
    """Almost no inner loop (Raghu et al. 2020, section 5): MAML that adapts the head alone.

    ``head`` is a pattern of parameter names; by default the last module that has parameters.
    """

    head: str | None = None

    def _adapts(self, model: BoundModel | Model, name: str) -> bool:
        if self.head is not None:
            return fnmatch.fnmatch(name, self.head)
        return name in (model.head if isinstance(model, BoundModel) else model.head())

    def compatible(self, family: TaskFamily, model: Model) -> str | None:
        names = [n for n, _ in model.module.named_parameters() if n not in model.frozen]
        if not any(self._adapts(model, n) for n in names):
            wanted = f"'{self.head}'" if self.head is not None else f"the last module ({', '.join(model.head()) or 'tied weights'})"
            raise ConfigError(f"algorithm.head: {wanted} matches no learned parameter; there are {', '.join(names)}")
        return super().compatible(family, model)

    def adapt(self, model: BoundModel, theta: Theta, support: Examples, context: TaskContext) -> Sequence[Parameters]:
        body = theta["model"]

        def loss(head: Parameters, step: int) -> Tensor:
            batch = self.minibatch(support, context.key, step)
            return context.loss(model(body.replace(head), batch.x, step=step), batch)

        head = body.select(lambda name: self._adapts(model, name))
        return [body.replace(phi) for phi, _ in self.descend(loss, head, first_order=self.first_order)]
