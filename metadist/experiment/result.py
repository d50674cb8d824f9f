"""The result of a training run."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch import Tensor

from metadist.core.errors import ConfigError
from metadist.core.state import State
from metadist.core.task import Examples
from metadist.experiment.description import Experiment
from metadist.learners.few_shot import Learner
from metadist.storage.checkpoints import export_parameters
from metadist.training.evaluation import Evaluation, as_json
from metadist.training.progress import Outcome

#: in an exported file: the names of what isn't the model's
BEYOND = "slots/"


@dataclass(frozen=True)
class Adapted:
    """φ and the support set that it was adapted to."""

    phi: Any
    support: Examples


@dataclass
class Result:
    """A trained (or loaded) meta-learner: scores, and ``adapt`` / ``predict`` on new support sets."""

    run_id: str
    run_dir: str
    experiment: Experiment
    outcome: Outcome
    evaluations: list[Evaluation]
    params_sha256: str
    retried: dict[str, int]
    wall_seconds: float
    undelivered: int = 0
    #: who computed other bits than the run began with, where it may not be exact
    inexact: list[str] = field(default_factory=list)
    tracking_url: str | None = None

    @property
    def state(self) -> State:
        """The parameters that validated best."""
        return self.outcome.best

    def adapt(self, x: Tensor, y: Tensor, inner_steps: int | None = None) -> Adapted:
        """Adapt to a support set x [N, …], y [N, …]; hand the result to ``predict``."""
        learner = self._supervised("adapt")
        dtype = learner.model.dtype
        support = Examples(x.to(dtype), y.to(dtype) if y.is_floating_point() else y)
        return Adapted(learner.adapt(self.state, support, inner_steps), support)

    def predict(self, adapted: Adapted, x: Tensor) -> Tensor:
        """Predictions for x [N, …]: logits or values [N, …]."""
        learner = self._supervised("predict")
        return learner.predict(self.state, adapted.phi, x.to(learner.model.dtype), adapted.support)

    def _supervised(self, method: str) -> Learner:
        learner = self.experiment.learner
        if not isinstance(learner, Learner):
            raise ConfigError(
                f"{method}: {type(learner.tasks).__name__} is a meta-environment; its policy adapts by acting (evaluate)"
            )
        return learner

    def export(self, path: str | Path) -> None:
        """The model's parameters under their own names, as one safetensors file; beside them what else the algorithm learned
        (Meta-SGD's rates), and the config in the metadata, so that the file can be served."""
        learner = self.experiment.learner
        beyond = {
            f"{BEYOND}{slot}/{name}": tensor
            for slot in learner.algorithm.slots(learner.model, learner.model.initial(0)[0])
            for name, tensor in self.state.theta(learner.slots)[slot].items()
        }
        metadata = {"run_id": self.run_id, "format": "metadist", "config": json.dumps(self.experiment.document)}
        export_parameters(path, {**learner.parameters(self.state), **beyond}, metadata)

    def as_dict(self) -> dict[str, Any]:
        about = {
            "run_id": self.run_id,
            "run_dir": self.run_dir,
            "meta_step": self.outcome.progress.meta_step,
            "best_meta_step": self.outcome.best_step,
            "params_sha256": self.params_sha256,
            "tasks_per_second": round(self.outcome.tasks_per_second, 2),
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
