"""The computations of shards: each is a small record of its own arguments."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, fields
from typing import Any, ClassVar, Union

Argument = Union[None, bool, int, float, str]
"""An argument of a computation, as JSON can carry it."""
Statistics = tuple[tuple[str, float], ...]
"""Global rollout statistics by name, in the order of the names. They are broadcast to the update rounds."""


@dataclass(frozen=True)
class Computation:
    """What a worker computes for a shard. ``name`` stands in messages, in logs and in metrics.

    A subclass declares its name and its arguments. A subclass with a field ``statistics`` takes any further arguments
    as global rollout statistics.
    """

    name: ClassVar[str]
    #: whether the output of a shard is a state that the next meta-step needs
    carries: ClassVar[bool] = False
    #: whether a worker needs θ for it
    reads_theta: ClassVar[bool] = True

    def arguments(self) -> dict[str, Argument]:
        """Return the arguments by name, global rollout statistics among them."""
        found = {field.name: getattr(self, field.name) for field in fields(self)}
        statistics = dict(found.pop("statistics", ()))
        return {**found, **statistics}


@dataclass(frozen=True)
class Gradient(Computation):
    """Sum the meta-gradients (or parameter deltas) of tasks, or the policy gradients of trials."""

    name = "gradient"
    statistics: Statistics = ()


@dataclass(frozen=True)
class StageSum(Computation):
    """Sum the contributions of tasks in one stage of an algorithm whose meta-step has several rounds."""

    name = "stage"
    stage: str


@dataclass(frozen=True)
class Evaluate(Computation):
    """Judge θ on tasks after ``inner_steps`` adaptation steps; None: as many as the algorithm makes in training."""

    name = "evaluate"
    inner_steps: int | None = None


@dataclass(frozen=True)
class Rollout(Computation):
    """Play trials under θ, and keep them as the output of the shard."""

    name = "rollout"


@dataclass(frozen=True)
class RolloutWindow(Rollout):
    """Play the next steps of trials under θ. They, and the trials as they then are, are the output of the shard."""

    name = "rollout_window"
    carries = True


@dataclass(frozen=True)
class ValueGradient(Computation):
    """Sum the gradients of the value function's loss on the trials of a rollout."""

    name = "value_gradient"
    statistics: Statistics = ()


@dataclass(frozen=True)
class FisherProduct(Computation):
    """Sum the products of each trial's Fisher matrix and the published direction."""

    name = "fisher"


@dataclass(frozen=True)
class Surrogate(Computation):
    """Measure surrogate objective and KL divergence at θ + ``fraction`` · the published direction."""

    name = "surrogate"
    fraction: float
    statistics: Statistics = ()


@dataclass(frozen=True)
class Advance(Computation):
    """Advance particles by one meta-step: sum their contributions, and keep their states as the output of the shard."""

    name = "advance"
    carries = True


@dataclass(frozen=True)
class SaveStates(Computation):
    """Write the states that the shard needs to the folder ``place``, a path or any fsspec URL."""

    name = "save"
    reads_theta = False
    place: str


@dataclass(frozen=True)
class LoadStates(Computation):
    """Read the states of a shard that ``carries`` from the folder ``place``, and keep them as its output."""

    name = "load"
    carries = True
    reads_theta = False
    place: str


def _subclasses(parent: type[Computation]) -> Iterator[type[Computation]]:
    for child in parent.__subclasses__():
        yield child
        yield from _subclasses(child)


def computation_of(name: str, arguments: Mapping[str, Argument]) -> Computation:
    """Return the computation with this name and these arguments, as ``Computation.arguments`` gives them.

    ValueError where no computation has the name, or where it has other arguments.
    """
    known = {kind.name: kind for kind in _subclasses(Computation)}
    if name not in known:
        raise ValueError(f"computation '{name}'; expected one of {', '.join(sorted(known))}")
    own = {field.name for field in fields(known[name])}
    given: dict[str, Any] = {n: v for n, v in arguments.items() if n in own and n != "statistics"}
    others = {n: v for n, v in arguments.items() if n not in given}
    if "statistics" in own:
        given["statistics"] = tuple(sorted(others.items()))
    elif others:
        raise ValueError(f"computation '{name}' has no argument {', '.join(sorted(others))}")
    try:
        return known[name](**given)
    except TypeError as error:
        raise ValueError(f"computation '{name}': {error}") from error
