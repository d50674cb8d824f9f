"""ANIL: almost no inner loop."""

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
    """MAML that adapts only the head (Raghu et al. 2020, section 5).

    ``head`` is a pattern of parameter names; by default, the last module that has parameters.
    """

    head: str | None = None

    def _adapts(self, model: Model, name: str) -> bool:
        return name in model.head() if self.head is None else fnmatch.fnmatch(name, self.head)

    def compatible(self, family: TaskFamily, model: Model) -> str | None:
        names = [n for n, _ in model.module.named_parameters() if n not in model.frozen]
        if not any(self._adapts(model, n) for n in names):
            default = f"the last module ({', '.join(model.head()) or 'tied weights'})"
            wanted = default if self.head is None else f"'{self.head}'"
            raise ConfigError(f"algorithm.head: {wanted} matches no learned parameter; there are {', '.join(names)}")
        return super().compatible(family, model)

    def descent(self, model: BoundModel, theta: Theta, support: Examples, context: TaskContext) -> Descent:
        body = theta["model"]
        head = body.select(lambda name: self._adapts(model.model, name))
        loss = self.support_loss(model, support, context, whole=body.replace)
        return Descent(loss, head, self.inner_lr, self.fresh(head), self.first_order, lambda phi, _: body.replace(phi))
