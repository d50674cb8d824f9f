"""Compute the contribution of one task, and its sum over the tasks of a shard.

Unrolled differentiation records the inner loop; mixed differentiation goes back over its steps. ``vmap`` is of the
*per-task* gradient throughout: the gradient of a vmapped loss is wrong for batch norm's second order.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import TypeVar, Union

import torch
import torch.utils._pytree as pytree
from torch import Tensor
from torch.func import grad, vmap

from metadist.core.algorithm import Algorithm, TaskContext, Theta
from metadist.core.engine import Engine
from metadist.core.inner_loop import Descent, InnerLoop, InnerState, Moments
from metadist.core.model import BoundModel, Model
from metadist.core.parameters import Layout, Parameters
from metadist.core.random import TaskKey
from metadist.core.task import Task, TaskFamily
from metadist.core.task_metrics import metric_of_tasks
from metadist.engine.convolution import REPLACEMENTS
from metadist.engine.functions import TensorCall, added, apart, directly, jvp, kept_sum, mapped, vjp

T = TypeVar("T")
Values = dict[str, Parameters]
"""Slot → gradient or delta."""
Metrics = dict[str, Tensor]
"""Loss and metric of each task; where query sets are padded, ``PREDICTION`` in place of the metric, which then reads
the real rows of each task outside ``vmap`` and the graph."""
Names = frozenset[tuple[str, str]]
"""(slot, tensor) pairs."""
StepIndex = Union[int, Tensor]
"""A meta-step or inner step: an int, or a 0-d int64 tensor in compiled shards."""
Cotangent = Union[InnerState, tuple[()]]
"""A cotangent of an inner state, or () for none: ``vmap`` refuses None."""

BUFFERS = "buffers."
PREDICTION = "prediction"


def fixed(theta: Theta) -> dict[str, Tensor]:
    """Return frozen parameters and buffers by name."""
    return {n: t for slot in theta if slot == "frozen" or slot.startswith(BUFFERS) for n, t in theta[slot].items()}


@dataclass(frozen=True)
class MetaGradient:
    """Compute the contributions of tasks for one algorithm under one engine.

    ``learned`` names the slots whose rule is ``gradient``. ``held`` names the tensors of θ that an inner step depends
    on besides φ (``held_by_steps``): mixed differentiation follows no other dependence of a step on θ.
    """

    algorithm: Algorithm
    model: Model
    family: TaskFamily
    learned: tuple[str, ...]
    layouts: Mapping[str, Layout]
    engine: Engine = Engine()
    held: Names = frozenset()

    def bind(self, theta: Theta, key: TaskKey | None, training: bool) -> BoundModel:
        """Return the model with θ's frozen parameters and buffers, for one task; compiled, with our convolutions."""
        replaced = REPLACEMENTS if self.engine.compile else {}
        return self.model.bind(fixed(theta), key, training, self.engine, replaced)

    def values(self, theta: Theta, tasks: Task, keys: TaskKey, meta_step: int) -> tuple[Values, Metrics]:
        """Compute every task's gradient (or delta) and its ``Metrics``, stacked [T, …]; never compiled."""
        if self.walks_back:
            return self._mixed(_Shard(self, directly, self.flat(theta), tasks, keys, meta_step))
        values, metrics = vmap(self._single(theta, keys, meta_step))(tasks, keys.tasks)
        return values, metrics

    def sums(
        self, run: TensorCall, theta: Theta, tasks: Task, keys: TaskKey, meta_step: int, keep: Tensor
    ) -> tuple[dict[str, Tensor], Tensor]:
        """Sum ``values`` over the tasks that ``keep`` [T] selects: slot vectors, and loss and metric [2] in float64."""
        slots, totals, predictions = self._summed(run, theta, tasks, keys, meta_step, keep)
        for prediction in predictions:
            metric = metric_of_tasks(self.family, prediction, tasks.query)
            totals = torch.cat([totals, kept_sum(keep, metric.double()).unsqueeze(0)])
        return slots, totals

    def _summed(
        self, run: TensorCall, theta: Theta, tasks: Task, keys: TaskKey, meta_step: int, keep: Tensor
    ) -> tuple[dict[str, Tensor], Tensor, list[Tensor]]:
        """Return the sums of slots, loss and metric; or of slots and loss, and the predictions [T, N, …] in a list."""

        def reduce(values: Values, metrics: Metrics, keep: Tensor) -> tuple[dict[str, Tensor], Tensor, list[Tensor]]:
            slots = {n: self.layouts[n].flatten(p) for n, p in kept_sum(keep, values).items()}
            totals = torch.stack([kept_sum(keep, v.double()) for n, v in metrics.items() if n != PREDICTION])
            return slots, totals, [v for n, v in metrics.items() if n == PREDICTION]

        if self.walks_back:
            values, metrics = self._mixed(_Shard(self, run, self.flat(theta), tasks, keys, meta_step))
            return run("sum", reduce, values, metrics, keep)

        def whole(
            vectors: dict[str, Tensor],
            tasks: Task,
            indices: Tensor,
            key_step: StepIndex,
            meta_step: StepIndex,
            keep: Tensor,
        ) -> tuple[dict[str, Tensor], Tensor, list[Tensor]]:
            single = self._single(self.named(vectors), replace(keys, meta_step=key_step), meta_step)
            return reduce(*vmap(single)(tasks, indices), keep)

        return run("shard", whole, self.flat(theta), tasks, keys.tasks, keys.meta_step, meta_step, keep)

    @property
    def cannot_walk_back(self) -> str | None:
        """Return the reason why mixed differentiation is impossible, or None."""
        if self.algorithm.contribution == "delta":
            return "the algorithm contributes a delta, and differentiates through nothing"
        name = type(self.algorithm).__name__
        if not isinstance(self.algorithm, InnerLoop):
            return f"{name} has no inner loop stated by descent()"
        if overridden := self.algorithm.overridden:
            return f"{name} overrides {overridden}(), which only unrolled differentiation follows (override update())"
        return None

    @property
    def walks_back(self) -> bool:
        """Whether differentiation is mixed: back over the inner steps."""
        return self.engine.differentiation == "mixed" and self.cannot_walk_back is None

    def context(self, keys: TaskKey, index: Tensor, meta_step: StepIndex, task: Task) -> TaskContext:
        """Return the training context of ``task``, with ``index``, a scalar."""
        return TaskContext(replace(keys, tasks=index), meta_step, True, self.family, task_ways=task.ways)

    def flat(self, theta: Theta) -> dict[str, Tensor]:
        """Return θ as one vector for each slot: a call of a compiled graph takes longer the more arguments it has."""
        return {n: self.layouts[n].flatten(p) for n, p in theta.items()}

    def named(self, vectors: Mapping[str, Tensor]) -> dict[str, Parameters]:
        """Return θ of ``flat``'s vectors."""
        return {n: self.layouts[n].unflatten(v) for n, v in vectors.items()}

    def _learned(self, theta: Theta) -> Values:
        return {n: theta[n] for n in self.learned}

    def _metrics(self, context: TaskContext, loss: Tensor, prediction: Tensor, task: Task) -> Metrics:
        if task.query.mask is not None:
            return {"loss": loss, PREDICTION: context.possible(prediction)}
        return {"loss": loss, self.family.metric_name: context.metric(prediction, task.query)}

    # Unrolled: through the recorded inner loop ------------------------------------------------------------------------

    def _single(
        self, theta: Theta, keys: TaskKey, meta_step: StepIndex
    ) -> Callable[[Task, Tensor], tuple[Values, Metrics]]:
        def single(task: Task, index: Tensor) -> tuple[Values, Metrics]:
            context = self.context(keys, index, meta_step, task)
            model = self.bind(theta, context.key, True)
            if self.algorithm.contribution == "delta":
                phi = self.algorithm.adapt(model, theta, task.support, context)[-1]
                prediction = self.algorithm.predict(model, phi, task.query.x)
                delta = dict(self.algorithm.delta(theta, phi))
                return delta, self._metrics(context, context.loss(prediction, task.query), prediction, task)

            def objective(learned: Values) -> tuple[Tensor, tuple[Tensor, Tensor]]:
                given = {**theta, **learned}
                trajectory = self.algorithm.adapt(model, given, task.support, context)
                loss, prediction = self.algorithm.objective(model, given, trajectory, task, context)
                return loss, (loss.detach(), prediction.detach())

            gradient, (loss, prediction) = grad(objective, has_aux=True)(self._learned(theta))
            return gradient, self._metrics(context, loss, prediction, task)

        return single

    # Mixed: back over the inner steps ---------------------------------------------------------------------------------

    def _mixed(self, shard: _Shard) -> tuple[Values, Metrics]:
        """Compute ∇θ by the reverse recursion λ_t = ∂U/∂φᵀ λ_{t+1} + ∇²L c over the inner steps U.

        Only the states (φ_t, moments) stay in memory; the way back recomputes each step (Kemaev et al. 2025, sec. 3).
        """
        steps = self.algorithm.inner_steps
        states = [shard.piece("start", self._start)]
        for step in range(steps):
            states.append(shard.piece("step", self._step, (states[-1],), (step,)))
        judged = states if self.algorithm.whole_trajectory else states[-1:]
        gradient, cotangents, pulled, metrics = shard.piece("outer", self._outer, (judged,))
        cotangents = [*[()] * (len(states) - len(judged)), *cotangents]
        cotangent = cotangents.pop()
        for step in reversed(range(steps)):
            # No name may hold a state or a cotangent that was used: it would stay in memory.
            cotangent, pulled = shard.piece(
                "back", self._back, (states[step], cotangent, pulled, cotangents.pop()), (step,)
            )
            states.pop()
        return shard.piece("end", self._end, (gradient, cotangent, pulled)), metrics

    def descent(self, context: TaskContext, theta: Theta, task: Task) -> Descent:
        """Return the inner loop of one task. The algorithm must be an ``InnerLoop`` (``cannot_walk_back`` is None)."""
        return self._inner_loop.descent(self.bind(theta, context.key, True), theta, task.support, context)

    @property
    def _inner_loop(self) -> InnerLoop:
        assert isinstance(self.algorithm, InnerLoop)
        return self.algorithm

    def _start(self, bound: _BoundTask) -> InnerState:
        phi, moments = bound.descent().start
        if self.engine.compile:
            # A number would be a constant of each step's graph, and each step would be compiled.
            count = torch.full((), float(moments.count), dtype=torch.float64, device=self.model.device)
            moments = replace(moments, count=count, counted=True)
        return phi, moments

    def _step(self, bound: _BoundTask, state: InnerState, step: StepIndex) -> InnerState:
        return self._inner_loop.step(bound.descent(), state, step)

    def _outer(self, bound: _BoundTask, states: list[InnerState]) -> tuple[Values, list[Cotangent], Values, Metrics]:
        """Differentiate the objective: by θ directly, by the states, and zeros, where the steps' gradients add up."""

        def objective(learned: Values, states: list[InnerState]) -> tuple[Tensor, tuple[Tensor, Tensor]]:
            given = {**bound.theta, **learned}
            descent = bound.descent(given)
            trajectory = [descent.finish(*state) for state in states]
            model = self.bind(bound.theta, bound.context.key, True)
            loss, prediction = self.algorithm.objective(model, given, trajectory, bound.task, bound.context)
            return loss, (loss.detach(), prediction.detach())

        (direct, cotangents), (loss, prediction) = grad(objective, argnums=(0, 1), has_aux=True)(
            self._learned(bound.theta), states
        )
        zeros = mapped(torch.zeros_like, self._held(bound.theta))
        return direct, cotangents, zeros, self._metrics(bound.context, loss, prediction, bound.task)

    def _held(self, theta: Theta) -> Values:
        slots = sorted({slot for slot, _ in self.held})
        return {slot: Parameters({n: t for n, t in theta[slot].items() if (slot, n) in self.held}) for slot in slots}

    def _back(
        self,
        bound: _BoundTask,
        state: InnerState,
        cotangent: InnerState,
        pulled: Values,
        outer: Cotangent,
        step: StepIndex,
    ) -> tuple[InnerState, Values]:
        """Go back over one step, from ``state`` to the next state.

        ``cotangent`` is that of the next state, ``pulled`` the sum of the later steps' gradients by θ, and ``outer``
        the objective's direct cotangent of ``state``. Return the cotangent of ``state`` and the new sum.
        """
        held = self._held(bound.theta)

        def descent(held: Values) -> Descent:
            return bound.descent({**bound.theta, **{slot: bound.theta[slot].replace(p) for slot, p in held.items()}})

        if self.engine.hessian == "reverse":

            def stepped(state: InnerState, held: Values) -> InnerState:
                return self._inner_loop.step(descent(held), state, step)

            _, pull = vjp(stepped, state, held)
            through_state, through_held = pull(cotangent)
        else:
            through_state, through_held = self._forward_over_reverse(descent, state, held, cotangent, step)
        if outer:
            through_state = added(through_state, outer)
        return through_state, added(pulled, through_held)

    def _forward_over_reverse(
        self,
        descent: Callable[[Values], Descent],
        state: InnerState,
        held: Values,
        cotangent: InnerState,
        step: StepIndex,
    ) -> tuple[InnerState, Values]:
        here, (phi, moments) = descent(held), state
        # The derivative of a linear update needs no value of the gradient, unless a rate multiplies that value.
        linear = self._inner_loop.update_is_linear and not isinstance(here.rate, (Parameters, Tensor))
        gradient: Parameters = phi.zeros() if linear else grad(here.loss)(phi, step)

        def update(phi: Parameters, moments: Moments, gradient: Parameters, held: Values) -> InnerState:
            return self._inner_loop.update(phi, gradient, descent(held).rate, moments)

        _, pull = vjp(update, phi, moments, gradient, held)
        through_phi, through_moments, tangent, through_rate = pull(cotangent)
        if here.first_order:
            return (through_phi, through_moments), through_rate

        def gradients(phi: Parameters, held: Values) -> tuple[Parameters, Values]:
            result: tuple[Parameters, Values] = grad(lambda phi, held: descent(held).loss(phi, step), argnums=(0, 1))(
                phi, held
            )
            return result

        zeros = mapped(torch.zeros_like, held)
        _, (curved, crossed) = jvp(gradients, (phi, held), (tangent, zeros))
        return (through_phi + curved, through_moments), added(through_rate, crossed)

    def _end(self, bound: _BoundTask, gradient: Values, cotangent: InnerState, pulled: Values) -> Values:
        """Add the direct gradient, the gradient by way of φ_0's dependence on θ, and that of the steps."""

        def start(learned: Values) -> InnerState:
            return self._start(replace(bound, theta={**bound.theta, **learned}))

        _, pull = vjp(start, self._learned(bound.theta))
        (first,) = pull(cotangent)
        total = added(gradient, first)
        for slot, values in pulled.items():
            total[slot] = total[slot].replace({n: total[slot][n] + t for n, t in values.items()})
        return total


