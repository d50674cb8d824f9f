"""The description of an experiment."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from metadist.config.build import Config, EngineSettings, resolved
from metadist.config.groups import WorkerGroup
from metadist.config.settings import (
    CheckpointSettings,
    ControlSettings,
    EvaluateSettings,
    OutsideSettings,
    TrackingSettings,
)
from metadist.learners.few_shot import Learner
from metadist.learners.trials import TrialLearner
from metadist.training.evaluation import Evaluation


@dataclass(frozen=True)
class Experiment:
    """A learner and everything around it. From YAML by ``Experiment.of(config)``, or made in Python."""

    name: str
    seed: int
    learner: Learner | TrialLearner
    evaluate: EvaluateSettings = EvaluateSettings()
    workers: tuple[WorkerGroup, ...] = (WorkerGroup(max=0, min=0),)
    engine: EngineSettings = EngineSettings()
    checkpoint: CheckpointSettings = CheckpointSettings()
    tracking: TrackingSettings = TrackingSettings()
    control: ControlSettings = ControlSettings()
    outside: OutsideSettings = OutsideSettings()
    init_from: str | None = None
    document: dict[str, Any] = field(default_factory=dict)

    @classmethod
    def of(cls, config: Config) -> Experiment:
        return cls(
            config.name,
            config.seed,
            config.learner(),
            config.evaluate,
            config.workers,
            config.engine,
            config.checkpoint,
            config.tracking,
            config.control,
            config.outside,
            config.init_from,
            resolved(config),
        )


class Quiet:
    """A display that shows nothing."""

    def step(self, meta_step: int, report: Mapping[str, float], tasks_per_second: float) -> None: ...

    def evaluated(self, meta_step: int, evaluation: Evaluation) -> None: ...

    def note(self, message: str) -> None: ...
