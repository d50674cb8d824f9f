"""Judge a trained state on tasks that its run did not choose: another split, number, size or kind of tasks."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Sequence
from dataclasses import dataclass, is_dataclass
from typing import Any

import torch

from metadist.config.build import build
from metadist.config.document import override, set_workers
from metadist.config.experiment import Experiment
from metadist.config.groups import WorkerGroup
from metadist.config.schema import typed
from metadist.core.errors import ConfigError, at_least, nearest, one_of
from metadist.core.random import SPLITS
from metadist.core.round import EvaluationRequest, MetaStepKey
from metadist.core.state import Records, State
from metadist.engine.plan import Plan
from metadist.experiment.baseline_comparison import check_baselines, paired_with_baselines
from metadist.experiment.fleet import start_workers
from metadist.experiment.oracle_comparison import check_methods, paired
from metadist.learners import of_trials, supervised
from metadist.learners.base import Learner
from metadist.learners.evaluation import Evaluation, TrialEvaluation
from metadist.rl.environment import MetaEnvironment
from metadist.training.evaluation import judge

#: keys that an evaluation can override, or their beginnings
ALLOWED = (
    "tasks.",
    "environment.",
    "metric",
    "task_metrics",
    "outer.shard_size",
    "engine.device",
    "evaluate.test_tasks",
    "evaluate.inner_steps",
    "evaluate.normalization",
    "evaluate.policy",
    "evaluate.seed",
)


@dataclass(frozen=True)
class EvaluationOptions:
    """Deviations from the protocol of a run; None means the run's own value.

    ``beside`` names known methods (of meta-environments) or baselines (of supervised tasks) for a comparison on the
    same tasks. ``overrides`` are ``KEY=VALUE`` for keys of ``ALLOWED``. ``record`` writes the scores to the run
    directory and to MLflow. ``trust``: the modules that the run's config may name. ``weights``: ``trained``, or
    ``averaged`` (default, where the run has averages).
    """

    tasks: int | None = None
    split: str = "test"
    inner_steps: int | None = None
    workers: str | None = None
    normalization: str | None = None
    beside: Sequence[str] = ()
    overrides: Sequence[str] = ()
    record: bool = True
    trust: Sequence[str] = ()
    weights: str | None = None

    def __post_init__(self) -> None:
        one_of("--split", self.split, SPLITS)
        if self.normalization is not None:
            one_of("--normalization", self.normalization, ("transductive", "inductive"))
        at_least(1, **{"--tasks": self.tasks})
        at_least(0, **{"--inner-steps": self.inner_steps})
        given = {"test_tasks": self.tasks, "inner_steps": self.inner_steps, "normalization": self.normalization}
        for assignment in self.overrides:
            key = assignment.partition("=")[0]
            if not key.startswith(ALLOWED) and key not in ("tasks", "environment"):
                raise ConfigError(
                    f"evaluate: {key} can't be overridden: an evaluation does not train{nearest(key, ALLOWED)}; "
                    f"allowed: {', '.join(f'{k}…' if k.endswith('.') else k for k in ALLOWED)}"
                )
            if given.get(key.removeprefix("evaluate.")) is not None and key.startswith("evaluate."):
                raise ConfigError(f"evaluate: {key} is given twice, as an option and as {assignment}")

    @property
    def keys(self) -> list[str]:
        """The overridden keys."""
        return [assignment.partition("=")[0] for assignment in self.overrides]


@dataclass(frozen=True)
class Trained:
    """A state to judge, and the run that it belongs to."""

    run_id: str
    run_dir: str
    experiment: Experiment
    meta_step: int
    state: State


@dataclass(frozen=True)
class Judgement:
    """A prepared evaluation: the experiment with all deviations, and the request to its learner."""

    trained: Trained
    options: EvaluationOptions
    experiment: Experiment
    request: EvaluationRequest

    @classmethod
    def prepared(cls, trained: Trained, options: EvaluationOptions) -> Judgement:
        """Load the data. Raises ConfigError where an option does not suit the run's tasks, model or algorithm."""
        experiment = _deviating(trained.experiment, options)
        learner, chosen = experiment.learner, experiment.evaluate
        _check_fit(trained.experiment.learner, learner, options)
        if options.beside:
            _check_compared(learner, options.beside)  # before minutes of evaluation
        learner.prepare(torch.device("cpu"))
        key = MetaStepKey(trained.run_id, trained.meta_step, experiment.evaluation_seed)
        request = EvaluationRequest(key, options.split, chosen.test_tasks, chosen.inner_steps)
        return cls(trained, options, experiment, request)

    def scores(self) -> tuple[Evaluation, Records, float]:
        """Return the scores, the records of single tasks, and the seconds that it took."""
        began, learner = time.perf_counter(), self.experiment.learner
        with start_workers(self.experiment, self.trained.run_id, Plan.eager) as workers:
            judged, records = judge(workers, learner, self.trained.state, self.request)
        if self.options.beside:
            rows = _compared(learner, self.request, judged, records, self.options.beside)
            judged = dataclasses.replace(judged, beside=rows)
        learner.prepare(torch.device("cpu"))  # an executor in this process may have moved the model to a GPU
        return judged, records, time.perf_counter() - began


