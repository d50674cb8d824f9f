"""Several seeds of one experiment: a run for each, under one parent that gets mean and standard deviation."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from metadist.config.build import build
from metadist.core.errors import ConfigError
from metadist.experiment.description import Experiment
from metadist.experiment.load import tracking_root
from metadist.experiment.result import Result
from metadist.experiment.train import train
from metadist.storage.run_directory import RunDirectory, new_run_id, newest_run, runs_root
from metadist.training.evaluation import as_json
from metadist.training.loop import evaluation_metrics


@dataclass
class Group:
    """Several seeds of one experiment, with mean and standard deviation of what they reached."""

    group_id: str
    run_dir: str
    results: list[Result]
    summary: dict[str, float]
    interrupted: bool = False

    def as_dict(self) -> dict[str, Any]:
        seeds = [{"seed": r.experiment.seed, **r.as_dict()} for r in self.results]
        return {"group_id": self.group_id, "run_dir": self.run_dir, "summary": as_json(self.summary), "seeds": seeds}


def train_seeds(
    document: dict[str, Any],
    seeds: list[int],
    *,
    run_dir: str | None,
    resume: bool,
    live: Callable[[Experiment], Any],
    stop: Callable[[], bool],
    show: Callable[[Result], None] = lambda _: None,
) -> Group:
    """One run per seed, in ``run_dir/seed-N``, as child runs of one parent that gets mean and SD."""
    from metadist import tracking

    base = Experiment.of(build(document))
    group_id = new_run_id(base.name)
    if resume and run_dir is None:
        run_dir = newest_run(base.name, "group.json")
    folder = RunDirectory(run_dir or f"{runs_root()}/{group_id}")
    known = folder.read_json("group.json")
    if folder.read("run.json") is not None:
        raise ConfigError(
            f"run_dir '{folder.url}' holds a run already, a single run; choose another --run-dir for {len(seeds)} seeds"
        )
    if known is not None:
        if not resume:
            raise ConfigError(
                f"run_dir '{folder.url}' holds runs already; go on with them by --resume, or choose another --run-dir"
            )
        if sorted(known["seeds"]) != sorted(seeds):
            raise ConfigError(
                f"--resume: the group has the seeds {known['seeds']}, not {seeds}; their mean stands for just these"
            )
        group_id = known["group_id"]
    else:
        folder.write(
            "group.json", json.dumps({"group_id": group_id, "name": base.name, "created": time.time(), "seeds": seeds})
        )
    results: list[Result] = []
    for seed in seeds:
        experiment = Experiment.of(build({**document, "seed": seed}))
        child = f"{folder.url}/seed-{seed}"
        again = resume and RunDirectory(child).read("run.json") is not None
        with live(experiment) as display:
            results.append(train(experiment, run_dir=child, resume=again, display=display, stop=stop, parent=group_id))
        show(results[-1])
        if stop():
            break
    final = [evaluation_metrics(r.evaluations[0]) for r in results if r.evaluations]
    summary = tracking.mean_sd(final)
    if len(final) == len(seeds):  # what is recorded once stays: no mean of half the seeds
        tracker = tracking.make_tracker(
            base.tracking.uri,
            spool=folder.scratch / "tracking",
            experiment=base.tracking.experiment,
            runs_root=tracking_root(folder),
        )
        tracking.log_group(tracker, run_id=group_id, name=group_id, results={base.learner.outer.meta_steps: final})
    return Group(group_id, folder.url, results, summary, interrupted=len(final) < len(seeds))
