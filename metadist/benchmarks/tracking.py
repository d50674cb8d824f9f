"""Measure the seconds per meta-step with a dead and with a frozen MLflow server, against no tracker."""

from __future__ import annotations

import socket
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from metadist.benchmarks.meta_steps import MetaSteps, experiment_with, settings_of
from metadist.benchmarks.timing import compare, interleaved
from metadist.config.schema import Document
from metadist.experiment.fleet import start_workers
from metadist.learners import supervised
from metadist.tracking import MLflowTracker, NullTracker

BLOCK = 5


def run(document: Document, *, steps: int) -> dict[str, Any]:
    """Measure ``steps`` meta-steps per contestant."""
    experiment = experiment_with(document, "1")
    with (
        tempfile.TemporaryDirectory() as folder,
        start_workers(experiment, "bench") as actors,
        _frozen_server() as frozen,
    ):
        trackers: dict[str, Any] = {"no tracker": NullTracker()}
        for name, uri in (("dead server", f"http://127.0.0.1:{_free_port()}"), ("frozen server", frozen)):
            tracker = MLflowTracker(
                Path(folder) / name.split()[0], tracking_uri=uri, experiment="bench", runs_root=folder
            )
            tracker.start(run_id=f"bench-{name.split()[0]}", name=name, params={}, tags={})
            trackers[name] = tracker
        time.sleep(10)  # a run imports MLflow once, in the background; the first blocks must not contain it
        contestants = {
            name: MetaSteps(supervised(experiment.learner), experiment.seed, actors, tracker)
            for name, tracker in trackers.items()
        }
        measured = interleaved(dict(contestants), rounds=-(-steps // BLOCK), block=BLOCK)
        for tracker in trackers.values():
            tracker.finish("FINISHED", timeout=0.1)
    case = {"unit": "s/meta-step", "contestants": compare(measured, "no tracker", block=BLOCK)}
    return {"settings": settings_of(document, steps), "cases": {"waiting for MLflow": case}}


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


@contextmanager
def _frozen_server() -> Iterator[str]:
    """Yield the address of a server that accepts connections and never answers."""
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
