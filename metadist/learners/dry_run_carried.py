"""Try the first particles of a population before a run starts: two meta-steps, twice, and an evaluation."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import Protocol, TypeVar

import torch
from torch import Tensor

from metadist.core.algorithm import Theta
from metadist.core.carried import CarriedAlgorithm
from metadist.core.computation import Advance
from metadist.core.differences import by_name
from metadist.core.errors import ConfigError, MetadistError, NonFiniteError, first_line
from metadist.core.random import SPLITS, TaskKey
from metadist.core.round import Result, Shard, WithOutput
from metadist.core.state import Records, Slot, State
from metadist.core.task import Task, TaskFamily
from metadist.learners.culprit import place
from metadist.learners.purity import FROM_KEY, ImpureConfigError, impurity

T = TypeVar("T")
#: inner steps of the evaluation that is tried
STEPS = 2
#: dtypes of a state that travel between workers
TRAVELS = (
    *(torch.float64, torch.float32, torch.float16, torch.bfloat16),
    *(torch.int64, torch.int32, torch.uint8, torch.bool),
)


class ParticleSubject(Protocol):
    """A learner of particles, as this module tries it."""

    algorithm: CarriedAlgorithm
    tasks: TaskFamily
    slots: dict[str, Slot]

    def initial(self, seed: int) -> State: ...
    def sample(self, keys: TaskKey) -> Task: ...
    def compute(
        self, shard: Shard, theta: Mapping[str, Tensor], inputs: Sequence[Records] = ()
    ) -> Result | WithOutput: ...
    def evaluate(self, theta: Theta, keys: TaskKey, steps: int) -> Records: ...


def try_particles(learner: ParticleSubject, seed: int, count: int) -> None:
    """Advance ``count`` particles twice and evaluate θ on a task of every split.

    ConfigError where tasks, contributions or states are no pure function of their keys, where a contribution lacks a
    slot, or where a state has a dtype that does not travel.
    """
    for split in SPLITS:
        _try_tasks(learner, TaskKey.of(seed, split, 0, range(count)))
    first = Shard("check", 0, 0, 0, Advance(), 0, count, seed, keeps=True)
    started = _advanced(learner, first, seed, None)
    if started is None:
        return
    _check_states(learner, started.output)
    second = replace(first, meta_step=1, key_step=1, needs=(first.key,))
    _advanced(learner, second, seed, started.output)
    theta = learner.initial(seed).theta(learner.slots)
    for split in ("validation", "test"):
        keys = TaskKey.of(seed, split, 0, [0])
        _explained(learner, "evaluated", partial(learner.evaluate, theta, keys, STEPS))


def particle_hashes(learner: ParticleSubject, seed: int, count: int) -> dict[str, str]:
    """Return the SHA-256 of the first tasks of each split and of the first states, by name."""
    named = {
        f"{split} tasks ({n})": t
        for split in SPLITS
        for n, t in by_name(learner.sample(TaskKey.of(seed, split, 0, range(count)))).items()
    }
    started = _advanced(learner, Shard("check", 0, 0, 0, Advance(), 0, count, seed, keeps=True), seed, None)
    if started is not None:
        named |= {f"states ({n})": t for n, t in started.output.columns.items()}
    return {n: hashlib.sha256(t.contiguous().cpu().view(-1).numpy().tobytes()).hexdigest() for n, t in named.items()}


def _name(learner: ParticleSubject) -> str:
    return type(learner.algorithm).__name__


def _try_tasks(learner: ParticleSubject, keys: TaskKey) -> None:
    name = f"tasks: '{type(learner.tasks).__name__}'"
    try:
        first = by_name(learner.sample(keys))
        differs = impurity(lambda: by_name(learner.sample(keys)), first)
    except MetadistError:
        raise
    except Exception as error:  # the user's own code
        raise ConfigError(f"{name} can't sample {keys.split} tasks: {first_line(error)}{place(error)}") from error
    if differs:
        raise ImpureConfigError(
            name, f"gives other {keys.split} tasks when the same key is sampled again", differs, FROM_KEY
        )


def _advanced(learner: ParticleSubject, shard: Shard, seed: int, before: Records | None) -> WithOutput | None:
    """Advance the particles of ``shard`` twice, and return the result; None where the run skips one with NaN."""
    vectors = learner.initial(seed).slots
    inputs = [] if before is None else [before]
    found: list[WithOutput] = []

    def compute() -> Mapping[str, Tensor]:
        result = learner.compute(shard, vectors, inputs)
        assert isinstance(result, WithOutput)
        found.append(result)
        slots = {f"the contribution to slot '{n}'": v for n, v in result.result.slots.items()}
        return {**slots, **{f"tensor {n} of the state": c for n, c in result.output.columns.items()}}

    try:
        differs = _explained(learner, "advanced", lambda: impurity(compute))
    except NonFiniteError:
        return None  # engine.non_finite decides in the run
    if differs:
        raise ImpureConfigError(
            f"algorithm: '{_name(learner)}'",
            "gives another contribution or state when the same particles are advanced again",
            str(differs),
            "draw random numbers from context.key or context.life, and keep nothing from one call to the next",
        )
    _check_contribution(learner, found[0])
    return found[0]


def _check_contribution(learner: ParticleSubject, found: WithOutput) -> None:
    wanted = {n for n, slot in learner.slots.items() if slot.rule != "constant"}
    given = set(found.result.slots)
    if given != wanted:
        raise ConfigError(
            f"algorithm: '{_name(learner)}'.advance contributes to the slots {', '.join(sorted(given)) or 'none'}; "
            f"expected {', '.join(sorted(wanted))} (declare the others as constant in slots)"
        )


def _check_states(learner: ParticleSubject, states: Records) -> None:
    for name, column in states.columns.items():
        if column.dtype not in TRAVELS:
            raise ConfigError(
                f"algorithm: tensor {name} of the state of '{_name(learner)}' is {column.dtype}; one of "
                f"{', '.join(str(d).removeprefix('torch.') for d in TRAVELS)} travels between workers"
            )


def _explained(learner: ParticleSubject, doing: str, compute: Callable[[], T]) -> T:
    """Call ``compute``, and explain an error of the user's own code."""
    try:
        return compute()
    except (MetadistError, NonFiniteError):
        raise
    except Exception as error:
        raise ConfigError(
            f"algorithm: particles of '{_name(learner)}' can't be {doing}: {first_line(error)}{place(error)}"
        ) from error
