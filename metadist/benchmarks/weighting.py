"""Compare ways to train on wrong labels and rare classes: plain training, Meta-Weight-Net, learning to reweight."""

from __future__ import annotations

import math
import statistics
import time
from typing import Any

from metadist.benchmarks.meta_steps import MetaSteps
from metadist.config.build import build
from metadist.config.document import set_workers
from metadist.config.schema import Document
from metadist.core.round import EvaluationRequest, MetaStepKey
from metadist.experiment.fleet import start_workers
from metadist.learners import supervised
from metadist.training.evaluation import evaluate

#: rows of the table: name → algorithm. Plain training with the clean set sees the same examples as the other methods.
METHODS: dict[str, Document] = {
    "plain": {"name": "plain"},
    "plain with the clean set": {"name": "plain", "clean": True},
    "meta_weight_net": {"name": "meta_weight_net"},
    "reweight": {"name": "reweight"},
}
BASELINE = "plain"


def run(document: Document, *, seeds: int, workers: str) -> dict[str, Any]:
    """Train every method with ``seeds`` seeds of data and model, and judge each one on the whole test set at the end.

    All other settings are those of ``document``; where its algorithm is one of the methods, its options are taken too.
    """
    scores: dict[str, list[float]] = {name: [] for name in METHODS}
    seconds: dict[str, list[float]] = {name: [] for name in METHODS}
    experiment = build(document)
    for seed in range(seeds):
        for name in METHODS:
            began = time.perf_counter()
            scores[name].append(_score(_with(document, name, seed), workers))
            seconds[name].append(time.perf_counter() - began)
    rows = {name: {**_paired(scores[name], scores[BASELINE]), "seconds": sum(seconds[name])} for name in METHODS}
    metric = experiment.learner.tasks.metric_name
    case = {"unit": f"test {metric} after the last meta-step", "contestants": rows, "by_seed": scores}
    settings = {"config": experiment.name, "seeds": seeds, "meta_steps": experiment.outer.meta_steps}
    return {"settings": settings, "cases": {f"against {BASELINE}, paired by seed": case}}


def _with(document: Document, method: str, seed: int) -> Document:
    own = document["algorithm"]
    algorithm = {**own, **METHODS[method]} if own.get("name") == method else METHODS[method]
    tasks = {**document["tasks"], "data_seed": seed}
    return {**document, "seed": seed, "tasks": tasks, "algorithm": algorithm}


def _score(document: Document, workers: str) -> float:
    experiment = build(set_workers(document, workers))
    learner = supervised(experiment.learner)
    with start_workers(experiment, "bench") as scheduler:
        steps = MetaSteps(learner, experiment.seed, scheduler)
        for _ in range(experiment.outer.meta_steps):
            steps()
        key = MetaStepKey("bench", steps.meta_step, experiment.evaluation_seed)
        request = EvaluationRequest(key, "test", experiment.evaluate.test_tasks)
        return evaluate(scheduler, learner, steps.state, request).score


def _paired(found: list[float], baseline: list[float]) -> dict[str, float]:
    """Return the mean, the mean difference, its standard error, and their quotient."""
    gains = [a - b for a, b in zip(found, baseline)]
    gain = statistics.fmean(gains)
    error = statistics.stdev(gains) / math.sqrt(len(gains)) if len(gains) > 1 else math.nan
    errors = gain / error if error > 0 else math.nan
    return {"mean": statistics.fmean(found), "gained": gain, "standard_error": error, "in_standard_errors": errors}
