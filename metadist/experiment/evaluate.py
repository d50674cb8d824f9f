"""Evaluate a finished run."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Sequence

import torch

from metadist.config.build import build
from metadist.config.document import set_workers
from metadist.config.groups import WorkerGroup
from metadist.core.errors import ConfigError
from metadist.experiment.fleet import fleet
from metadist.experiment.load import load_run
from metadist.experiment.oracle_comparison import paired
from metadist.experiment.result import Result
from metadist.learners.few_shot import Learner
from metadist.learners.trials import TrialLearner
from metadist.training.evaluation import TrialEvaluation, evaluate
from metadist.workers.plan import as_it_is


def evaluate_run(
    run_dir: str,
    *,
    tasks: int | None = None,
    split: str = "test",
    inner_steps: int | None = None,
    workers: str | None = None,
    normalization: str | None = None,
    beside: Sequence[str] = (),
) -> Result:
    """Judge a run's best parameters again, on as many tasks and steps as wanted, ``beside`` known methods on the same trials."""
    loaded = load_run(run_dir)
    experiment = loaded.experiment
    if workers is not None:
        groups = set_workers(experiment.document, workers)
        experiment = dataclasses.replace(experiment, workers=build(groups).workers)
    mine = tuple(g for g in experiment.workers if not g.outside) or (WorkerGroup(min=0, max=0),)
    experiment = dataclasses.replace(experiment, workers=mine)  # nobody waits outside for an evaluation
    settings = experiment.evaluate
    learner = experiment.learner
    if normalization is not None:
        if not isinstance(learner, Learner):
            raise ConfigError(
                f"--normalization: {type(learner.tasks).__name__} is a meta-environment; it goes with supervised tasks"
            )
        learner.normalization = normalization
    if beside and not isinstance(learner, TrialLearner):
        raise ConfigError(
            f"--beside: {type(learner.tasks).__name__} is no meta-environment; there are no known methods to compare with"
        )
    learner.prepare(torch.device("cpu"))
    steps = settings.inner_steps if inner_steps is None else inner_steps
    began = time.perf_counter()
    with fleet(experiment, loaded.run_id, as_it_is) as fleet_:
        judged = evaluate(
            fleet_,
            learner,
            loaded.state,
            run=loaded.run_id,
            meta_step=loaded.outcome.best_step,
            seed=experiment.seed,
            split=split,
            tasks=tasks or settings.test_tasks,
            inner_steps=steps,
        )
    if beside:
        assert isinstance(judged, TrialEvaluation)
        assert isinstance(learner, TrialLearner)
        judged = dataclasses.replace(judged, beside=paired(judged, learner.tasks, beside, seed=experiment.seed))
    learner.prepare(torch.device("cpu"))
    return dataclasses.replace(
        loaded, experiment=experiment, evaluations=[judged], wall_seconds=time.perf_counter() - began
    )
