"""The properties of few-shot learning, which an algorithm, a task family and a model have together."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

import torch
from torch.utils import _pytree as pytree

from metadist.core.algorithm import TaskContext, with_inner_steps
from metadist.core.computation import Evaluate
from metadist.core.differences import apart_by, difference, not_finite
from metadist.core.model import Model
from metadist.core.round import Shard
from metadist.core.state import Contribution, Records, TreeSum
from metadist.learners.few_shot import FewShotLearner
from metadist.learners.purity import other_generators
from metadist.testing import round_trips
from metadist.testing.failures import ImpureError, InexactError, ShapeError, WrongGradientError, usable
from metadist.testing.gradients import ROUNDING, check_autograd, check_finite_differences, is_exact
from metadist.testing.running import META_BATCH, META_STEP, OUTER, evaluated, general_position, in_float64, keys, shards

FROM_KEY = "draw random numbers from the task's key (context.key.stream(name)), and keep no state between calls"


def begins(learner: FewShotLearner) -> None:
    """Check that a task of each split can be adapted to and predicted, and that every learned parameter takes part."""
    with usable(learner, "a run can begin with it"):
        learner.dry_run(0)


def fits(learner: FewShotLearner) -> None:
    """Check that a contribution has the metrics, and a finite vector in the layout of every learned slot."""
    state = learner.initial(0)
    for shard in shards(learner):
        slots = {n: learner.slots[n] for n in learner.receivers(shard.computation)}
        with usable(learner, "a shard can be computed"):
            got = learner.compute(shard, state.slots)
        assert isinstance(got, Contribution)
        shown = {n: (v.dtype, tuple(v.shape)) for n, v in got.slots.items()}
        wanted = {n: (slot.layout.dtype, (slot.layout.numel,)) for n, slot in slots.items()}
        for part, found, expected in (
            ("slots", shown, wanted),
            ("metrics", set(got.metrics), {"loss", learner.tasks.metric_name}),
            ("tasks and weight", (got.tasks, got.weight), (shard.count, float(shard.count))),
        ):
            if found != expected:
                raise ShapeError(
                    learner,
                    f"a contribution has the {part} {expected}",
                    f"it has {found}",
                    "contribute one tensor for each parameter of every slot, under its name",
                )
        if name := not_finite(got.slots):
            raise ShapeError(learner, "contributions are finite", f"slot {name} has NaN or Inf", _BOUNDED)
        if not any(vector.any() for vector in got.slots.values()):
            raise ShapeError(learner, "the model learns", "its contribution is zero everywhere", _BOUNDED)


_BOUNDED = "use a smaller inner_lr, and divide by no number that may be zero"


def pure(learner: FewShotLearner) -> None:
    """Check that a shard and the initial state have the same bits under any state of the global random generators."""
    state, shard = learner.initial(0), shards(learner)[0]
    first = learner.compute(shard, state.slots)
    assert isinstance(first, Contribution)
    for salt in (1, 2):
        with other_generators(salt):
            second, other = learner.compute(shard, state.slots), learner.initial(0)
        assert isinstance(second, Contribution)
        property = "a shard computed again, with other global random states, gives the same bits"
        if differs := difference(first.slots, second.slots):
            raise ImpureError(learner, property, differs, FROM_KEY)
        if dict(first.metrics) != dict(second.metrics):
            values = f"its metrics are {dict(first.metrics)} and then {dict(second.metrics)}"
            raise ImpureError(learner, property, values, FROM_KEY)
        if differs := difference(state.slots, other.slots):
            property = "the initial state is the same for the same seed"
            raise ImpureError(
                learner.model.module, property, differs, "initialise parameters by torch's functions alone"
            )


def travels(learner: FewShotLearner) -> None:
    """Check that a pickled copy computes the same bits, under another state of the global random generators."""
    state, shard = learner.initial(0), shards(learner)[1]
    there = round_trips.pickled(learner, learner)
    there.prepare(torch.device("cpu"))
    with other_generators(3):
        got, initial = there.compute(shard, state.slots), there.initial(0)
    expected = learner.compute(shard, state.slots)
    assert isinstance(got, Contribution) and isinstance(expected, Contribution)
    if differs := difference(expected.slots, got.slots) or difference(state.slots, initial.slots):
        raise ImpureError(learner, "a pickled copy computes the same bits", differs, FROM_KEY)


def exact_across_shards(learner: FewShotLearner) -> None:
    """Check that the canonical sum has the same bits in any order and by blocks, and up to rounding for any cutting."""
    state = learner.initial(0)
    shard = shards(learner)[0]
    four = [replace(shard, index=i, start=i, count=1) for i in range(4)]
    expected = _tree_sum({i: _contribution(learner, four[i], state.slots) for i in (0, 1, 2, 3)})
    again = {i: _contribution(learner, four[i], state.slots) for i in (3, 1, 0, 2)}
    blocks: TreeSum[Contribution] = TreeSum(len(four))
    for first in (2, 0):
        blocks.add(first, again[first] + again[first + 1], leaves=2)
    for found in (_tree_sum(again), blocks.result()):
        if differs := difference(expected.slots, found.slots):
            property = "the sum over shards has the same bits in any order of computing them"
            raise ImpureError(learner, property, differs, FROM_KEY)
    _same_for_any_cutting(learner)


def _tree_sum(parts: Mapping[int, Contribution]) -> Contribution:
    tree: TreeSum[Contribution] = TreeSum(len(parts))
    for index, part in parts.items():
        tree.add(index, part)
    return tree.result()


def _contribution(learner: FewShotLearner, shard: Shard, vectors: Mapping[str, torch.Tensor]) -> Contribution:
    found = learner.compute(shard, vectors)
    assert isinstance(found, Contribution)
    return found


def _same_for_any_cutting(learner: FewShotLearner) -> None:
    exact = in_float64(learner)
    theta = general_position(exact)
    together = exact.contribute(theta, keys(), META_STEP)
    apart = _tree_sum({i: exact.contribute(theta, keys(i, 1), META_STEP) for i in range(META_BATCH)})
    if differs := apart_by(apart.slots, together.slots, ROUNDING):
        raise InexactError(
            learner,
            f"the sum over {META_BATCH} tasks is the same for any cutting into shards",
            f"{differs} between one shard and {META_BATCH} shards",
            "compute each task from its own examples and θ alone; metadist divides by the number of tasks",
        )


def evaluates(learner: FewShotLearner) -> None:
    """Check that evaluation has a row for every task and a column for every number of adaptation steps, all finite."""
    state = learner.initial(0)
    own, listed = learner.algorithm.inner_steps, learner.tasks.listed_tasks("test")
    rows = META_BATCH if listed is None else min(META_BATCH, listed)
    for steps in (None, 0, 3):
        with usable(learner, "tasks can be judged"):
            records = evaluated(learner, state, steps)
        expected = (rows, 1 + (own if steps is None else _steps_of(learner, steps)))
        for name in ("loss", learner.tasks.metric_name):
            column = records.columns[name]
            if tuple(column.shape) != expected or column.dtype != torch.float64 or not_finite({name: column}):
                raise ShapeError(
                    learner,
                    f"evaluation with inner_steps={steps} gives finite values {list(expected)} of each metric",
                    f"'{name}' is {column.dtype} {list(column.shape)}"
                    + (", with NaN or Inf" if not_finite({name: column}) else ""),
                    "return φ_0 … φ_k from adapt(), one for each step of inner_steps",
                )
        if records.columns["task"].tolist() != list(range(rows)):
            raise ShapeError(learner, "evaluation has a row for each task", f"{records.columns['task']}", "")


def _steps_of(learner: FewShotLearner, steps: int) -> int:
    """Return the number of adaptation steps where ``steps`` are asked for."""
    return with_inner_steps(learner.algorithm, steps).inner_steps


def comes_back(learner: FewShotLearner) -> None:
    """Check that config, state, checkpoint and messages come back unchanged."""
    round_trips.config(learner.algorithm)
    state, shard = learner.initial(0), shards(learner)[0]
    total = _contribution(learner, shard, state.slots)
    state, _ = learner.outer.update({n: learner.slots[n] for n in total.slots}, state, total, 0)
    round_trips.state(learner, state)
    round_trips.result(learner, shard, total)
    judging = shards(learner, Evaluate(), "test")[0]
    records = learner.compute(judging, state.slots)
    assert isinstance(records, Records)
    round_trips.result(learner, judging, records)


def right_gradient(learner: FewShotLearner) -> None:
    """Check contributions in float64 against ordinary autograd, and exact gradients against finite differences too."""
    check_autograd(learner)
    if is_exact(learner):
        check_finite_differences(learner)


#: name → property, each a function of a learner that raises a PropertyError
FEW_SHOT_PROPERTIES: dict[str, Callable[[FewShotLearner], None]] = {
    "begins": begins,
    "fits": fits,
    "pure": pure,
    "travels": travels,
    "exact_across_shards": exact_across_shards,
    "evaluates": evaluates,
    "comes_back": comes_back,
    "right_gradient": right_gradient,
}


def points_downhill(learner: FewShotLearner) -> None:
    """Check that a delta has a positive product with the slope of the query loss, on either side of the optima.

    ``learner`` learns ``Quadratics``; the slope is that before adaptation. Every method that moves θ towards the tasks'
    optima has this property.
    """
    exact, some = in_float64(learner), keys()
    tasks = exact.sample(some)
    for place in (0.5, 10.0):
        theta = {**exact.initial(0).theta(exact.slots)}
        theta["model"] = theta["model"].map(lambda t, place=place: torch.full_like(t, place))
        slope = torch.zeros(exact.slots["model"].layout.numel, dtype=torch.float64)
        for i, key in enumerate(some.each()):
            task = pytree.tree_map(lambda t, i=i: t[i], tasks)
            leaves = {**theta, "model": theta["model"].map(lambda t: t.detach().clone().requires_grad_())}
            context, model = TaskContext(key, META_STEP, True, exact.tasks), exact.bind(leaves, key, True)
            phi = exact.algorithm.adapt(model, leaves, task.support, context)[0]
            loss = context.loss(exact.algorithm.predict(model, phi, task.query.x), task.query)
            slope += torch.cat([g.flatten() for g in torch.autograd.grad(loss, list(leaves["model"].values()))])
        delta = exact.contribute(theta, some, META_STEP).slots["model"]
        cosine = float(delta @ slope) / (float(delta.norm() * slope.norm()) or 1.0)
        if not cosine > 0:
            raise WrongGradientError(
                learner,
                "minus its delta points downhill on quadratic tasks",
                f"at θ = {place} the cosine between delta and slope is {cosine:.3g}; the tasks' optima lie around 4",
                "return θ − φ_k (Reptile): it has the sign of a gradient, and is zero where adaptation changes nothing",
            )


def build(algorithm: Any, tasks: Any, factory: Any) -> FewShotLearner:
    """Make the learner that the properties are checked on. ConfigError where the parts do not go together."""
    learner = FewShotLearner(algorithm, Model(factory), tasks, OUTER)
    learner.prepare(torch.device("cpu"))
    return learner
