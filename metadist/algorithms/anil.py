from __future__ import annotations

import fnmatch
from dataclasses import dataclass

from metadist.algorithms.maml import MAML
from metadist.core.algorithm import TaskContext, Theta
from metadist.core.errors import ConfigError
from metadist.core.inner_loop import Descent
from metadist.core.model import BoundModel, Model
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
            wanted = (
                f"'{self.head}'"
                if self.head is not None
                else f"the last module ({', '.join(model.head()) or 'tied weights'})"
            )
            raise ConfigError(f"algorithm.head: {wanted} matches no learned parameter; there are {', '.join(names)}")
        return super().compatible(family, model)

    def descent(self, model: BoundModel, theta: Theta, support: Examples, context: TaskContext) -> Descent:
        body = theta["model"]
        head = body.select(lambda name: self._adapts(model, name))
        loss = self.support_loss(model, support, context, whole=body.replace)
        return Descent(loss, head, self.inner_lr, self.fresh(head), self.first_order, lambda phi, _: body.replace(phi))
