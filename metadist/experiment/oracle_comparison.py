"""Compare a policy with known methods, and known methods with each other, on the same trials."""

from __future__ import annotations

import dataclasses
import math
import os
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from metadist.config.build import build_environment
from metadist.config.document import override, read_document, shipped_configs
from metadist.core.errors import ConfigError, nearest, one_of
from metadist.core.random import TaskKey
from metadist.core.task import TaskFamily
from metadist.learners.evaluation import Evaluation, TrialEvaluation
from metadist.oracles import compare, methods, play, possible, score
from metadist.rl.algorithm import EPISODES_SHOWN
from metadist.rl.environment import MetaEnvironment

#: The option of ``metadist evaluate``, with its earlier name.
OPTION = "--compare / --beside"
#: Trials per batch.
BATCH = 2000


def oracles(
    name: str, overrides: Sequence[str], chosen: Sequence[str], *, trials: int, split: str, seed: int
) -> dict[str, Any]:
    """Return the scores of ``chosen`` methods (or ``all``) in a meta-environment.

    ``name`` is the name of an environment, or the name or path of a config.
    """
    from metadist.environments import ENVIRONMENTS

    document: dict[str, Any]
    if name in ENVIRONMENTS:
        document = {"environment": {"name": name}}
        overrides = [f"environment.{o.removeprefix('environment.')}" for o in overrides]
    elif name in shipped_configs() or os.path.exists(name):
        document = read_document(name)
    else:
        known = sorted([*ENVIRONMENTS, *shipped_configs()])
        raise ConfigError(
            f"oracle: '{name}' is neither an environment ({', '.join(sorted(ENVIRONMENTS))}) nor a config"
            f"{nearest(name, known)}"
        )
    environment = build_environment(override(document, overrides))
    rows = compare(environment, None if "all" in chosen else list(chosen), trials=trials, seed=seed, split=split)
    about = {"environment": type(environment).__name__, "trials": trials, "split": split, "seed": seed}
    return {**about, "protocol": environment.protocol(split), "rows": [dataclasses.asdict(row) for row in rows]}


def check_methods(environment: MetaEnvironment, chosen: Sequence[str]) -> None:
    """Raise ConfigError for a method that ``environment`` does not have."""
    for name in chosen:
        one_of(OPTION, name, [*methods(environment), "all"])


def paired(
    judged: TrialEvaluation, environment: MetaEnvironment, chosen: Sequence[str], *, seed: int
) -> list[dict[str, Any]]:
    """Compare the policy with ``chosen`` methods (or ``all``), trial by trial.

    A row has the mean return per trial with its standard error, the percent of (oracle − random), and the mean paired
    difference of the policy. The oracle is the first method that the environment allows.
    """
    if judged.by_gradient_steps:
        raise ConfigError(
            f"{OPTION}: this policy is judged after gradient steps, and known methods by the episodes of a trial; "
            f"leave {OPTION} out, because they can't be paired"
        )
    allowed = possible(environment)
    names = allowed if "all" in chosen else list(chosen)
    totals = {name: _totals(environment, name, judged, seed) for name in dict.fromkeys([allowed[0], *names, "random"])}
    best, worst = float(totals[allowed[0]].mean()), float(totals["random"].mean())
    ours = judged.trials[judged.policy].sum(1)
    played = {**{f"this policy, {policy}": returns.sum(1) for policy, returns in judged.trials.items()}, **totals}
    return [_row(name, returns, ours, best, worst) for name, returns in played.items()]


class Regret:
    """The return of the oracle minus that of a policy on the same trials; no values without an oracle."""

    def __init__(self, tasks: TaskFamily | MetaEnvironment, seed: int, *, trials: int = 1000) -> None:
        self._tasks, self._seed, self._trials = tasks, seed, trials
        #: The oracle's returns by episode, for each split.
        self._best: dict[str, Tensor | None] = {}

    def __call__(self, judged: Evaluation) -> dict[str, float]:
        environment = self._tasks
        if not (isinstance(environment, MetaEnvironment) and isinstance(judged, TrialEvaluation)):
            return {}
        if judged.by_gradient_steps:
            return {}
        ours = judged.trials[judged.policy][: self._trials]
        if judged.split not in self._best:
            self._best[judged.split] = self._oracle(environment, judged.split, len(ours))
        best = self._best[judged.split]
        if best is None or best.shape != ours.shape:
            return {}
        lost, prefix = (best - ours).nanmean(0), f"eval/{judged.split}/regret"
        shown = [n for n in EPISODES_SHOWN if n < len(lost)] + [len(lost)]
        by_episode = {f"{prefix}/episode_{n}": float(lost[n - 1]) for n in shown}
        return {
            prefix: float(lost.sum()),
            f"{prefix}/per_step": float(lost.mean()) / environment.horizon,
            **by_episode,
        }

    def _oracle(self, environment: MetaEnvironment, split: str, trials: int) -> Tensor | None:
        try:
            allowed = possible(environment)
        except ConfigError:
            return None
        return play(environment, allowed[0], TaskKey.of(self._seed, split, 0, range(trials)))


def _totals(environment: MetaEnvironment, method: str, judged: TrialEvaluation, seed: int) -> Tensor:
    starts = range(0, judged.tasks, BATCH)
    parts = [TaskKey.of(seed, judged.split, 0, range(start, min(start + BATCH, judged.tasks))) for start in starts]
    return torch.cat([play(environment, method, keys).sum(1) for keys in parts])


def _row(name: str, returns: Tensor, ours: Tensor, best: float, worst: float) -> dict[str, Any]:
    ahead, root, mean = ours - returns, math.sqrt(len(returns)), float(returns.mean())
    return {
        "name": name,
        "mean": mean,
        "error": float(returns.std()) / root,
        "percent": score(mean, best, worst),
        "difference": float(ahead.mean()),
        "difference_error": float(ahead.std()) / root,
    }
