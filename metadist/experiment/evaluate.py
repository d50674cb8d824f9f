"""Evaluate a finished run, or all seeds of a group on the same tasks."""

from __future__ import annotations

import dataclasses
import json
import time

from metadist.core.errors import ConfigError
from metadist.experiment.evaluation_record import FOLDER, new_evaluation_id
from metadist.experiment.judging import EvaluationOptions
from metadist.experiment.load import load_run
from metadist.experiment.result import Result
from metadist.experiment.seeds import Group
from metadist.learners.evaluation import as_json
from metadist.storage.run_directory import RunDirectory
from metadist.tracking import mean_sd


def evaluate_run(run_dir: str, options: EvaluationOptions = EvaluationOptions(), name: str | None = None) -> Result:
    """Evaluate the best parameters of a run. Raises ConfigError where an option does not suit the run's tasks.

    ``name`` is the name of the evaluation's folder in the run directory.
    """
    return load_run(run_dir, trust=options.trust).judged(options, name)


def is_group(run_dir: str) -> bool:
    """Return whether ``run_dir`` holds a group of seeds."""
    folder = RunDirectory(run_dir)
    return folder.read("run.json") is None and folder.read("group.json") is not None


def evaluate_group(run_dir: str, options: EvaluationOptions = EvaluationOptions()) -> Group:
    """Evaluate every seed of a group on the same tasks: those of ``evaluate.seed``, or else of the first seed."""
    folder = RunDirectory(run_dir)
    about = folder.read_json("group.json")
    if about is None:
        raise ConfigError(f"'{run_dir}' holds no group of seeds; is it the folder that train --seeds printed?")
    name, seeds, seed = new_evaluation_id(options.split), about["seeds"], about.get("evaluate_seed")
    if "evaluate.seed" not in options.keys:
        shared = f"evaluate.seed={seeds[0] if seed is None else seed}"
        options = dataclasses.replace(options, overrides=[*options.overrides, shared])
    results = [evaluate_run(f"{folder.url}/seed-{each}", options, name) for each in seeds]
    summary = mean_sd([result.evaluations[0].metrics() for result in results])
    if options.record:
        record = {
            "id": name,
            "created": time.time(),
            "overrides": list(options.overrides),
            "summary": as_json(summary),
            "seeds": [{"seed": r.experiment.seed, "evaluation": r.evaluations[0].as_dict()} for r in results],
        }
        folder.write(f"{FOLDER}/{name}/evaluation.json", json.dumps(record, indent=1))
    return Group(str(about["group_id"]), folder.url, results, summary)