@dataclass(frozen=True)
class _BoundTask:
    """One task under ``vmap``, with its context and θ."""

    gradient: MetaGradient
    context: TaskContext
    theta: Theta
    task: Task

    def descent(self, theta: Theta | None = None) -> Descent:
        """Return the task's inner loop under its own θ or another."""
        return self.gradient.descent(self.context, self.theta if theta is None else theta, self.task)


@dataclass(frozen=True)
class _Shard:
    """Run the pieces of a shard's mixed gradient over its tasks; ``vectors`` is θ.

    Each piece is a separate function, so that compilation takes as long for fifty inner steps as for one.
    """

    gradient: MetaGradient
    run: TensorCall
    vectors: dict[str, Tensor]
    tasks: Task
    keys: TaskKey
    meta_step: int

    def piece(
        self, name: str, single: Callable[..., T], each: tuple[object, ...] = (), shared: tuple[StepIndex, ...] = ()
    ) -> T:
        """Run ``single(bound_task, *each, *shared)`` over the tasks; ``each`` and the results are stacked [T, …]."""
        count = len(each)

        def whole(
            vectors: dict[str, Tensor],
            tasks: Task,
            indices: Tensor,
            key_step: StepIndex,
            meta_step: StepIndex,
            *rest: object,
        ) -> T:
            keys, theta = replace(self.keys, meta_step=key_step), self.gradient.named(vectors)
            stacked, common = rest[:count], rest[count:]

            def one(task: Task, index: Tensor, *own: object) -> T:
                context = self.gradient.context(keys, index, meta_step, task)
                return single(_BoundTask(self.gradient, context, theta, task), *own, *common)

            result: T = vmap(one)(tasks, indices, *stacked)
            return mapped(apart, result)

        keys = self.keys
        return self.run(
            name, whole, self.vectors, self.tasks, keys.tasks, keys.meta_step, self.meta_step, *each, *shared
        )


