"""The interface of an algorithm: how it adapts to a task, how it predicts, and its contribution to the outer update."""

from __future__ import annotations

from collections.abc import Generator, Mapping, Sequence
from dataclasses import dataclass, fields, is_dataclass, replace
from typing import Any, ClassVar, Literal, Union

from torch import Tensor

from metadist.core.engine import RELEASE, Engine
from metadist.core.meta_step import MetaStep
from metadist.core.model import BoundModel, Model
from metadist.core.parameters import Parameters
from metadist.core.random import TaskKey
from metadist.core.round import Round
from metadist.core.state import Contribution, Slot
from metadist.core.task import Examples, Task, TaskFamily, possible
from metadist.core.tree import Tree

Theta = Mapping[str, Parameters]
"""θ by slot. ``theta["model"]`` holds the learned parameters of the model; algorithms may declare more slots."""
Phi = Any
"""φ: a pytree of tensors. ``adapt`` makes it, and ``predict`` of the same algorithm reads it; other code only passes it
on. Every algorithm narrows the type."""


@dataclass(frozen=True)
class TaskContext:
    """Everything that an algorithm may know besides θ and the support set.

    In compiled shards ``meta_step`` is a 0-d tensor. ``classes`` is the number of classes of a support set from
    outside; None for the family's own tasks. ``task_ways`` is the number of classes of this task, a 0-d tensor, where
    the tasks of the family differ in it.
    """

    key: TaskKey
    meta_step: Union[int, Tensor]
    training: bool
    family: TaskFamily
    classes: Union[int, None] = None
    task_ways: Union[Tensor, None] = None

    @property
    def ways(self) -> int:
        """The number of classes of the task; the largest one where the tasks of the family differ in it."""
        return self.family.ways(self.key.split) if self.classes is None else self.classes

    def possible(self, prediction: Tree) -> Tree:
        """Return ``prediction`` with −∞ as the logits of classes that the task does not have."""
        return possible(prediction, self.classes if self.task_ways is None else self.task_ways)

    def loss(self, prediction: Tree, examples: Examples) -> Tensor:
        """Return the family's loss over the classes of the task, averaged over the real examples: a scalar."""
        return examples.mean(self.family.loss(self.possible(prediction), examples.y))

    def metric(self, prediction: Tree, examples: Examples) -> Tensor:
        """Return the family's metric of the real examples: a scalar. Not under ``vmap`` where there is a mask."""
        real = Examples(examples.real(examples.x), examples.real(examples.y))
        return real.mean(self.family.metric(examples.real(self.possible(prediction)), real.y))


