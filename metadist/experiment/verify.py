"""Exactness, tested: the same parameters for any number of workers, whichever are killed."""

from __future__ import annotations

import dataclasses
import tempfile
from collections.abc import Sequence
from typing import Any

from metadist.config.build import build
from metadist.config.document import override, set_workers
from metadist.config.schema import Document
from metadist.core.errors import ConfigError
from metadist.core.round import Shard
from metadist.experiment.fleet import local_plan
from metadist.experiment.request import Request
from metadist.experiment.train import train
from metadist.training.observers import Observer
from metadist.training.scheduler import Scheduler


def counts(text: str) -> list[str]:
    """``--workers 0,2,learners=1/environments=2`` as a list: what is compared, each as ``--workers`` of ``train`` takes it."""
    found = [part.strip().replace("/", ",") for part in text.split(",")]
    if not all(part.isdecimal() or "=" in part for part in found) or len(set(found)) < len(found):
        raise ConfigError(
            f"--workers {text}: expected different numbers of workers, such as 0,1,2 or 0,2,learners=1/environments=2"
        )
    return found


class Killer:
    """Kills ``kills`` workers with a shard in flight, at meta-steps spread over the run: in turns in a first round (rollouts),
    and in a later one where there are any (gradients of what was rolled out)."""

    def __init__(self, kills: int, meta_steps: int) -> None:
        self._due = [(2 * i + 1) * meta_steps // (2 * kills) for i in range(kills)]
        self.killed: list[str] = []
        self._later_rounds = False

    def __call__(self, scheduler: Scheduler, shard: Shard) -> None:
        kill = getattr(scheduler.executor, "kill_busy", None)
        # The last victim's death must have been noticed, or the same one would be killed twice.
        noticed = scheduler.retried["lost"] >= len(self.killed)
        self._later_rounds |= bool(shard.needs)
        wanted = shard.split == "train" and (len(self.killed) % 2 == bool(shard.needs) or not self._later_rounds)
        if kill is not None and wanted and self._due and shard.meta_step >= self._due[0] and noticed:
            victim = kill()
            if victim is not None:
                self._due.pop(0)
                self.killed.append(victim)


def _as_the_whole_run(document: Document) -> Document:
    """With ``engine.compile`` as the run would resolve it at its full length: what is verified is what will run."""
    experiment = build(document)
    if experiment.engine.compile != "auto":
        return document
    compile = "always" if local_plan(experiment).engine.compile else "never"
    return override(document, [f"engine.compile={compile}"])


def verify(
    document: Document, workers: Sequence[str], *, kill: int, meta_steps: int | None, display: Observer
) -> dict[str, Any]:
    """Train once for every number of workers and compare SHA-256s. ``ok`` is False where they differ or too few shards were lost."""
    rows = []
    if meta_steps:
        document = _as_the_whole_run(document)
    for count in workers:
        chosen = set_workers(document, count)
        chosen = override(chosen, [f"outer.meta_steps={meta_steps}"] if meta_steps else [])
        experiment = build(chosen)
        steps = experiment.learner.outer.meta_steps
        quiet = dataclasses.replace(experiment.tracking, uri="none")
        experiment = dataclasses.replace(
            experiment,
            tracking=quiet,
            evaluate=dataclasses.replace(experiment.evaluate, tasks=min(experiment.evaluate.tasks, 32)),
        )
        in_process = sum(g.max for g in experiment.workers) == 0
        killer = Killer(kill, steps) if kill and not in_process else None
        if killer is not None and kill > steps:
            raise ConfigError(f"--kill {kill}: more than the {steps} meta-steps there are; raise --meta-steps")
        display.note(f"workers {count}: {steps} meta-steps" + (f", {kill} kills" if killer else ""))
        with tempfile.TemporaryDirectory(prefix="metadist-verify-") as folder:
            result = train(experiment, Request(run_dir=folder, test=False, plots=False), display)
        rows.append(
            {
                "workers": count,
                "params_sha256": result.params_sha256,
                "seconds": round(result.wall_seconds, 2),
                "killed": killer.killed if killer else [],
                "retried": sum(result.retried.values()),
                "enough_kills": killer is None or result.retried.get("lost", 0) >= kill,
            }
        )
    same = len({row["params_sha256"] for row in rows}) == 1
    return {"ok": same and all(row["enough_kills"] for row in rows), "same": same, "rows": rows}
