"""Train several seeds of one experiment: a run per seed under one parent that records mean and standard deviation.

The same validation and test tasks judge all of them.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from typing import Any

from metadist.config.build import build
from metadist.config.experiment import Experiment
from metadist.config.schema import Document
from metadist.core.errors import ConfigError
from metadist.experiment.request import RunRequest
from metadist.experiment.result import Result
from metadist.experiment.train import train
from metadist.learners.evaluation import as_json
from metadist.storage.run_directory import RunDirectory, new_run_id, newest_run, runs_root, tracking_root
from metadist.tracking import log_group, make_tracker, mean_sd
from metadist.training.observers import Observer


@dataclass
class Group:
    """Several seeds of one experiment, with the mean and the standard deviation of their scores."""

    group_id: str
    run_dir: str
    results: list[Result]
    summary: dict[str, float]
    interrupted: bool = False

    def as_dict(self) -> dict[str, Any]:
        """Return plain data for JSON."""
        seeds = [{"seed": r.experiment.seed, **r.as_dict()} for r in self.results]
        return {"group_id": self.group_id, "run_dir": self.run_dir, "summary": as_json(self.summary), "seeds": seeds}


def train_seeds(
    document: Document,
    seeds: Sequence[int],
    request: RunRequest,
    live: Callable[[Experiment], AbstractContextManager[Observer]],
    show: Callable[[Result], None] = lambda _: None,
) -> Group:
    """Train one run per seed in ``run_dir/seed-N``, as child runs of a parent with mean and standard deviation.

    ``live(experiment)`` returns the display of a run; ``show(result)`` is called after each run.
    """
    base = build(document)
    directory, group_id, judged_by = _claim(base, seeds, request)
    results: list[Result] = []
    for seed in seeds:
        evaluation = {**(document.get("evaluate") or {}), **({} if judged_by is None else {"seed": judged_by})}
        experiment = build({**document, "seed": seed, "evaluate": evaluation})
        child = f"{directory.url}/seed-{seed}"
        again = request.resume and RunDirectory(child).read("run.json") is not None
        with live(experiment) as display:
            mine = replace(request, run_dir=child, resume=again, run_id=None, parent=group_id)
            results.append(train(experiment, mine, display))
        show(results[-1])
        if request.stop():
            break
    final = [r.evaluations[0].metrics() for r in results if r.evaluations]
    if len(final) == len(seeds):  # the tracker keeps the first value of a point: record no mean of a part of the seeds
        _record(base, directory, group_id, final)
    return Group(group_id, directory.url, results, mean_sd(final), interrupted=len(final) < len(seeds))


def _claim(base: Experiment, seeds: Sequence[int], request: RunRequest) -> tuple[RunDirectory, str, int | None]:
    """Return the group's directory, its id, and the seed of the tasks that judge all its runs.

    A group of an earlier version has no such seed. Raises ConfigError where the directory belongs to another run or
    group.
    """
    name = base.name
    run_dir = request.run_dir
    if request.resume and run_dir is None:
        run_dir = newest_run(name, "group.json")
    group_id = new_run_id(name)
    directory = RunDirectory(run_dir or f"{runs_root()}/{group_id}")
    known = directory.read_json("group.json")
    if directory.read("run.json") is not None:
        raise ConfigError(
            f"run_dir '{directory.url}' holds a run already; choose another --run-dir for {len(seeds)} seeds"
        )
    if known is None:
        judged_by = seeds[0] if base.evaluate.seed is None else base.evaluate.seed
        about = {"group_id": group_id, "name": name, "created": time.time(), "seeds": list(seeds)}
        directory.write("group.json", json.dumps({**about, "evaluate_seed": judged_by}))
        return directory, group_id, judged_by
    if not request.resume:
        raise ConfigError(
            f"run_dir '{directory.url}' holds runs already; continue them with --resume, or choose another --run-dir"
        )
    if sorted(known["seeds"]) != sorted(seeds):
        raise ConfigError(f"--resume: the group has the seeds {known['seeds']}, not {list(seeds)}; give the same seeds")
    return directory, str(known["group_id"]), known.get("evaluate_seed")


def _record(base: Experiment, directory: RunDirectory, group_id: str, final: list[dict[str, float]]) -> None:
    tracker = make_tracker(
        base.tracking.uri,
        spool=directory.scratch / "tracking",
        experiment=base.tracking.experiment,
        runs_root=tracking_root(directory),
    )
    log_group(tracker, run_id=group_id, name=group_id, results={base.learner.outer.meta_steps: final})
