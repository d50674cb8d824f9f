"""What one task contributes, and its sum over the tasks of a shard: differentiation through the inner loop, or back over its steps.

``vmap`` is of the *per-task* gradient throughout: differentiating through a vmapped loss is wrong for batch norm's
second order.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.utils._pytree as pytree
from torch import Tensor, func
from torch.func import grad, vmap

from metadist.core.algorithm import Algorithm, TaskContext, Theta
from metadist.core.engine import Engine
from metadist.core.inner_loop import InnerLoop, InnerState
from metadist.core.model import BoundModel, Model
from metadist.core.parameters import Layout, Parameters
from metadist.core.random import TaskKey
from metadist.core.task import Task, TaskFamily
from metadist.engine.convolution import REPLACEMENTS

Values = dict[str, Parameters]
"""Slot → gradient or delta."""
Metrics = dict[str, Tensor]
Names = frozenset[tuple[str, str]]
"""(slot, tensor) pairs."""
Run = Callable[..., Any]
"""``run(name, function, *arguments)``: a function of tensors, called as it is or compiled."""


#: typed as returning two or three values
vjp: Any = func.vjp
jvp: Any = func.jvp

BUFFERS = "buffers."


def fixed(theta: Theta) -> dict[str, Tensor]:
    """Frozen parameters and buffers, by name."""
    return {n: t for slot in theta if slot == "frozen" or slot.startswith(BUFFERS) for n, t in theta[slot].items()}


def directly(name: str, function: Callable[..., Any], *arguments: Any) -> Any:
    return function(*arguments)


def tree_sum(stacked: Tensor) -> Tensor:
    """The sum over the leading dimension as a balanced binary tree, like ``TreeSum``: the sums of complete subtrees
    (chunks of a power of two) can be summed on without changing a bit."""
    terms = list(stacked.unbind(0))
    while len(terms) > 1:
        terms = [torch.add(*terms[i : i + 2]) if i + 1 < len(terms) else terms[i] for i in range(0, len(terms), 2)]
    return terms[0]


def kept_sum(keep: Tensor, tree: Any) -> Any:
    """Σ of every tensor [T, …] over the tasks that ``keep`` [T] holds true for."""

    def total(t: Tensor) -> Tensor:
        return tree_sum(torch.where(keep.view(-1, *(1,) * (t.dim() - 1)), t, torch.zeros_like(t)))

    return pytree.tree_map(total, tree)


@dataclass(frozen=True)
class MetaGradient:
    """Per-task contributions of one algorithm. ``learned`` names the slots whose rule is ``gradient``; ``held`` what an
    inner step depends on besides φ (mixed differentiation follows no other path)."""

    algorithm: Algorithm
    model: Model
    family: TaskFamily
    learned: tuple[str, ...]
    layouts: Mapping[str, Layout]
    engine: Engine = Engine()
    held: Names = frozenset()

    def bind(self, theta: Theta, key: TaskKey | None, training: bool) -> BoundModel:
        return self.model.bind(fixed(theta), key, training, self.engine, REPLACEMENTS if self.engine.compile else None)

    def values(self, theta: Theta, tasks: Task, keys: TaskKey, meta_step: int) -> tuple[Values, Metrics]:
        """Every task's gradient (or delta), and its loss and metric on the query set, stacked [T, …]; never compiled."""
        if self.walks_back:
            return self._mixed(directly, theta, tasks, keys, meta_step)
        return vmap(self._single(theta, keys, meta_step))(tasks, keys.tasks)

    def sums(
        self, run: Run, theta: Theta, tasks: Task, keys: TaskKey, meta_step: int, keep: Tensor
    ) -> tuple[dict[str, Tensor], Tensor]:
        """Σ of ``values`` over the tasks that ``keep`` [T] holds true for: slot vectors, and metrics [2] in float64."""

        def reduce(values: Values, metrics: Metrics, keep: Tensor) -> tuple[dict[str, Tensor], Tensor]:
            slots = {n: self.layouts[n].flatten(p) for n, p in kept_sum(keep, values).items()}
            return slots, torch.stack([kept_sum(keep, v.double()) for v in metrics.values()])

        if self.walks_back:
            values, metrics = self._mixed(run, theta, tasks, keys, meta_step)
            return run("sum", reduce, values, metrics, keep)

        def whole(
            vectors: dict[str, Tensor], tasks: Task, indices: Tensor, key_step: Any, meta_step: Any, keep: Tensor
        ) -> Any:
            single = self._single(self._named(vectors), replace(keys, meta_step=key_step), meta_step)
            return reduce(*vmap(single)(tasks, indices), keep)

        return run("shard", whole, self._flat(theta), tasks, keys.tasks, keys.meta_step, meta_step, keep)

    @property
    def cannot_walk_back(self) -> str | None:
        """Why there are no inner steps to walk back over, or None."""
        if self.algorithm.contribution == "delta":
            return "the algorithm contributes a delta, and differentiates through nothing"
        if not isinstance(self.algorithm, InnerLoop) or type(self.algorithm).adapt is not InnerLoop.adapt:
            return f"{type(self.algorithm).__name__} has no inner loop stated by descent()"
        return None

    @property
    def walks_back(self) -> bool:
        return self.engine.differentiation == "mixed" and self.cannot_walk_back is None

    def context(self, keys: TaskKey, index: Tensor, meta_step: Any) -> TaskContext:
        return TaskContext(replace(keys, tasks=index), meta_step, True, self.family)

    def _flat(self, theta: Theta) -> dict[str, Tensor]:
        """θ as few tensors: what a compiled graph takes to be called depends on the number of its arguments."""
        return {n: self.layouts[n].flatten(p) for n, p in theta.items()}

    def _named(self, vectors: Mapping[str, Tensor]) -> dict[str, Parameters]:
        return {n: self.layouts[n].unflatten(v) for n, v in vectors.items()}

    def _learned(self, theta: Theta) -> Values:
        return {n: theta[n] for n in self.learned}

    def _metrics(self, context: TaskContext, loss: Tensor, prediction: Tensor, task: Task) -> Metrics:
        return {"loss": loss, self.family.metric_name: context.metric(prediction, task.query)}

    # Through the inner loop -------------------------------------------------------------------------------------------

    def _single(self, theta: Theta, keys: TaskKey, meta_step: Any) -> Callable[[Task, Tensor], tuple[Values, Metrics]]:
        def single(task: Task, index: Tensor) -> tuple[Values, Metrics]:
            context = self.context(keys, index, meta_step)
            model = self.bind(theta, context.key, True)
            if self.algorithm.contribution == "delta":
                phi = self.algorithm.adapt(model, theta, task.support, context)[-1]
                prediction = self.algorithm.predict(model, phi, task.query.x)
                delta = self.algorithm.delta(theta, phi)
                return delta, self._metrics(context, context.loss(prediction, task.query), prediction, task)

            def objective(learned: Values) -> tuple[Tensor, tuple[Tensor, Tensor]]:
                given = {**theta, **learned}
                trajectory = self.algorithm.adapt(model, given, task.support, context)
                loss, prediction = self.algorithm.objective(model, given, trajectory, task, context)
                return loss, (loss.detach(), prediction.detach())

            gradient, (loss, prediction) = grad(objective, has_aux=True)(self._learned(theta))
            return gradient, self._metrics(context, loss, prediction, task)

        return single

    # Back over the inner steps ----------------------------------------------------------------------------------------

    def _mixed(self, run: Run, theta: Theta, tasks: Task, keys: TaskKey, meta_step: int) -> tuple[Values, Metrics]:
        """∇θ by the reverse recursion λ_t = ∂U/∂φᵀ λ_{t+1} + ∇²L c over the inner steps U (Kemaev et al. 2025, section 3).

        Only the states (φ_t, moments) are stored; each step is computed anew on the way back. Every piece is a function of
        its own, so that compiling takes as long for fifty steps as for one.
        """
        algorithm: Any = self.algorithm
        steps, vectors = algorithm.inner_steps, self._flat(theta)

        def over_tasks(single: Callable[..., Any], batched: int) -> Callable[..., Any]:
            """``single(context, theta, task, *batched, *shared)`` over the tasks of a shard."""

            def whole(
                vectors: dict[str, Tensor], tasks: Task, indices: Tensor, key_step: Any, meta_step: Any, *rest: Any
            ) -> Any:
                here, theta = replace(keys, meta_step=key_step), self._named(vectors)
                each, shared = rest[:batched], rest[batched:]

                def one(task: Task, index: Tensor, *each: Any) -> Any:
                    return single(self.context(here, index, meta_step), theta, task, *each, *shared)

                return pytree.tree_map(_apart, vmap(one)(tasks, indices, *each))

            return whole

        def piece(
            name: str, single: Callable[..., Any], each: tuple[Any, ...] = (), shared: tuple[Any, ...] = ()
        ) -> Any:
            return run(
                name,
                over_tasks(single, len(each)),
                vectors,
                tasks,
                keys.tasks,
                keys.meta_step,
                meta_step,
                *each,
                *shared,
            )

        states = [piece("start", self._start)]
        for step in range(steps):
            states.append(piece("step", self._step, (states[-1],), (step,)))
        judged = states if algorithm.whole_trajectory else states[-1:]
        gradient, cotangents, held, metrics = piece("outer", self._outer, (judged,))
        cotangents = [()] * (len(states) - len(judged)) + cotangents  # () : no pull; vmap takes no None
        back = cotangents.pop()
        for step in reversed(range(steps)):
            extra = cotangents.pop()
            back, held = piece("back", self._back, (states[step], back, held, extra), (step,))
            states.pop()
        return piece("end", self._end, (gradient, back, held)), metrics

    def _start(self, context: TaskContext, theta: Theta, task: Task) -> InnerState:
        phi, moments = self.descent(context, theta, task).start
        if self.engine.compile and moments.first:
            # As a number it would be a constant of every step's graph, each to be compiled.
            moments = replace(
                moments,
                count=torch.full((), float(moments.count), dtype=self.model.dtype, device=self.model.device),
                counted=True,
            )
        return phi, moments

    def descent(self, context: TaskContext, theta: Theta, task: Task) -> Any:
        algorithm: Any = self.algorithm
        return algorithm.descent(self.bind(theta, context.key, True), theta, task.support, context)

    def _step(self, context: TaskContext, theta: Theta, task: Task, state: InnerState, step: Any) -> InnerState:
        algorithm: Any = self.algorithm
        return algorithm.step(self.descent(context, theta, task), state, step)

    def _outer(
        self, context: TaskContext, theta: Theta, task: Task, states: list[InnerState]
    ) -> tuple[Values, list[InnerState], Values, Metrics]:
        """∂ of the objective with respect to θ directly, and to the states; and nothing yet of what the steps pull on."""

        def objective(learned: Values, states: list[InnerState]) -> tuple[Tensor, tuple[Tensor, Tensor]]:
            given = {**theta, **learned}
            descent = self.descent(context, given, task)
            trajectory = [descent.finish(*state) for state in states]
            model = self.bind(theta, context.key, True)
            loss, prediction = self.algorithm.objective(model, given, trajectory, task, context)
            return loss, (loss.detach(), prediction.detach())

        (direct, cotangents), (loss, prediction) = grad(objective, argnums=(0, 1), has_aux=True)(
            self._learned(theta), states
        )
        nothing = pytree.tree_map(torch.zeros_like, self._held(theta))
        return direct, cotangents, nothing, self._metrics(context, loss, prediction, task)

    def _held(self, theta: Theta) -> Values:
        slots = sorted({slot for slot, _ in self.held})
        return {slot: Parameters({n: t for n, t in theta[slot].items() if (slot, n) in self.held}) for slot in slots}

    def _back(
        self,
        context: TaskContext,
        theta: Theta,
        task: Task,
        state: InnerState,
        back: InnerState,
        before: Values,
        extra: Any,
        step: Any,
    ) -> tuple[InnerState, Values]:
        """(λ of the state before the step, what its pull on θ adds up to) from λ of the state behind it."""
        algorithm: Any = self.algorithm
        held = self._held(theta)

        def descent(held: Values) -> Any:
            return self.descent(context, {**theta, **{slot: theta[slot].replace(p) for slot, p in held.items()}}, task)

        if self.engine.hessian == "reverse":

            def stepped(state: InnerState, held: Values) -> InnerState:
                return algorithm.step(descent(held), state, step)

            _, pull = vjp(stepped, state, held)
            pulled, pulled_held = pull(back)
        else:
            pulled, pulled_held = self._forward_over_reverse(descent, state, held, back, step)
        if extra:
            pulled = _add(pulled, extra)
        return pulled, _add(before, pulled_held)

    def _forward_over_reverse(
        self, descent: Callable[[Values], Any], state: InnerState, held: Values, back: InnerState, step: Any
    ) -> tuple[InnerState, Values]:
        algorithm: Any = self.algorithm
        here, (phi, moments) = descent(held), state
        # The update of plain SGD is linear in the gradient: its derivative doesn't need to know it.
        linear = algorithm.inner_optimizer == "sgd" and not isinstance(here.rate, (Parameters, Tensor))
        gradient = phi.zeros() if linear else grad(here.loss)(phi, step)

        def update(phi: Parameters, moments: Any, gradient: Parameters, held: Values) -> InnerState:
            return algorithm.update(phi, gradient, descent(held).rate, moments)

        _, pull = vjp(update, phi, moments, gradient, held)
        through_phi, through_moments, tangent, through_rate = pull(back)
        if here.first_order:
            return (through_phi, through_moments), through_rate

        def gradients(phi: Parameters, held: Values) -> Any:
            return grad(lambda phi, held: descent(held).loss(phi, step), argnums=(0, 1))(phi, held)

        still = pytree.tree_map(torch.zeros_like, held)
        _, (curved, crossed) = jvp(gradients, (phi, held), (tangent, still))
        return (through_phi + curved, through_moments), _add(through_rate, crossed)

    def _end(
        self, context: TaskContext, theta: Theta, task: Task, gradient: Values, back: InnerState, held: Values
    ) -> Values:
        """The direct gradient, the pull of the steps, and that of φ_0's dependence on θ."""
        _, pull = vjp(lambda learned: self._start(context, {**theta, **learned}, task), self._learned(theta))
        (first,) = pull(back)
        total = _add(gradient, first)
        for slot, pulled in held.items():
            total[slot] = total[slot].replace({n: total[slot][n] + t for n, t in pulled.items()})
        return total


