"""List the methods for an environment and compare their returns in the same trials."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from metadist.core.errors import ConfigError, one_of
from metadist.core.random import SPLITS, TaskKey
from metadist.environments import Bandit, CorrelatedBandit, Gridworld, Navigation, TabularMDP
from metadist.oracles import bandits, goals, mdps
from metadist.oracles.play import Method, play_with
from metadist.rl.environment import MetaEnvironment

ORACLES: dict[type[MetaEnvironment], Mapping[str, Method]] = {
    Bandit: bandits.METHODS,
    CorrelatedBandit: bandits.METHODS,
    TabularMDP: mdps.METHODS,
    Gridworld: goals.GRIDWORLD,
    Navigation: goals.NAVIGATION,
}
"""Environment → name → method; the first possible method of an environment is the oracle of scores."""


def methods(environment: MetaEnvironment) -> Mapping[str, Method]:
    """Return the methods for ``environment`` by name. Raises ConfigError where there are none."""
    for cls in type(environment).__mro__:
        if cls in ORACLES:
            return ORACLES[cls]
    known = ", ".join(cls.__name__ for cls in ORACLES)
    raise ConfigError(
        f"environment.name: there are no oracles for '{type(environment).__name__}'; expected one of {known}"
    )


def play(environment: MetaEnvironment, name: str, keys: TaskKey) -> Tensor:
    """Return the returns by episode, float64 [B, episodes], of the method ``name`` in the trials of ``keys``."""
    known = methods(environment)
    one_of("oracle", name, known)
    return play_with(environment, known[name], keys)


def possible(environment: MetaEnvironment) -> list[str]:
    """Return the names of the methods that can play ``environment`` with its settings."""
    keys, found = TaskKey.of(0, "test", 0, [0]), []
    for name, method in methods(environment).items():
        try:
            method(environment, environment.sample(keys), keys)
        except ConfigError:
            continue
        found.append(name)
    return found


def score(mean: float, oracle: float, random: float) -> float:
    """Return ``mean`` in percent of the way from ``random`` to ``oracle``."""
    return 100 * (mean - random) / (oracle - random)


@dataclass(frozen=True)
class Row:
    """A method's return per trial: ``mean`` ± ``error`` (standard error), and its ``percent`` of (oracle − random).

    ``difference`` ± ``difference_error`` is the return minus the oracle's in the same trial. ``by_episode`` holds mean
    returns.
    """

    name: str
    mean: float
    error: float
    percent: float
    difference: float
    difference_error: float
    by_episode: tuple[float, ...]


def compare(
    environment: MetaEnvironment,
    names: Sequence[str] | None = None,
    *,
    trials: int,
    seed: int = 0,
    split: str = "test",
    batch: int = 1000,
) -> list[Row]:
    """Play the methods ``names`` (default: all possible ones) in the first ``trials`` trials of ``split``.

    An evaluation has the same trials. The oracle is the first possible method in ``ORACLES``; the oracle and ``random``
    play even if ``names`` omits them. ``batch`` trials are in memory together.
    """
    one_of("split", split, SPLITS)
    if trials < 2:
        raise ConfigError(f"trials: {trials} is below 2, and one trial has no standard error; expected 2 or more")
    allowed = possible(environment)
    oracle = allowed[0]
    names = list(allowed if names is None else names)
    for name in names:
        one_of("oracle", name, methods(environment))
    returns: dict[str, Tensor] = {}
    parts = [range(start, min(start + batch, trials)) for start in range(0, trials, batch)]
    keys = [TaskKey.of(seed, split, 0, part) for part in parts]
    for name in dict.fromkeys([oracle, "random", *names]):
        returns[name] = torch.cat([play(environment, name, part) for part in keys])
    return [row(name, returns[name], returns[oracle], returns["random"]) for name in names]


def row(name: str, returns: Tensor, oracle: Tensor, random: Tensor) -> Row:
    """Return one row of the table, from returns by episode [trials, episodes] in the same trials."""
    totals, best = returns.sum(1), oracle.sum(1)
    mean, more = totals.mean().item(), totals - best
    percent = score(mean, best.mean().item(), random.sum(1).mean().item())
    return Row(name, mean, _error(totals), percent, more.mean().item(), _error(more), tuple(returns.mean(0).tolist()))


def _error(values: Tensor) -> float:
    return values.std().item() / math.sqrt(len(values))
