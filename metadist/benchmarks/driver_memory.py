"""Measure the resident memory of the driver over meta-steps, through one Ray actor."""

from __future__ import annotations

from typing import Any

import psutil

from metadist.benchmarks.meta_steps import MetaSteps, experiment_with, settings_of
from metadist.config.schema import Document
from metadist.experiment.fleet import start_workers
from metadist.learners import supervised


def run(document: Document, *, steps: int) -> dict[str, Any]:
    """Measure after a warm-up, and then ten times during ``steps`` meta-steps."""
    experiment = experiment_with(document, "1")
    process, resident = psutil.Process(), list[float]()
    with start_workers(experiment, "bench") as actors:
        meta_step = MetaSteps(supervised(experiment.learner), experiment.seed, actors)
        for _ in range(min(100, steps)):
            meta_step()
        for _ in range(10):
            for _ in range(max(1, steps // 10)):
                meta_step()
            resident.append(process.memory_info().rss / 2**20)
    driver = {"readings": [round(r, 1) for r in resident], "growth": round(resident[-1] - resident[0], 1)}
    return {
        "settings": settings_of(document, steps),
        "cases": {"resident": {"unit": "MiB", "contestants": {"driver": driver}}},
    }
