"""Algorithms with one inner model that all tasks share, whose meta-step has several rounds.

Tasks are shards of one data set: minibatches of training data (support sets) and of clean or held-out data (query
sets). What one round's sum decides, such as a look-ahead on the *global* training gradient, the next round sees as part
of θ: the result is the same for any number of shards.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor
from torch.func import jvp

from metadist.core.algorithm import Algorithm, TaskContext, Theta
from metadist.core.engine import Engine
from metadist.core.model import BoundModel, Model
from metadist.core.parameters import Parameters
from metadist.core.state import Slot
from metadist.core.task import Examples, Task, TaskFamily


class SharedModel(Algorithm):
    """The base of algorithms whose tasks share one model: there is no adaptation, and φ is ``theta["model"]``."""

    def adapt(
        self, model: BoundModel, theta: Theta, support: Examples, context: TaskContext
    ) -> Sequence[Mapping[str, Tensor]]:
        return [theta["model"]]

    def predict(self, model: BoundModel, phi: Mapping[str, Tensor], x: Tensor) -> Tensor:
        prediction: Tensor = model(phi, x)
        return prediction


@dataclass(frozen=True)
class Stage(SharedModel):
    """One kind of round of ``whole``: another objective, and the slots (``receivers``) that its sums go to.

    A stage is an algorithm with the slots of ``whole``; a bare one is the query loss of the model. A subclass writes
    ``objective``; ``judged`` where it predicts other examples than the query set, and ``contribute`` for sums that are
    no gradients. It sets ``first_order`` where the objective treats a part of its value as a constant on purpose.
    """

    receivers: ClassVar[tuple[str, ...]] = ("model",)

    whole: Algorithm

    def slots(self, model: Model, parameters: Parameters) -> dict[str, tuple[Slot, Parameters]]:
        return self.whole.slots(model, parameters)

    def outputs(self, family: TaskFamily) -> int | None:
        return self.whole.outputs(family)

    def compatible(self, family: TaskFamily, model: Model) -> str | None:
        return self.whole.compatible(family, model)

    def release(self, engine: Engine) -> int:
        return self.whole.release(engine)


@dataclass(frozen=True)
class TrainingStage(Stage):
    """A stage whose objective is over the support set, a minibatch of training data."""

    def judged(self, task: Task) -> Examples:
        return task.support


def example_losses(
    model: BoundModel, parameters: Mapping[str, Tensor], examples: Examples, context: TaskContext
) -> tuple[Tensor, Tensor]:
    """Return the loss of each example [N] under ``parameters``, over the classes of the task, and the predictions.

    The masks of dropout are those of inner step 0.
    """
    prediction: Tensor = model(parameters, examples.x, step=0)
    return context.family.loss(context.possible(prediction), examples.y), prediction


def slopes(
    model: BoundModel, parameters: Mapping[str, Tensor], direction: Parameters, examples: Examples, context: TaskContext
) -> tuple[Tensor, Tensor, Tensor]:
    """Return the loss of each example [N], its derivative along ``direction`` [N], and the predictions.

    Forward mode: one pass for all examples, and exact too where an example's loss depends on its whole minibatch.
    """

    def found(parameters: Mapping[str, Tensor]) -> tuple[Tensor, Tensor]:
        return example_losses(model, parameters, examples, context)

    primals, tangents = (Parameters(parameters),), (direction,)
    result: tuple[Tensor, Tensor, Tensor] = jvp(found, primals, tangents, has_aux=True)  # type: ignore[assignment]
    return result