def held_by_steps(gradient: MetaGradient, theta: Theta, task: Task, key: TaskKey) -> Names:
    """Find the tensors of θ that an inner step depends on besides its state.

    Ordinary autograd finds them: it distinguishes None (no dependence) from zero, which ``torch.func`` does not.
    """
    leaves = {
        (slot, n): t.detach().clone().requires_grad_() for slot in gradient.learned for n, t in theta[slot].items()
    }
    with torch.enable_grad():
        given = {**theta, **{slot: Parameters({n: leaves[slot, n] for n in theta[slot]}) for slot in gradient.learned}}
        context = gradient.context(key, key.tasks, 0, task)
        descent = gradient.descent(context, given, task)
        phi = descent.phi.map(lambda t: t.detach().clone().requires_grad_())
        outputs = [descent.loss(phi, step) for step in range(gradient.algorithm.inner_steps)]
        outputs += [t.sum() for t in pytree.tree_leaves(descent.rate) if isinstance(t, Tensor)]
        outputs = [o for o in outputs if o.requires_grad]
        if not outputs:
            return frozenset()
        found = torch.autograd.grad(sum(outputs[1:], outputs[0]), list(leaves.values()), allow_unused=True)
    return frozenset(name for name, g in zip(leaves, found) if g is not None)
