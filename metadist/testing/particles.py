"""The properties of an algorithm with carried state, which it has together with tasks and a model."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from metadist.core.carried import CarriedAlgorithm
from metadist.core.computation import Advance
from metadist.core.differences import apart_by, difference
from metadist.core.model import Model
from metadist.core.outer import OuterLoop
from metadist.core.parameters import Parameters
from metadist.core.round import Shard
from metadist.core.state import Contribution, Records, State
from metadist.core.task import TaskFamily
from metadist.learners.carried import CarriedLearner
from metadist.testing import round_trips
from metadist.testing.carried import Population
from metadist.testing.failures import ImpureError, InexactError, RoundTripError, usable
from metadist.testing.running import META_BATCH, compute_round, evaluated, meta_step
from metadist.wire.codec import ResultHeader, decode_output, output_parts

FROM_KEY = "draw random numbers from context.key or context.life, and keep no state but the one that is returned"
#: meta-steps that are compared, and the relative error of a contribution in float64 under vmap
STEPS, ROUNDING = 3, 1e-7
_ADVANCE = Advance()


def build(algorithm: CarriedAlgorithm, family: TaskFamily, factory: Any) -> CarriedLearner:
    """Make the learner that the properties are checked on. ConfigError where the parts do not go together."""
    learner = CarriedLearner(algorithm, Model(factory), family, OuterLoop(meta_batch_size=META_BATCH, shard_size=4))
    learner.prepare(torch.device("cpu"))
    return learner


def begins(learner: CarriedLearner) -> None:
    """Check that particles can be advanced and evaluated, twice with the same bits, and contribute to every slot."""
    with usable(learner, "a run can begin with it"):
        learner.dry_run(0)


def as_in_plain_python(learner: CarriedLearner) -> None:
    """Check in float64 that shards contribute the sum of particles that advance one by one, without vmap."""
    model = Model(learner.model.factory, dtype=torch.float64, freeze=learner.model.freeze)
    exact = CarriedLearner(learner.algorithm, model, learner.tasks, learner.outer)
    exact.prepare(torch.device("cpu"))
    population, outputs = Population(learner.algorithm, model, learner.tasks, size=META_BATCH), dict[Any, Records]()
    state = exact.initial(0)
    for number in range(STEPS):
        each = population.advance(state.theta(exact.slots), number)
        weights = [float(c.weight) for c in each]
        found: list[Contribution] = []
        state = _advanced(exact, state, number, outputs, found)
        for name in found[0].slots:
            layout = exact.slots[name].layout
            expected = sum(w * layout.flatten(Parameters(c.slots[name])) for w, c in zip(weights, each))
            apart = apart_by({name: found[0].slots[name]}, {name: torch.as_tensor(expected)}, ROUNDING)
            if apart:
                raise InexactError(
                    learner,
                    "particles advance the same way under vmap in shards, and one by one",
                    f"in meta-step {number} the contributions differ: {apart}",
                    "use no value of another particle, and no branch that depends on vmap; else set vectorized = False",
                )


def _advanced(
    learner: CarriedLearner, state: State, number: int, outputs: dict[Any, Records], found: list[Contribution]
) -> State:
    def run(round: Any) -> Any:
        total = compute_round(learner, round, outputs, {})
        found.append(total)
        return total

    return meta_step(learner, state, number, run=run).state


def states_travel(learner: CarriedLearner) -> None:
    """Check that a state that travelled as a frame is advanced to the same bits."""
    outputs: dict[Any, Records] = {}
    state = _advanced(learner, learner.initial(0), 0, outputs, [])
    there = {}
    for (number, round, index), output in outputs.items():
        shard = Shard("check", number, round, index, _ADVANCE, 0, output.rows, 0, keeps=True)
        there[number, round, index] = decode_output(output_parts(output, ResultHeader(shard, 0, "check")), shard)
    here = _advanced(learner, state, 1, outputs, [])
    if differs := difference(dict(here.slots), dict(_advanced(learner, state, 1, there, []).slots)):
        raise RoundTripError(
            learner, "a state that travelled is advanced to the same bits", differs, "return contiguous tensors"
        )


def travels(learner: CarriedLearner) -> None:
    """Check that a pickled copy takes the same meta-steps and makes the same evaluation."""
    there = round_trips.pickled(learner, learner)
    there.prepare(torch.device("cpu"))
    mine, theirs = ({}, {})  # type: tuple[dict[Any, Records], dict[Any, Records]]
    state = other = learner.initial(0)
    for number in range(2):
        state, other = _advanced(learner, state, number, mine, []), _advanced(there, other, number, theirs, [])
    if differs := difference(dict(state.slots), dict(other.slots)):
        raise ImpureError(learner, "a pickled copy takes the same meta-steps", differs, FROM_KEY)
    if differs := difference(dict(evaluated(learner, state, 2).columns), dict(evaluated(there, state, 2).columns)):
        raise ImpureError(learner, "a pickled copy makes the same evaluation", differs, FROM_KEY)


CARRIED_PROPERTIES: dict[str, Callable[[CarriedLearner], None]] = {
    "begins": begins,
    "as_in_plain_python": as_in_plain_python,
    "states_travel": states_travel,
    "travels": travels,
    "config": lambda learner: round_trips.config(learner.algorithm),
}
"""Property → its check on a learner."""