def _apart(t: Tensor) -> Tensor:
    """With memory of its own: forward mode makes each tangent as its φ lies in memory, be that one row that all tasks share or
    a piece of a vector (as long as the vector, then)."""
    return t if t.untyped_storage().nbytes() == t.nbytes else t.clone(memory_format=torch.contiguous_format)


def _add(a: Any, b: Any) -> Any:
    return pytree.tree_map(torch.add, a, b)


def held_by_steps(gradient: MetaGradient, theta: Theta, task: Task, key: TaskKey) -> Names:
    """What the first inner step depends on besides its state: found by ordinary autograd, which tells None from zero."""
    algorithm: Any = gradient.algorithm
    leaves = {
        (slot, n): t.detach().clone().requires_grad_() for slot in gradient.learned for n, t in theta[slot].items()
    }
    with torch.enable_grad():
        given = {**theta, **{slot: Parameters({n: leaves[slot, n] for n in theta[slot]}) for slot in gradient.learned}}
        context = gradient.context(key, key.tasks, 0)
        descent = gradient.descent(context, given, task)
        phi = descent.phi.map(lambda t: t.detach().clone().requires_grad_())
        outputs = [descent.loss(phi, step) for step in range(algorithm.inner_steps)]
        outputs += [t.sum() for t in pytree.tree_leaves(descent.rate) if isinstance(t, Tensor)]
        outputs = [o for o in outputs if o.requires_grad]
        found = torch.autograd.grad(sum(outputs), list(leaves.values()), allow_unused=True) if outputs else []
    return frozenset(name for name, g in zip(leaves, found) if g is not None)
