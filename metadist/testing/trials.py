"""The properties of meta-reinforcement learning, which an algorithm, an environment and a policy have together."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import reduce
from typing import Any

import torch

from metadist.core.computation import Evaluate, Gradient, Rollout
from metadist.core.differences import apart_by, difference, not_finite
from metadist.core.model import Model
from metadist.core.outer import OuterLoop
from metadist.core.round import Shard, WithOutput
from metadist.core.state import Contribution, Records, State
from metadist.learners.purity import other_generators
from metadist.learners.trials import TrialLearner
from metadist.rl.algorithm import TrialAlgorithm
from metadist.rl.environment import MetaEnvironment
from metadist.testing import round_trips
from metadist.testing.failures import ImpureError, InexactError, ShapeError, usable
from metadist.testing.running import KEY, META_BATCH, RUN, Done, evaluated, meta_step

FROM_KEY = "draw random numbers from context.keys.stream(name), and keep no state between calls"
#: relative error of a gradient over 6 trials in float64 for another cutting into shards
ROUNDING = 1e-7


def build(
    algorithm: TrialAlgorithm, environment: MetaEnvironment, factory: Any, *, outer: OuterLoop | None = None
) -> TrialLearner:
    """Make the learner that the properties are checked on. ConfigError where the parts do not go together."""
    outer = outer or OuterLoop(
        meta_batch_size=META_BATCH, shard_size=max(1, min(4, META_BATCH // algorithm.minibatches)), lr=1e-2
    )
    learner = TrialLearner(algorithm, Model(factory), environment, outer)
    learner.prepare(torch.device("cpu"))
    return learner


def begins(learner: TrialLearner) -> None:
    """Check that the first trials can be rolled out and learned from."""
    with usable(learner, "a run can begin with it"):
        learner.dry_run(0)


def pure(learner: TrialLearner) -> None:
    """Check that a meta-step changes the state, as a pure function of the seed under any global random state."""
    state = learner.initial(0)
    with usable(learner, "a meta-step can be taken"):
        first = meta_step(learner, state, 0)
    with other_generators(1):
        second, initial = meta_step(learner, learner.initial(0), 0), learner.initial(0)
    property = "a meta-step taken again, with other global random states, gives the same bits"
    if differs := difference(state.slots, initial.slots) or difference(first.state.slots, second.state.slots):
        raise ImpureError(learner, property, differs, FROM_KEY)
    if first.report != second.report:
        raise ImpureError(learner, property, f"it reports {first.report} and then {second.report}", FROM_KEY)
    _learns(learner, state, first)


def _learns(learner: TrialLearner, before: State, done: Done) -> None:
    if not difference(before.slots, done.state.slots):
        remedy = "contribute a gradient to slot 'model', and see that trials have rewards that differ"
        raise ShapeError(learner, "a meta-step changes the parameters", "they stay as they were", remedy)
    if bad := [name for name, value in done.report.items() if not -float("inf") < value < float("inf")]:
        remedy = "divide by no number that may be zero"
        raise ShapeError(learner, "the report of a meta-step is finite", f"{bad[0]} is not", remedy)
    other = meta_step(learner, learner.initial(0), 0, seed=1)
    if not difference(done.state.slots, other.state.slots):
        values = "a meta-step from the same parameters ends in the same bits for seeds 0 and 1"
        raise ImpureError(learner, "trials differ by seed", values, FROM_KEY)


def travels(learner: TrialLearner) -> None:
    """Check that a pickled copy takes the same meta-step, under another state of the global random generators."""
    there = round_trips.pickled(learner, learner)
    there.prepare(torch.device("cpu"))
    with other_generators(2):
        got = meta_step(there, there.initial(0), 0)
    expected = meta_step(learner, learner.initial(0), 0)
    if differs := difference(expected.state.slots, got.state.slots):
        raise ImpureError(learner, "a pickled copy takes the same meta-step", differs, FROM_KEY)


def exact_across_shards(learner: TrialLearner) -> None:
    """Check that the first gradient has the same sum in float64 for any cutting of the trials into shards."""
    exact = replace(learner, model=Model(learner.model.factory, dtype=torch.float64))
    exact.prepared_like(learner)
    vectors = exact.initial(0).slots
    whole = _rolled(exact, vectors, META_BATCH)
    gradient = Gradient(tuple(sorted(learner.algorithm.at(0).settings_of(_statistics(whole)).items())))
    for sizes in ((2, 4), (1,) * META_BATCH):
        parts = _rolled(exact, vectors, *sizes)
        together, apart = (_gradient(exact, vectors, part, gradient) for part in (whole, parts))
        if differs := apart_by(apart.slots, together.slots, ROUNDING):
            raise InexactError(
                learner,
                f"the gradient over {META_BATCH} trials is the same for any cutting into shards",
                f"{differs} between one shard and shards of {sizes} trials",
                "sum over trials and steps; return values that all trials share from settings_of(statistics)",
            )


Rolled = list[tuple[Shard, WithOutput]]


def _rolled(learner: TrialLearner, vectors: Any, *sizes: int) -> Rolled:
    """Roll out the first trials of the training split in shards of these sizes."""
    found = []
    for i, size in enumerate(sizes):
        shard = Shard(RUN, 0, 0, i, Rollout(), sum(sizes[:i]), size, 0, keeps=True)
        result = learner.compute(shard, vectors)
        assert isinstance(result, WithOutput)
        found.append((shard, result))
    return found


def _statistics(rolled: Rolled) -> dict[str, float]:
    total = reduce(Contribution.__add__, [result.result for _, result in rolled])
    return {n: v / total.weight for n, v in total.metrics.items()}


def _gradient(learner: TrialLearner, vectors: Any, rolled: Rolled, gradient: Gradient) -> Contribution:
    found = []
    for shard, result in rolled:
        learning = replace(shard, round=1, computation=gradient, keeps=False)
        one = learner.compute(learning, vectors, [result.output])
        assert isinstance(one, Contribution)
        found.append(one)
    return reduce(Contribution.__add__, found)


def evaluates(learner: TrialLearner) -> None:
    """Check that evaluation has a row for every trial and a finite return for every episode, greedy and sampled."""
    with usable(learner, "trials can be judged"):
        records = evaluated(learner, learner.initial(0))
    expected = [META_BATCH, learner.algorithm.episodes(learner.tasks)]
    for name in ("greedy", "sampled"):
        column = records.columns.get(name)
        if column is None or list(column.shape) != expected or not_finite({name: column}):
            found = "missing" if column is None else f"{column.dtype} {list(column.shape)}"
            raise ShapeError(
                learner,
                f"evaluation gives finite returns {expected} as '{name}'",
                f"'{name}' is {found}"
                + (", with NaN or Inf" if column is not None and not_finite({name: column}) else ""),
                "return a float64 tensor [trials, episodes] for each of 'greedy' and 'sampled' from evaluate()",
            )


def comes_back(learner: TrialLearner) -> None:
    """Check that config, state, checkpoint and messages come back unchanged."""
    round_trips.config(learner.algorithm)
    done = meta_step(learner, learner.initial(0), 0)
    round_trips.state(learner, done.state)
    for shard, result in done.results.items():
        round_trips.result(learner, shard, result)
    shard = learner.shards(KEY, Evaluate(), tasks=META_BATCH, split="test")[0]
    records = learner.compute(shard, learner.initial(0).slots)
    assert isinstance(records, Records)
    round_trips.result(learner, shard, records)


#: name → property, each a function of a learner that raises a PropertyError
TRIAL_PROPERTIES: dict[str, Callable[[TrialLearner], None]] = {
    "begins": begins,
    "pure": pure,
    "travels": travels,
    "exact_across_shards": exact_across_shards,
    "evaluates": evaluates,
    "comes_back": comes_back,
}
