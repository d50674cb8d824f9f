"""One process's attempt at a run."""

from __future__ import annotations

import platform
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

import torch

import metadist
from metadist.config.experiment import Experiment
from metadist.core.signature import Signature
from metadist.storage.checkpoints import Checkpoints, Loaded
from metadist.storage.run_directory import RunDirectory
from metadist.training.progress import Progress
from metadist.training.scheduler import Scheduler
from metadist.workers.plan import Planner, recorded_engine, sharing


@dataclass
class Attempt:
    """One process's attempt at a run: the run's directory, and the state at which this attempt begins.

    ``earlier`` is the checkpoint that the attempt resumes, or None. ``inexact`` names the workers whose numerics differ
    from the numerics at the run's begin; every checkpoint stores the list. ``edited`` names the user's modules whose
    code is another one than that of the earlier checkpoint. ``signature`` describes inputs and targets.
    """

    experiment: Experiment
    directory: RunDirectory
    run_id: str
    checkpoints: Checkpoints
    earlier: Loaded | None
    progress: Progress
    inexact: list[str] = field(default_factory=list)
    edited: list[str] = field(default_factory=list)
    signature: Signature | None = None

    @property
    def manifest(self) -> dict[str, Any]:
        """The manifest of the earlier checkpoint; empty for a new run."""
        return {} if self.earlier is None else self.earlier.manifest

    @property
    def fingerprint(self) -> dict[str, Any] | None:
        """The numerics fingerprint at the begin of the run."""
        return self.manifest.get("fingerprint")

    @property
    def planner(self) -> Planner:
        """The planner that repeats the engine of the earlier checkpoint, or that chooses one for a new run."""
        return recorded_engine(self.manifest.get("engine", {})) if self.earlier else planner_for(self.experiment)

    def facts(self, workers: Scheduler) -> dict[str, Any]:
        """Return the facts about this attempt that every checkpoint stores."""
        first, plan = next(iter(workers.executor.workers().values())), workers.executor.plan
        assert plan is not None, "workers that compute have a plan"
        return {
            "config": self.experiment.document,
            "fingerprint": first["fingerprint"],
            "engine": asdict(plan.engine),
            "data_sha256": self.experiment.learner.data_sha256,
            "modules": self.experiment.code,
            **({} if self.signature is None else {"signature": self.signature.as_dict()}),
            "versions": {
                "metadist": metadist.__version__,
                "torch": torch.__version__,
                "python": platform.python_version(),
            },
            "inexact": self.inexact,
        }


def planner_for(experiment: Experiment) -> Planner:
    """Return the planner of a new run: it chooses the engine settings that the config leaves open."""
    return lambda device: experiment.learner.plan(experiment.engine, device, sharing(device, experiment.workers))


def edited_modules(experiment: Experiment, manifest: Mapping[str, Any]) -> list[str]:
    """Name the user's modules whose code is not that of a checkpoint with this manifest.

    Checkpoints of version 0.1 do not state the code; nothing is compared with them.
    """
    before, now = manifest.get("modules"), experiment.code
    if before is None:
        return []
    return [name for name in sorted(before.keys() | now.keys()) if before.get(name) != now.get(name)]
