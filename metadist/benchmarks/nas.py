"""Search an architecture, and compare its network with random networks of the same space on held-out tasks."""

from __future__ import annotations

import math
from dataclasses import fields
from typing import Any

import torch
from torch import Tensor

from metadist.algorithms import Reptile
from metadist.benchmarks.meta_steps import MetaSteps
from metadist.config.build import build
from metadist.config.document import override, set_workers
from metadist.config.schema import Document
from metadist.core.errors import ConfigError
from metadist.core.random import seeded
from metadist.core.round import EvaluationRequest, MetaStepKey
from metadist.experiment.fleet import start_workers
from metadist.learners import supervised
from metadist.models.supernet import OPERATIONS
from metadist.training.evaluation import judge


def run(document: Document, *, networks: int, train_steps: int | None, workers: str) -> dict[str, Any]:
    """Search as ``document`` says; then train the discretised network and ``networks`` random ones by Reptile.

    All of them have the same inner loop, seed and ``train_steps`` meta-steps (None: as many as the search), and are
    judged on the same test tasks, by which the difference is paired.
    """
    experiment = build(set_workers(document, workers))
    learner = supervised(experiment.learner)
    with start_workers(experiment, "bench") as scheduler:
        search = MetaSteps(learner, experiment.seed, scheduler)
        for _ in range(experiment.outer.meta_steps):
            search()
    found = learner.algorithm.discretised(learner.model, search.state.theta(learner.slots))
    if found is None:
        raise ConfigError(f"algorithm.name: {experiment.algorithm.document['name']} finds no architecture; use metanas")
    chosen = tuple(found["operations"])
    steps = experiment.outer.meta_steps if train_steps is None else train_steps
    scores = {names: _trained(document, names, steps, workers) for names in (chosen, *_random(chosen, networks))}
    best, others = scores[chosen], torch.stack([scores[names] for names in scores if names != chosen])
    rows = {" ".join(names): {"mean": float(score.mean())} for names, score in scores.items()}
    case = {
        "unit": f"test {learner.tasks.metric_name}; the first row is the discretised network",
        "contestants": rows,
        "against_the_mean": _paired(best - others.mean(0)),
        "random_networks_that_are_better": int((others.mean(1) > best.mean()).sum()),
    }
    settings = {"config": experiment.name, "search_steps": experiment.outer.meta_steps, "train_steps": steps}
    return {"settings": settings, "cases": {f"against {len(others)} random networks, paired by task": case}}


def _random(chosen: tuple[str, ...], count: int) -> list[tuple[str, ...]]:
    """Return different random networks of the space, the same ones for every search: not ``chosen``."""
    generator, found = seeded(0, "random networks"), list[tuple[str, ...]]()
    while len(found) < min(count, len(OPERATIONS) ** len(chosen) - 1):
        names = tuple(OPERATIONS[i] for i in torch.randint(len(OPERATIONS), (len(chosen),), generator=generator))
        if names != chosen and names not in found:
            found.append(names)
    return found


def _trained(document: Document, names: tuple[str, ...], steps: int, workers: str) -> Tensor:
    """Train one network by Reptile, and return its score on each test task [tasks]."""
    own = {f.name for f in fields(Reptile)}
    algorithm = {n: v for n, v in document["algorithm"].items() if n in own}
    model = {**document["model"], "operations": list(names)}
    changed = {**document, "model": model, "algorithm": {"name": "reptile", **algorithm}}
    experiment = build(set_workers(override(changed, [f"outer.meta_steps={steps}"]), workers))
    learner = supervised(experiment.learner)
    with start_workers(experiment, "bench") as scheduler:
        training = MetaSteps(learner, experiment.seed, scheduler)
        for _ in range(steps):
            training()
        key = MetaStepKey("bench", steps, experiment.evaluation_seed)
        asked = EvaluationRequest(key, "test", experiment.evaluate.test_tasks, experiment.evaluate.inner_steps)
        return judge(scheduler, learner, training.state, asked)[1].columns[learner.tasks.metric_name][:, -1]


def _paired(gains: Tensor) -> dict[str, float]:
    error = float(gains.std()) / math.sqrt(len(gains))
    gained = float(gains.mean())
    return {"gained": gained, "standard_error": error, "in_standard_errors": gained / error if error else math.nan}
