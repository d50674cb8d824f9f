"""Compute shards and meta-steps in this process, without an executor: for the properties and for metadist's tests."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from metadist.core.computation import Computation, Gradient
from metadist.core.outer import OuterLoop
from metadist.core.parameters import Parameters
from metadist.core.random import TaskKey, seeded
from metadist.core.round import (
    EvaluationRequest,
    MetaStepKey,
    Report,
    Round,
    Shard,
    WithOutput,
    run_rounds,
)
from metadist.core.state import Contribution, Records, State, TreeSum
from metadist.learners.base import Learner
from metadist.learners.few_shot import FewShotLearner

RUN, META_STEP, META_BATCH = "check", 2, 6
KEY = MetaStepKey(RUN, META_STEP, 0)
#: small enough for seconds, and cut into shards of unequal size
OUTER = OuterLoop(meta_batch_size=META_BATCH, shard_size=4, lr=3e-3)

Run = Callable[[Round], Any]
"""Computes a round and returns its sum, or its records where it does not reduce."""


@dataclass
class Done:
    """The outcome of a meta-step: the new state, its report, and the result of every shard."""

    state: State
    report: Report = field(default_factory=dict)
    results: dict[Shard, Contribution] = field(default_factory=dict)


def compute_round(learner: Learner, round: Round, outputs: dict[Any, Records], results: dict[Shard, Any]) -> Any:
    """Compute the shards of ``round`` one after the other; return their sum, or their records where it does not reduce.

    ``outputs`` receives the outputs that shards keep for later rounds, ``results`` every shard's result.
    """
    total: TreeSum[Contribution] = TreeSum(len(round.shards))
    for shard in round.shards:
        result = compute(learner, shard, round.parameters, outputs)
        results[shard] = result
        if round.reduce:
            total.add(shard.index, result)
    return total.result() if round.reduce else Records.concatenate([results[shard] for shard in round.shards])


def compute(learner: Learner, shard: Shard, state: State, outputs: dict[Any, Records]) -> Any:
    """Compute one shard; put the output that it keeps into ``outputs``."""
    result = learner.compute(shard, state.slots, [outputs[key] for key in shard.needs])
    if isinstance(result, WithOutput):
        outputs[shard.key] = result.output
        return result.result
    return result


def meta_step(
    learner: Learner,
    state: State,
    number: int,
    seed: int = 0,
    watch: Callable[[Round, Any], object] = lambda *_: None,
    run: Run | None = None,
) -> Done:
    """Take meta-step ``number`` from ``state``.

    ``watch(round, sum)`` sees every round; ``run`` computes it elsewhere.
    """
    done, outputs = Done(state), dict[Any, Records]()

    def watched(round: Round) -> Contribution:
        total: Contribution = compute_round(learner, round, outputs, done.results) if run is None else run(round)
        watch(round, total)
        return total

    done.state, done.report = run_rounds(learner.meta_step(MetaStepKey(RUN, number, seed), state), watched)
    return done


def evaluated(learner: Learner, state: State, inner_steps: int | None = None, run: Run | None = None) -> Records:
    """Judge ``state`` on the first tasks of the test split: one row for each task. ``run``: as in ``meta_step``."""
    round = learner.evaluation(EvaluationRequest(KEY, "test", META_BATCH, inner_steps), state)
    found: Records = compute_round(learner, round, {}, {}) if run is None else run(round)
    return found


def shards(learner: Learner, computation: Computation = Gradient(), split: str = "train") -> list[Shard]:
    """Return the shards of a small round."""
    return learner.shards(KEY, computation, tasks=META_BATCH, split=split)


def keys(first: int = 0, count: int = META_BATCH) -> TaskKey:
    """Return the keys of ``count`` training tasks from index ``first``, as those of ``shards``."""
    return TaskKey.of(0, "train", META_STEP, range(first, first + count))


def in_float64(learner: FewShotLearner) -> FewShotLearner:
    """Return the same learner with parameters in float64, unrolled and not compiled, on the data of ``learner``."""
    model = learner.model.in_dtype(torch.float64)
    exact = FewShotLearner(learner.algorithm, model, learner.tasks, learner.outer)
    exact.prepared_like(learner)
    return exact


def general_position(learner: Learner, scale: float = 0.1) -> dict[str, Parameters]:
    """Return θ with every learned value moved a little, so that no gradient is zero by symmetry."""
    generator, theta = seeded(1, "general position"), learner.initial(0).theta(learner.slots)

    def moved(p: Tensor) -> Tensor:
        return p + scale * torch.randn(p.shape, generator=generator, dtype=torch.float64).to(p.dtype)

    return {n: p.map(moved) if learner.slots[n].rule == "gradient" else p for n, p in theta.items()}
