"""Verify that training gives the same parameters for any number of workers, and when workers are killed."""

from __future__ import annotations

import dataclasses
import tempfile
from collections.abc import Sequence
from functools import partial
from typing import Any

from metadist.config.build import build
from metadist.config.document import override, set_workers
from metadist.config.experiment import Experiment
from metadist.config.schema import Document
from metadist.core.errors import ConfigError
from metadist.core.round import Executor, Shard
from metadist.experiment.fleet import local_plan
from metadist.experiment.request import RunRequest
from metadist.experiment.train import train
from metadist.training.observers import Observer
from metadist.workers.faulty import FaultyExecutor


def counts(text: str) -> list[str]:
    """Split ``--workers 0,2,learners=1/environments=2`` into values that ``--workers`` of ``train`` takes."""
    found = [part.strip().replace("/", ",") for part in text.split(",")]
    if not all(part.isdecimal() or "=" in part for part in found) or len(set(found)) < len(found):
        raise ConfigError(
            f"--workers {text}: expected different numbers of workers, such as 0,1,2 or 0,2,learners=1/environments=2"
        )
    return found


def due_meta_steps(kills: int, meta_steps: int) -> list[int]:
    """Spread ``kills`` kills over a run: return the meta-step of each."""
    return [(2 * i + 1) * meta_steps // (2 * kills) for i in range(kills)]


class Killer(FaultyExecutor):
    """Kill ``kills`` workers that have a shard in flight, at meta-steps that are spread over the run.

    Kills alternate between first rounds (rollouts) and later rounds (gradients of the rollouts) where the run has both.
    ``killed`` receives the victims' names.
    """

    def __init__(self, executor: Executor, *, kills: int, meta_steps: int, killed: list[str]) -> None:
        super().__init__(executor)
        self._due = due_meta_steps(kills, meta_steps)
        self._killed = killed
        self._later_rounds = False

    def submit(self, shard: Shard, attempt: int) -> None:
        super().submit(shard, attempt)
        later = shard.round > 0
        self._later_rounds |= later and shard.split == "train"
        turn = shard.split == "train" and (len(self._killed) % 2 == later or not self._later_rounds)
        if not (turn and self._due and shard.meta_step >= self._due[0]):
            return
        # Until the executor has noticed the last death, it may choose the same victim again.
        if self._killed and self._killed[-1] in self.workers():
            return
        victim = self.kill_busy()
        if victim is not None:
            self._due.pop(0)
            self._killed.append(victim)


def _as_the_whole_run(document: Document) -> Document:
    """Resolve ``engine.compile`` for the full length of the run: a shorter run might not compile under ``auto``."""
    experiment = build(document)
    if experiment.engine.compile != "auto":
        return document
    compile = "always" if local_plan(experiment).engine.compile else "never"
    return override(document, [f"engine.compile={compile}"])


def verify(
    document: Document, workers: Sequence[str], *, kill: int, meta_steps: int | None, display: Observer
) -> dict[str, Any]:
    """Train once for every number of workers and compare the SHA-256 of the parameters and of their averages.

    ``ok`` is False where the hashes differ, or where a run lost fewer than ``kill`` shards. ConfigError where there is
    nothing to compare, or nobody to kill.
    """
    if meta_steps:
        document = override(_as_the_whole_run(document), [f"outer.meta_steps={meta_steps}"])
    documents = [set_workers(document, count) for count in workers]
    _check_comparison(documents, workers, kill)
    rows = [_row(each, count, kill, display) for each, count in zip(documents, workers)]
    same = len({(row["params_sha256"], row["averaged_sha256"]) for row in rows}) == 1
    return {"ok": same and all(row["enough_kills"] for row in rows), "same": same, "rows": rows}


def _check_comparison(documents: Sequence[Document], workers: Sequence[str], kill: int) -> None:
    """Raise ConfigError where the runs could only pass: one run, equal runs, or kills without a worker to kill."""
    asked = f"--workers {','.join(text.replace(',', '/') for text in workers)}"
    experiments = [build(document) for document in documents]
    if kill and all(experiment.in_process for experiment in experiments):
        raise ConfigError(
            f"--kill {kill}: {asked} has no workers, so nobody would be killed; add a number above 0, or leave --kill"
        )
    if len(experiments) < 2:
        raise ConfigError(
            f"{asked}: a single run is compared with nothing; give two or more numbers of workers, such as 0,1,2"
        )
    for i, experiment in enumerate(experiments):
        if any(_alike(experiment, other) for other in experiments[:i]):
            raise ConfigError(f"{asked}: two runs have the same workers; give different numbers, such as 0,1,2")
    steps = experiments[0].learner.outer.meta_steps
    if kill > steps:
        raise ConfigError(f"--kill {kill}: the run has only {steps} meta-steps; raise --meta-steps")


def _alike(first: Experiment, second: Experiment) -> bool:
    return first.workers == second.workers or (first.in_process and second.in_process)


def _row(document: Document, count: str, kill: int, display: Observer) -> dict[str, Any]:
    """Train with the workers of ``document`` in a temporary folder, without tracking and without the test."""
    experiment = build(document)
    steps = experiment.learner.outer.meta_steps
    experiment = dataclasses.replace(
        experiment,
        tracking=dataclasses.replace(experiment.tracking, uri="none"),
        evaluate=dataclasses.replace(experiment.evaluate, tasks=min(experiment.evaluate.tasks, 32)),
    )
    kill = 0 if experiment.in_process else kill  # without workers no process can be killed
    display.note(f"workers {count}: {steps} meta-steps" + (f", {kill} kills" if kill else ""))
    killed: list[str] = []
    wrap = partial(Killer, kills=kill, meta_steps=steps, killed=killed) if kill else None
    with tempfile.TemporaryDirectory(prefix="metadist-verify-") as folder:
        result = train(experiment, RunRequest(run_dir=folder, wrap=wrap, test=False, plots=False), display)
    return {
        "workers": count,
        "params_sha256": result.params_sha256,
        "averaged_sha256": result.averaged_sha256,
        "seconds": round(result.wall_seconds, 2),
        "killed": killed,
        "retried": sum(result.retried.values()),
        "enough_kills": result.retried.get("lost", 0) >= kill,
    }
