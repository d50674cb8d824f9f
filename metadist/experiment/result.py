"""The result of a training run."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves

from metadist.config.experiment import Experiment
from metadist.core.errors import CheckpointError, ConfigError, at_least, one_of
from metadist.core.signature import DivergedAdaptation, Signature
from metadist.core.state import Records, State
from metadist.core.task import Examples
from metadist.experiment.evaluation_record import recording_of
from metadist.experiment.judging import EvaluationOptions, Judgement, Trained
from metadist.learners import supervised
from metadist.learners.evaluation import Evaluation, as_json
from metadist.storage.checkpoints import export_parameters
from metadist.training.progress import Outcome

#: The prefix of names in an exported file that do not belong to the model.
SLOTS = "slots/"


def signature_of(about: Mapping[str, Any]) -> Signature | None:
    """Return the signature in a manifest or in the metadata of an export; None where an earlier version wrote it.

    Raises ``CheckpointError`` where it is damaged.
    """
    recorded = about.get("signature")
    if isinstance(recorded, str):
        try:
            recorded = json.loads(recorded)
        except ValueError:
            raise CheckpointError("the signature of the model is damaged; export the run again") from None
    return None if recorded is None else Signature.of_dict(recorded)


@dataclass(frozen=True)
class AdaptedParameters:
    """The adapted parameters φ and their support set."""

    phi: Any
    support: Examples


@dataclass
class Result:
    """A trained or loaded meta-learner: its scores, and ``adapt`` and ``predict`` for new support sets."""

    run_id: str
    run_dir: str
    experiment: Experiment
    outcome: Outcome
    evaluations: list[Evaluation]
    params_sha256: str
    retried: dict[str, int]
    wall_seconds: float
    undelivered: int = 0
    #: The workers whose numerics differ from the numerics at the run's begin.
    inexact: list[str] = field(default_factory=list)
    tracking_url: str | None = None
    #: the signature that training recorded; None for a run of a version that did not, and for meta-environments
    recorded: Signature | None = None
    #: the records of single tasks of the last evaluation
    task_records: Records | None = field(default=None, repr=False)
    #: the folder of the evaluation that was recorded last
    evaluation_dir: str | None = None

    @property
    def state(self) -> State:
        """The parameters that validated best."""
        return self.outcome.best

    @property
    def interrupted(self) -> bool:
        """Whether a user stopped the run before its end."""
        return self.outcome.stopped == "interrupted"

    @cached_property
    def signature(self) -> Signature:
        """Shapes, dtypes and classes of inputs and targets. ConfigError for a meta-environment, which has none."""
        learner = self.experiment.learner
        signature = self.recorded or learner.describe_earlier(self.experiment.seed)
        if signature is None:
            raise ConfigError(f"adapt: {learner.servable()}")
        return signature

    def adapt(self, x: Tensor, y: Tensor, inner_steps: int | None = None) -> AdaptedParameters:
        """Adapt to a support set x [N, …], y [N, …], and return the argument of ``predict``.

        Raises ``InvalidInput`` where x or y have another shape, dtype or class than in training, or hold NaN, and
        ``DivergedAdaptation`` where the adaptation gives NaN or Inf.
        """
        at_least(0, inner_steps=inner_steps)
        learner = self.experiment.learner
        support = self.signature.support(torch.as_tensor(x), torch.as_tensor(y))
        with self.signature.judged_by_model():
            phi = learner.adapt(self.state, support, inner_steps, self.signature.ways(support.y))
        if not all(bool(torch.isfinite(t).all()) for t in tree_leaves(phi) if isinstance(t, Tensor)):
            raise DivergedAdaptation
        return AdaptedParameters(phi, support)

    def predict(self, adapted: AdaptedParameters, x: Tensor) -> Tensor:
        """Return predictions for x [N, …]: logits or values [N, …]. Raises ``InvalidInput`` as ``adapt``."""
        learner = self.experiment.learner
        queries = self.signature.inputs("x", torch.as_tensor(x))
        with self.signature.judged_by_model():
            return learner.predict(self.state, adapted.phi, queries, adapted.support)

    def evaluate(self, *overrides: str, **options: Any) -> Evaluation:
        """Judge the best parameters again, and record the scores in the run directory and in MLflow.

        ``overrides`` are ``KEY=VALUE`` (``"tasks.k_shot=5"``); ``options`` are ``tasks`` (their number), ``split``,
        ``inner_steps``, ``normalization``, ``beside``, ``workers`` (default: this process) and ``record``. ConfigError
        where one of them does not suit the run.
        """
        known = [f.name for f in dataclasses.fields(EvaluationOptions) if f.name != "overrides"]
        for name in options:
            one_of("evaluate", name, known)
        return self.judged(EvaluationOptions(overrides=overrides, **{"workers": "0", **options})).evaluations[0]

    def judged(self, options: EvaluationOptions, name: str | None = None) -> Result:
        """Return this result with the scores of an evaluation, which is recorded under ``name``."""
        trained = Trained(self.run_id, self.run_dir, self.experiment, self.outcome.best_step, self.state)
        judgement = Judgement.prepared(trained, options)
        if options.record:
            with recording_of(judgement, name) as record:
                evaluation, records, seconds = judgement.scores()
                record.write(evaluation, records)
        else:
            evaluation, records, seconds = judgement.scores()
        return dataclasses.replace(
            self,
            experiment=judgement.experiment,
            evaluations=[evaluation],
            task_records=records,
            wall_seconds=seconds,
            evaluation_dir=f"{self.run_dir}/{record.written}" if options.record else None,
        )

    def discretised(self) -> dict[str, Any]:
        """Return ``model`` of a config with the architecture that the run has found.

        ConfigError where the algorithm learns none.
        """
        learner = supervised(self.experiment.learner)
        found = learner.algorithm.discretised(learner.model, self.state.theta(learner.slots))
        if found is None:
            name = self.experiment.algorithm.document["name"]
            raise ConfigError(f"discretised: algorithm '{name}' learns no architecture; train with metanas")
        return {**self.experiment.model.document, **found}

    def export(self, path: str | Path) -> None:
        """Write a safetensors file that can be served.

        It holds the model's parameters under their own names, all other learned slots (the rates of Meta-SGD), and the
        config as metadata.
        """
        learner = self.experiment.learner
        others = {
            f"{SLOTS}{slot}/{name}": tensor
            for slot in learner.algorithm.slots(learner.model, learner.model.initial(0)[0])
            for name, tensor in self.state.theta(learner.slots)[slot].items()
        }
        document = dict(self.experiment.document)
        if replaced := learner.exported_tasks():
            document["tasks"] = {**document["tasks"], **replaced}
        metadata = {"run_id": self.run_id, "format": "metadist", "config": json.dumps(document)}
        if self.recorded is not None:
            metadata["signature"] = json.dumps(self.recorded.as_dict())
        export_parameters(path, {**learner.parameters(self.state), **others}, metadata)

    def as_dict(self) -> dict[str, Any]:
        """Return plain data for JSON."""
        about = {
            "run_id": self.run_id,
            "run_dir": self.run_dir,
            "meta_step": self.outcome.progress.meta_step,
            "best_meta_step": self.outcome.best_step,
            "params_sha256": self.params_sha256,
            "tasks_per_second": round(self.outcome.tasks_per_second, 2),
            "evaluation_dir": self.evaluation_dir,
            "evaluation": self.evaluations[-1].as_dict() if self.evaluations else None,
            "validation": self.outcome.progress.validation[-1:],
            "shards_retried": self.retried,
            "stopped": self.outcome.stopped,
            "inexact": self.inexact,
            "wall_seconds": round(self.wall_seconds, 2),
            "undelivered": self.undelivered,
            "tracking_url": self.tracking_url,
        }
        return as_json(about)
