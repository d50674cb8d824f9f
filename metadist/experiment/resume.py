"""Start a run, or resume one after a comparison with its config, seed and data."""

from __future__ import annotations

import json
import logging
import platform
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

import yaml

from metadist.config.experiment import Experiment
from metadist.config.schema import flatten, parse_yaml
from metadist.config.trust import modules_of
from metadist.core.errors import CheckpointError, ConfigError
from metadist.core.round import MetaStepKey
from metadist.experiment.attempt import Attempt, edited_modules
from metadist.experiment.lifecycle import locked
from metadist.experiment.load import initial_parameters
from metadist.experiment.request import RunRequest
from metadist.storage.checkpoints import Checkpoints, Loaded
from metadist.storage.run_directory import RunDirectory, new_run_id, newest_run, runs_root
from metadist.storage.states import StateFolders
from metadist.training.progress import Progress

log = logging.getLogger(__name__)

#: Keys that can differ between a run and its resumption: none of them changes θ.
FREE_ON_RESUME = (
    "workers",
    "outside",
    "tracking",
    "control",
    "checkpoint",
    "evaluate",
    "task_metrics",
    "engine.exact",
    "engine.same_code",
    "engine.shard_timeout",
    "engine.worker_patience",
)


@contextmanager
def claimed(experiment: Experiment, request: RunRequest) -> Iterator[tuple[RunDirectory, str]]:
    """Lock the run directory and yield it with the run's id.

    Raises ConfigError where the directory belongs to another run or process.
    """
    run_dir = request.run_dir
    if request.resume and run_dir is None:
        run_dir = newest_run(experiment.name)
    run_id = request.run_id or new_run_id(experiment.name)
    directory = RunDirectory(run_dir or f"{runs_root()}/{run_id}")
    with locked(directory):
        yield directory, _run_id(directory, experiment, run_id, request.resume)


def _run_id(directory: RunDirectory, experiment: Experiment, run_id: str, resume: bool) -> str:
    """Write the id and the config of a new run, or read the id of the run to resume."""
    about = directory.read_json("run.json")
    if about is not None:
        if not resume:
            raise ConfigError(
                f"run_dir '{directory.url}' holds a run already; continue it with --resume, or choose another --run-dir"
            )
        return str(about["run_id"])
    if directory.read("group.json") is not None:
        raise ConfigError(
            f"run_dir '{directory.url}' holds a group of seeds; continue it with --seeds, or choose another --run-dir"
        )
    if resume:
        log.warning("run_dir %s holds no run yet; a new one starts", directory.url)
    _write_config(directory, experiment)
    about = {"run_id": run_id, "name": experiment.name, "created": time.time()}
    notes = list(experiment.tasks.made.data_notes())
    directory.write("run.json", json.dumps({**about, **({"data_notes": notes} if notes else {})}))
    return run_id


def resume_or_start(experiment: Experiment, directory: RunDirectory, run_id: str, trust: Sequence[str] = ()) -> Attempt:
    """Load the newest checkpoint, or make the initial state.

    ``trust``: the modules that the config of the run in ``init_from`` may name, besides those of this experiment.

    Raises ConfigError where a key that changes θ differs from the run's config, and CheckpointError where seed, data or
    the code of the user's modules differ.
    """
    learner = experiment.learner
    higher_is_better = learner.tasks.higher_is_better
    checkpoints = Checkpoints(directory.url, keep=experiment.checkpoint.keep, higher_is_better=higher_is_better)
    earlier = checkpoints.latest(learner.slots, partial(_without_states, experiment, directory))
    if earlier is None:
        modules = [*trust, *modules_of(experiment.document)]
        progress = Progress(0, learner.initial(experiment.seed, initial_parameters(experiment.init_from, modules)))
    else:
        progress = Progress.of(earlier)
        _refuse_other_data(experiment, earlier.manifest)
    if progress.meta_step:
        _refuse_other_config(directory, experiment)
    edited = _edited(experiment, earlier) if earlier is not None and progress.meta_step else []
    _write_config(directory, experiment)
    inexact = list(earlier.manifest.get("inexact", ())) if earlier else []
    return Attempt(experiment, directory, run_id, checkpoints, earlier, progress, inexact, edited)


def _without_states(experiment: Experiment, directory: RunDirectory, loaded: Loaded) -> str | None:
    """Return why the states of particles that belong to a checkpoint can't be read; None where all is well."""
    key = MetaStepKey("", loaded.meta_step, experiment.seed)
    shards = len(experiment.learner.carried(key))
    return StateFolders(directory.url).problem(loaded.manifest.get("states"), shards) if shards else None


def _write_config(directory: RunDirectory, experiment: Experiment) -> None:
    directory.write("config.yaml", yaml.safe_dump(experiment.document, sort_keys=False, allow_unicode=True))


def _refuse_other_config(directory: RunDirectory, experiment: Experiment) -> None:
    text = directory.read("config.yaml")
    before = flatten(parse_yaml(text or "{}", "config.yaml") or {})
    now = flatten(experiment.document)
    longer = experiment.learner.outer.schedule == "constant"
    for key in sorted(before.keys() | now.keys()):
        free = key.startswith(FREE_ON_RESUME) or (key == "outer.meta_steps" and longer)
        if not free and before.get(key) != now.get(key):
            raise ConfigError(
                f"--resume: {key} is {now.get(key)!r}, the run began with {before.get(key)!r}; only "
                f"{', '.join(FREE_ON_RESUME)} (and outer.meta_steps of a constant schedule) may change"
            )


def _refuse_other_data(experiment: Experiment, manifest: dict[str, Any]) -> None:
    if manifest["seed"] != experiment.seed:
        raise CheckpointError(f"--resume: the run's seed is {manifest['seed']}, not {experiment.seed}")
    data = experiment.learner.data_sha256
    if manifest["data_sha256"] != data:
        raise CheckpointError(f"--resume: the run began on other data (sha256 {manifest['data_sha256']}, here {data})")


def _edited(experiment: Experiment, earlier: Loaded) -> list[str]:
    """Name the user's modules whose code is not that of the checkpoint; CheckpointError unless the config allows it."""
    names = edited_modules(experiment, earlier.manifest)
    if names and experiment.engine.same_code:
        name, others = names[0], f" (and {len(names) - 1} more)" if len(names) > 1 else ""
        codes = earlier.manifest["modules"], experiment.code
        then, now = (f"sha256 {str(code[name])[:12]}…" if name in code else "not there" for code in codes)
        raise CheckpointError(
            f"--resume: module '{name}'{others} was edited since the checkpoint of meta-step {earlier.meta_step} "
            f"({then} then, {now} on {platform.node()} now); restore it, or continue with the new code by "
            "engine.same_code=false, which marks the run inexact"
        )
    return names
