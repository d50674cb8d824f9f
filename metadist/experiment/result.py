"""The result of a training run."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, get_args

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves

from metadist.config.experiment import Experiment
from metadist.core.errors import CheckpointError, ConfigError, at_least, one_of
from metadist.core.signature import DivergedAdaptation, Signature
from metadist.core.state import Records, State, Weights
from metadist.core.task import Examples
from metadist.core.tree import Tree, arrays
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
    """A trained or loaded meta-learner: its scores, and ``adapt`` and ``predict`` for new support sets.

    ``params_sha256`` is the hash of the trained parameters at the end of the run, or of those that were loaded.
    """

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
        """The parameters that validated best: the averages, where the outer loop averages them."""
        return self.outcome.best.judged()

    @property
    def weights(self) -> Weights:
        """Whether ``state`` has the trained parameters or their averages; ``outcome`` has both."""
        return self.outcome.best.weights

    @property
    def averaged_sha256(self) -> str | None:
        """The hash of the averages at the end of the run; None where there are none."""
        last = self.outcome.progress.state
        return last.judged().sha256() if last.weights == "averaged" else None

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

    def adapt(self, x: Tree, y: Tree, inner_steps: int | None = None) -> AdaptedParameters:
        """Adapt to a support set x [N, …], y [N, …], and return the argument of ``predict``.

        x and y are tensors, or dicts or tuples of tensors, as in training.
        Raises ``InvalidInput`` where x or y have another shape, dtype or class than in training, or hold NaN, and
        ``DivergedAdaptation`` where the adaptation gives NaN or Inf.
        """
        at_least(0, inner_steps=inner_steps)
        learner = self.experiment.learner
        support = self.signature.support(arrays(x), arrays(y))
        with self.signature.judged_by_model():
            phi = learner.adapt(self.state, support, inner_steps, self.signature.ways(support.y))
        if not all(bool(torch.isfinite(t).all()) for t in tree_leaves(phi) if isinstance(t, Tensor)):
            raise DivergedAdaptation
        return AdaptedParameters(phi, support)

    def predict(self, adapted: AdaptedParameters, x: Tree) -> Tree:
        """Return predictions for x [N, …]: logits or values [N, …], or a dict or tuple of them.

        Raises ``InvalidInput`` as ``adapt``. Where tasks have their own numbers of classes, there are as many logits as
        the support set has classes.
        """
        learner = self.experiment.learner
        queries = self.signature.inputs("x", arrays(x))
        with self.signature.judged_by_model():
            prediction = learner.predict(self.state, adapted.phi, queries, adapted.support)
        return self.signature.logits(prediction, self.signature.ways(adapted.support.y))

    def optimizer(self, parameters: Iterable[Any]) -> torch.optim.Optimizer:
        """Return the learned optimiser as a ``torch.optim.Optimizer`` of ``parameters``, those of any ``nn.Module``.

        ConfigError where the algorithm learns no optimiser.
        """
        return self.experiment.learner.optimizer(self.state, parameters)

    def evaluate(self, *overrides: str, **options: Any) -> Evaluation:
        """Judge the best parameters again, and record the scores in the run directory and in MLflow.

        ``overrides`` are ``KEY=VALUE`` (``"tasks.k_shot=5"``); ``options`` are ``tasks`` (their number), ``split``,
        ``inner_steps``, ``normalization``, ``weights`` (``trained`` or ``averaged``), ``beside``, ``workers`` (default:
        this process) and ``record``. ConfigError where one of them does not suit the run.
        """
        known = [f.name for f in dataclasses.fields(EvaluationOptions) if f.name != "overrides"]
        for name in options:
            one_of("evaluate", name, known)
        return self.judged(EvaluationOptions(overrides=overrides, **{"workers": "0", **options})).evaluations[0]

    def judged(self, options: EvaluationOptions, name: str | None = None) -> Result:
        """Return this result with the scores of an evaluation, which is recorded under ``name``."""
        state = self._chosen("evaluate", options.weights)
        trained = Trained(self.run_id, self.run_dir, self.experiment, self.outcome.best_step, state)
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

    def _chosen(self, what: str, weights: str | None) -> State:
        """Return the state with ``weights``; None for ``judged``. ConfigError where there are none of them."""
        if weights is not None:
            one_of(f"{what}: weights", weights, get_args(Weights))
        if weights == "averaged" and self.weights == "trained":
            raise ConfigError(
                f"{what}: weights: averaged, but run {self.run_id} has no averages; it needs outer.ema, outer.tail "
                "or optimizer: schedule_free"
            )
        return self.outcome.best.trained() if weights == "trained" else self.state

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

    def export(self, path: str | Path, weights: str | None = None) -> None:
        """Write a safetensors file that can be served.

        It holds the model's parameters under their own names, all other learned slots (the rates of Meta-SGD), and as
        metadata the config and the kind of ``weights``: ``trained``, or ``averaged`` (default: where there are some).
        """
        learner, state = self.experiment.learner, self._chosen("export", weights)
        others = {
            f"{SLOTS}{slot}/{name}": tensor
            for slot in learner.algorithm.slots(learner.model, learner.model.initial(0)[0])
            for name, tensor in state.theta(learner.slots)[slot].items()
        }
        document = dict(self.experiment.document)
        if replaced := learner.exported_tasks():
            document["tasks"] = {**document["tasks"], **replaced}
        about = {"run_id": self.run_id, "format": "metadist", "weights": state.weights}
        metadata = {**about, "config": json.dumps(document)}
        if self.recorded is not None:
            metadata["signature"] = json.dumps(self.recorded.as_dict())
        export_parameters(path, {**learner.parameters(state), **others}, metadata)

    def as_dict(self) -> dict[str, Any]:
        """Return plain data for JSON."""
        about = {
            "run_id": self.run_id,
            "run_dir": self.run_dir,
            "meta_step": self.outcome.progress.meta_step,
            "best_meta_step": self.outcome.best_step,
            "params_sha256": self.params_sha256,
            "weights": self.weights,
            "averaged_sha256": self.averaged_sha256,
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
