"""Evaluate a finished run."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import cast

import torch

from metadist.config.document import set_workers
from metadist.config.experiment import Experiment
from metadist.config.groups import WorkerGroup
from metadist.config.schema import typed
from metadist.core.round import EvaluationRequest, MetaStepKey
from metadist.engine.plan import Plan
from metadist.experiment.fleet import start_workers
from metadist.experiment.load import load_run
from metadist.experiment.oracle_comparison import check_methods, paired
from metadist.experiment.result import Result
from metadist.learners import of_trials
from metadist.learners.evaluation import TrialEvaluation
from metadist.training.evaluation import evaluate


@dataclass(frozen=True)
class EvaluationOptions:
    """Deviations from the protocol of a run; None means the run's own value.

    ``beside`` names known methods for a comparison on the same trials of a meta-environment. ``trust``: the modules
    that the run's config may name.
    """

    tasks: int | None = None
    split: str = "test"
    inner_steps: int | None = None
    workers: str | None = None
    normalization: str | None = None
    beside: Sequence[str] = ()
    trust: Sequence[str] = ()


def evaluate_run(run_dir: str, options: EvaluationOptions = EvaluationOptions()) -> Result:
    """Evaluate the best parameters of a run. Raises ConfigError where an option does not suit the run's tasks."""
    loaded = load_run(run_dir, trust=options.trust)
    experiment = _without_remote_workers(loaded.experiment, options.workers)
    settings, learner = experiment.evaluate, experiment.learner
    if options.normalization is not None:
        learner.normalize(options.normalization)
    environment = of_trials(learner).tasks if options.beside else None
    if environment is not None:
        check_methods(environment, options.beside)  # before minutes of evaluation
    learner.prepare(torch.device("cpu"))
    request = EvaluationRequest(
        MetaStepKey(loaded.run_id, loaded.outcome.best_step, experiment.seed),
        options.split,
        options.tasks or settings.test_tasks,
        settings.inner_steps if options.inner_steps is None else options.inner_steps,
    )
    began = time.perf_counter()
    with start_workers(experiment, loaded.run_id, Plan.eager) as workers:
        judged = evaluate(workers, learner, loaded.state, request)
    if environment is not None:
        assert isinstance(judged, TrialEvaluation)
        judged = dataclasses.replace(judged, beside=paired(judged, environment, options.beside, seed=experiment.seed))
    learner.prepare(torch.device("cpu"))
    seconds = time.perf_counter() - began
    return dataclasses.replace(loaded, experiment=experiment, evaluations=[judged], wall_seconds=seconds)


def _without_remote_workers(experiment: Experiment, workers: str | None) -> Experiment:
    """Return the experiment without remote workers, with ``workers`` in place of its own groups if given."""
    groups = experiment.workers
    if workers is not None:
        given = set_workers(experiment.document, workers)["workers"]
        groups = cast(tuple[WorkerGroup, ...], typed("workers", given, tuple[WorkerGroup, ...]))
    mine = tuple(g for g in groups if not g.outside) or (WorkerGroup(min=0, max=0),)
    return dataclasses.replace(experiment, workers=mine)