class Algorithm:
    """Subclass as a frozen dataclass (its fields are its config) and write ``adapt`` and ``predict``, for one task.

    All methods run under ``torch.func.vmap`` over the tasks of a shard, and must not branch in Python on values of
    tensors. The contribution of a task to a slot is what ``contribute`` gives for it (a delta, a statistic, a gradient
    of the algorithm's own). A slot that ``contribute`` leaves out receives the gradient of ``objective`` where its rule
    is ``gradient``, and nothing where it is ``constant``; a slot with rule ``average`` must be given.
    """

    #: whether ``objective`` reads φ_0 … φ_{k-1} too; the derivatives with respect to them then stay in memory
    whole_trajectory: ClassVar[bool] = False
    #: whether ``adapt`` takes any number of classes, which ``context.ways`` gives: metric methods
    any_ways: ClassVar[bool] = False
    #: the slots that contributions go to, where they are not all whose rule is ``gradient`` or ``average``
    receivers: ClassVar[Union[tuple[str, ...], None]] = None
    #: gradient steps of the inner loop; 0 where there is no such loop
    inner_steps: int = 0
    #: whether the meta-gradient treats the gradients of the inner loop as constants
    first_order: bool = False

    @property
    def contribution(self) -> Literal["gradient", "delta", "by slot"]:
        """The kind of a task's contribution: ``by slot`` where the algorithm overrides ``contribute``, ``delta`` where
        it overrides ``delta`` alone."""
        if type(self).contribute is not Algorithm.contribute:
            return "by slot"
        return "gradient" if type(self).delta is Algorithm.delta else "delta"

    @property
    def second_order(self) -> bool:
        """Whether the meta-gradient differentiates gradients of the inner loop."""
        return self.inner_steps > 0 and not self.first_order and self.contribution == "gradient"

    def release(self, engine: Engine) -> int:
        """Return the release of metadist's arithmetic that last changed the bits of this algorithm under ``engine``."""
        return RELEASE

    def slots(self, model: Model, parameters: Parameters) -> dict[str, tuple[Slot, Parameters]]:
        """Return the slots besides ``model``: name → (slot, initial values)."""
        return {}

    def stages(self) -> Mapping[str, Algorithm]:
        """Return the stages of ``rounds`` by name, each an algorithm with the same slots (``core/stages.py: Stage``).

        The first one should need the most memory: it decides about the engine.
        """
        return {}

    def rounds(self, step: MetaStep) -> Generator[Round, Contribution, None]:
        """Make one meta-step on the driver; by default, sum the contributions of all tasks, and update θ by the sum."""
        step.update((yield from step.sum()))

    def outputs(self, family: TaskFamily) -> int | None:
        """Return the number of outputs that the model needs, or None for an embedding of any size."""
        return family.outputs

    def compatible(self, family: TaskFamily, model: Model) -> str | None:
        """Return the reason why this algorithm cannot learn these tasks with this model, or None."""
        return None if model.has_forward else "the model has no forward(x)"

    def adapt(self, model: BoundModel, theta: Theta, support: Examples, context: TaskContext) -> Sequence[Phi]:
        """Return φ_0 … φ_k; φ_0 is the state before adaptation, where the algorithm has one."""
        raise NotImplementedError

    def predict(self, model: BoundModel, phi: Phi, x: Tree) -> Tree:
        """Return the predictions [N, …] for the inputs ``x`` [N, …]: tensors, or dicts or tuples of tensors."""
        raise NotImplementedError

    def objective(
        self, model: BoundModel, theta: Theta, trajectory: Sequence[Phi], task: Task, context: TaskContext
    ) -> tuple[Tensor, Tree]:
        """Return the scalar meta-loss and the prediction for ``judged``; by default, the query loss at φ_k.

        ``trajectory`` is φ_0 … φ_k. An algorithm that reads more than its last element sets ``whole_trajectory``.
        """
        prediction = self.predict(model, trajectory[-1], task.query.x)
        return context.loss(prediction, task.query), prediction

    def judged(self, task: Task) -> Examples:
        """Return the examples of ``task`` (or of stacked tasks) that ``objective`` predicts: the query set."""
        return task.query

    def contribute(
        self, model: BoundModel, theta: Theta, trajectory: Sequence[Phi], task: Task, context: TaskContext
    ) -> Mapping[str, Parameters]:
        """Return the contributions that are no gradients of ``objective``: slot → a tensor for each of its parameters.

        ``trajectory`` is that of ``objective``, as constants. The outer optimiser takes the mean over tasks for a
        gradient where the rule of the slot is ``gradient``; the mean replaces the value where it is ``average``. The
        names are the same for every task. By default, the result of ``delta`` where the algorithm overrides it.
        """
        return {} if type(self).delta is Algorithm.delta else self.delta(theta, trajectory[-1])

    def discretised(self, model: Model, theta: Theta) -> Mapping[str, Any] | None:
        """Return the options of the model that fix the learned architecture; None where the architecture is fixed."""
        return None

    def delta(self, theta: Theta, phi: Phi) -> Mapping[str, Parameters]:
        """Return ``contribute``'s result where it depends on θ and ``phi`` = φ_k alone (Reptile: θ − φ_k)."""
        raise NotImplementedError


def with_inner_steps(algorithm: Algorithm, inner_steps: int | None) -> Algorithm:
    """Return ``algorithm`` with another number of inner steps; unchanged for None, or where it has no such field."""
    if inner_steps is None or not is_dataclass(algorithm) or "inner_steps" not in {f.name for f in fields(algorithm)}:
        return algorithm
    return replace(algorithm, inner_steps=inner_steps)


def at_most_one_step(algorithm: Algorithm) -> Algorithm:
    """Return ``algorithm`` with one inner step, or with none where it has none."""
    return with_inner_steps(algorithm, min(1, algorithm.inner_steps))
