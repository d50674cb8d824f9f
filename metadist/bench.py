"""Benchmarks of the engine: ratios, measured side by side in one process, blocks of one contestant in turn with the other's."""

from __future__ import annotations

import platform
import random
import socket
import statistics
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import psutil
import torch

from metadist import config as configuration
from metadist.core.errors import ConfigError
from metadist.core.learner import Learner
from metadist.core.state import State
from metadist.experiment import Experiment, fleet
from metadist.runtime.scheduler import Scheduler
from metadist.runtime.worker import numerics_fingerprint
from metadist.schema import Document
from metadist.tracking import MLflowTracker, NullTracker

BENCHMARKS = {
    "executors": "one Ray actor against this process: tasks per second",
    "tracking": "seconds per meta-step with a dead and with a frozen MLflow server against none",
    "memory": "resident memory of the driver over meta-steps, through one Ray actor",
}


class _Steps:
    """Meta-steps of one experiment on one fleet, going on from call to call."""

    def __init__(self, learner: Learner, seed: int, scheduler: Scheduler, tracker: Any = None) -> None:
        self._learner, self._seed, self._scheduler, self._tracker = learner, seed, scheduler, tracker
        self.state: State = learner.initial(seed)
        self.meta_step = 0

    def run(self, count: int) -> list[float]:
        """Seconds of each of ``count`` further meta-steps."""
        seconds = []
        for _ in range(count):
            began, report = time.perf_counter(), dict[str, float]()
            for round in self._learner.rounds("bench", self.meta_step, self._seed, self.state, report):
                self.state = round.apply(self.state, self._scheduler.run(round))
            self.meta_step += 1
            if self._tracker is not None:
                self._tracker.metrics(self.meta_step, {f"meta/{k}": v for k, v in report.items()})
            seconds.append(time.perf_counter() - began)
        return seconds


def bench(what: str, document: Document, *, steps: int) -> dict[str, Any]:
    """``steps`` measured meta-steps per contestant. The result has medians, spreads, ratios, the machine and versions."""
    if what not in BENCHMARKS:
        raise ConfigError(f"bench: '{what}' is not one of {', '.join(BENCHMARKS)}")
    measured = {"executors": _executors, "tracking": _tracking, "memory": _memory}[what](document, steps)
    fingerprint = numerics_fingerprint(torch.device("cpu"), 1, torch.float32)
    machine = {"processor": fingerprint["device"], "cores": psutil.cpu_count(), "python": platform.python_version(), "torch": torch.__version__}
    return {"benchmark": what, "config": document.get("name"), "meta_steps": steps, **measured, "machine": machine}


def _experiment(document: Document, workers: str) -> Experiment:
    return Experiment.of(configuration.build(configuration.set_workers(document, workers)))


def _interleaved(contestants: dict[str, _Steps], steps: int, block: int) -> dict[str, list[float]]:
    """Blocks of ``block`` meta-steps, in random order within each turn, after one block of warm-up."""
    order, measured = random.Random(0), {name: list[float]() for name in contestants}
    for contestant in contestants.values():
        contestant.run(block)
    while len(next(iter(measured.values()))) < steps:
        names = list(contestants)
        order.shuffle(names)
        for name in names:
            measured[name] += contestants[name].run(block)
    return measured


def _executors(document: Document, steps: int) -> dict[str, Any]:
    here, there = _experiment(document, "0"), _experiment(document, "1")
    with fleet(here, "bench") as local, fleet(there, "bench") as actors:
        contestants = {"in-process": _Steps(here.learner, here.seed, local), "ray, 1 actor": _Steps(there.learner, there.seed, actors)}
        measured = _interleaved(contestants, steps, block=5)
        same = len({c.state.sha256() for c in contestants.values()}) == 1
    tasks = here.learner.outer.meta_batch_size
    rates = {name: [tasks / s for s in seconds] for name, seconds in measured.items()}
    return {"unit": "tasks/s", "same_parameters": same, **_compare(rates, "in-process")}


def _tracking(document: Document, steps: int) -> dict[str, Any]:
    experiment = _experiment(document, "1")
    with tempfile.TemporaryDirectory() as folder, fleet(experiment, "bench") as actors, _frozen_server() as frozen:
        trackers: dict[str, Any] = {"no tracker": NullTracker()}
        for name, uri in (("dead server", f"http://127.0.0.1:{_free_port()}"), ("frozen server", frozen)):
            tracker = MLflowTracker(Path(folder) / name.split()[0], tracking_uri=uri, experiment="bench", runs_root=folder)
            tracker.start(run_id=f"bench-{name.split()[0]}", name=name, params={}, tags={})
            trackers[name] = tracker
        time.sleep(10)  # MLflow's import in the background happens once a run and would be charged to the first blocks
        contestants = {name: _Steps(experiment.learner, experiment.seed, actors, tracker) for name, tracker in trackers.items()}
        measured = _interleaved(contestants, steps, block=5)
        for tracker in trackers.values():
            tracker.finish("FINISHED", timeout=0.1)
    return {"unit": "s/meta-step", **_compare(measured, "no tracker")}


def _memory(document: Document, steps: int) -> dict[str, Any]:
    experiment = _experiment(document, "1")
    process, resident = psutil.Process(), list[float]()
    with fleet(experiment, "bench") as actors:
        running = _Steps(experiment.learner, experiment.seed, actors)
        running.run(min(100, steps))
        for _ in range(10):
            running.run(max(1, steps // 10))
            resident.append(process.memory_info().rss / 2**20)
    return {"unit": "MiB", "contestants": {"driver": {"readings": [round(r, 1) for r in resident], "growth": round(resident[-1] - resident[0], 1)}}}


def _compare(measured: dict[str, list[float]], base: str) -> dict[str, Any]:
    contestants = {}
    for name, values in measured.items():
        low, high = _ratio_interval(values, measured[base])
        contestants[name] = {
            "median": round(statistics.median(values), 6),
            "quartiles": [round(q, 6) for q in statistics.quantiles(values, n=4)[::2]],
            "ratio": round(statistics.median(values) / statistics.median(measured[base]), 4),
            "ratio_ci95": [round(low, 4), round(high, 4)],
            "count": len(values),
        }
    return {"contestants": contestants}


def _ratio_interval(values: list[float], base: list[float], resamples: int = 1000) -> tuple[float, float]:
    """95 % bootstrap interval of the ratio of medians; turns are resampled whole, so that drift cancels."""
    draw, block = random.Random(0), 5
    turns, ratios = range(len(values) // block), []
    for _ in range(resamples):
        chosen = draw.choices(turns, k=len(turns))
        medians = [statistics.median([v for t in chosen for v in series[t * block : (t + 1) * block]]) for series in (values, base)]
        ratios.append(medians[0] / medians[1])
    ratios.sort()
    return ratios[int(0.025 * resamples)], ratios[int(0.975 * resamples)]


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


@contextmanager
def _frozen_server() -> Iterator[str]:
    """A server that accepts connections and never answers."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        listener.listen(64)
        connections: list[socket.socket] = []

        def accept() -> None:
            while True:
                try:
                    connections.append(listener.accept()[0])
                except OSError:
                    return

        threading.Thread(target=accept, daemon=True).start()
        yield f"http://127.0.0.1:{listener.getsockname()[1]}"
        for connection in connections:
            connection.close()

