"""Compare a run with the one that it resumes."""

from __future__ import annotations

from typing import Any

import yaml

from metadist.config.schema import flatten, parse_yaml
from metadist.core.errors import CheckpointError, ConfigError
from metadist.experiment.description import Experiment
from metadist.storage.run_directory import RunDirectory

#: what may differ between a run and its resumption: nothing of it enters θ
FREE_ON_RESUME = (
    "workers",
    "outside",
    "tracking",
    "control",
    "checkpoint",
    "evaluate",
    "engine.exact",
    "engine.shard_timeout",
    "engine.worker_patience",
)


def _refuse_other_config(folder: RunDirectory, experiment: Experiment, meta_step: int) -> None:
    """A resumed run must be the run that was begun, in everything that enters θ."""
    text = folder.read("config.yaml")
    before = flatten(parse_yaml(text or "{}", "config.yaml") or {})
    now = flatten(experiment.document)
    if meta_step:
        longer = experiment.learner.outer.schedule == "constant"
        for key in sorted(before.keys() | now.keys()):
            free = key.startswith(FREE_ON_RESUME) or (key == "outer.meta_steps" and longer)
            if not free and before.get(key) != now.get(key):
                raise ConfigError(
                    f"--resume: {key} is {now.get(key)!r}, the run began with {before.get(key)!r}; only "
                    f"{', '.join(FREE_ON_RESUME)} (and outer.meta_steps of a constant schedule) may change"
                )
    folder.write("config.yaml", yaml.safe_dump(experiment.document, sort_keys=False, allow_unicode=True))


def _checked_manifest(experiment: Experiment, manifest: dict[str, Any]) -> dict[str, Any]:
    """The numerics fingerprint that the run began with, after a look at seed and data."""
    if manifest["seed"] != experiment.seed:
        raise CheckpointError(f"--resume: the run's seed is {manifest['seed']}, not {experiment.seed}")
    data = getattr(experiment.learner.tasks, "data_sha256", None)
    if manifest["data_sha256"] != data:
        raise CheckpointError(f"--resume: the run began on other data (sha256 {manifest['data_sha256']}, here {data})")
    return manifest["fingerprint"]
