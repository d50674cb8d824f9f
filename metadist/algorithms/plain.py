"""Plain training of one model: what methods that weigh examples are compared with."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from torch import Tensor

from metadist.core.algorithm import TaskContext, Theta
from metadist.core.model import BoundModel
from metadist.core.stages import SharedModel
from metadist.core.task import Examples, Task


@dataclass(frozen=True)
class Plain(SharedModel):
    """Ordinary training: the gradient of the mean loss on the support sets, which are minibatches of one data set.

    With ``clean``, the query sets (minibatches of the clean or held-out data) are trained on as well: the loss is the
    mean of the two means.
    """

    clean: bool = False

    def judged(self, task: Task) -> Examples:
        return task.support

    def objective(
        self,
        model: BoundModel,
        theta: Theta,
        trajectory: Sequence[Mapping[str, Tensor]],
        task: Task,
        context: TaskContext,
    ) -> tuple[Tensor, Tensor]:
        prediction = model(trajectory[-1], task.support.x, step=0)
        loss = context.loss(prediction, task.support)
        if self.clean:
            loss = (loss + context.loss(self.predict(model, trajectory[-1], task.query.x), task.query)) / 2
        return loss, prediction