def _check_compared(learner: Learner, names: Sequence[str]) -> None:
    """Raise ConfigError for a known method or a baseline that the learner's tasks do not have."""
    if isinstance(learner.tasks, MetaEnvironment):
        check_methods(learner.tasks, names)
    else:
        check_baselines(supervised(learner), names)


def _compared(
    learner: Learner, request: EvaluationRequest, judged: Evaluation, records: Records, names: Sequence[str]
) -> list[dict[str, Any]]:
    """Return the scores of known methods or baselines on the tasks of ``records``."""
    if isinstance(judged, TrialEvaluation):
        return paired(judged, of_trials(learner).tasks, names, seed=request.key.seed)
    return paired_with_baselines(supervised(learner), request, records, names)


def _deviating(experiment: Experiment, options: EvaluationOptions) -> Experiment:
    """Return the experiment with the overrides, the options and workers of its own."""
    if options.overrides:
        experiment = _overridden(experiment, options)
    given = {"test_tasks": options.tasks, "inner_steps": options.inner_steps, "normalization": options.normalization}
    changes: dict[str, Any] = {name: value for name, value in given.items() if value is not None}
    groups: Any = experiment.workers
    if options.workers is not None:
        document = set_workers(experiment.document, options.workers)
        groups = typed("workers", document["workers"], tuple[WorkerGroup, ...])
    mine = tuple(g for g in groups if not g.outside) or (WorkerGroup(min=0, max=0),)
    return dataclasses.replace(experiment, workers=mine, evaluate=dataclasses.replace(experiment.evaluate, **changes))


def _overridden(experiment: Experiment, options: EvaluationOptions) -> Experiment:
    if other := [o for o in options.overrides if o.partition(".")[0] in ("tasks", "environment")]:
        named = other[0].partition("=")[0]
        if named.partition(".")[0] != experiment.tasks_key:
            raise ConfigError(f"evaluate: {named}: this run has {experiment.tasks_key}, see its config.yaml")
    return build(override(experiment.document, options.overrides), options.trust)


def _check_fit(run: Learner, learner: Learner, options: EvaluationOptions) -> None:
    """Refuse deviations under which the parameters of the run have no place, or that would change nothing."""
    mine, other = _shapes(run), _shapes(learner)
    if mine != other:
        first = next(name for name in {**mine, **other} if mine.get(name) != other.get(name))
        raise ConfigError(
            f"evaluate: {' '.join(options.overrides)}: '{first}' would have shape {other.get(first)} in place "
            f"of the run's {mine.get(first)}; expected tasks with the inputs and the outputs of the run's model"
        )
    keys, algorithm = options.keys, learner.algorithm
    has_steps = is_dataclass(algorithm) and "inner_steps" in {f.name for f in dataclasses.fields(algorithm)}
    if not has_steps and (options.inner_steps is not None or "evaluate.inner_steps" in keys):
        raise ConfigError(
            f"evaluate: inner_steps: algorithm '{type(algorithm).__name__}' adapts without gradient steps; leave it out"
        )
    trials = isinstance(learner.tasks, MetaEnvironment)
    if trials and (options.normalization is not None or "evaluate.normalization" in keys):
        raise ConfigError(
            "evaluate: normalization: supervised tasks have one, a meta-environment has none; leave it out"
        )
    if not trials and "evaluate.policy" in keys:
        raise ConfigError(
            "evaluate: evaluate.policy: a meta-environment has one, supervised tasks have none; leave it out"
        )


def _shapes(learner: Learner) -> dict[str, list[int]]:
    """Return the shape of every tensor of the state, by slot and name."""
    return {
        name if slot == "model" else f"{slot}/{name}": list(shape)
        for slot, declared in learner.slots.items()
        for name, shape in zip(declared.layout.names, declared.layout.shapes)
    }
