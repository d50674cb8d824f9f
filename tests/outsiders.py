"""Runs with remote workers, and workers in threads that can be made to misbehave."""

from __future__ import annotations

import copy
import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import tiny
from faults import everywhere
from ports import free_port

from metadist.config.build import build
from metadist.config.document import override
from metadist.config.experiment import Experiment
from metadist.core.errors import MetadistError
from metadist.core.round import MetaStepKey, run_rounds
from metadist.experiment import remote
from metadist.experiment.fleet import start_workers
from metadist.experiment.remote import WorkerOptions
from metadist.workers.remote.client import Shell

OUTSIDE = {"min": 1, "max": 4, "outside": True}
HERE = {"role": "learner", "min": 0, "max": 0}
TRIALS = {
    "name": "tiny-trials",
    "seed": 5,
    "environment": {"name": "bandit", "arms": 3, "episodes": 4},
    "model": {"name": "gru", "hidden": 8},
    "algorithm": {"name": "rl2", "epochs": 2, "minibatches": 2},
    "outer": {"lr": 0.01, "meta_batch_size": 16, "shard_size": 2, "meta_steps": 4},
    "evaluate": {"every": 100, "tasks": 4, "test_tasks": 4},
    "tracking": {"uri": "none"},
}


def document(*groups: dict[str, Any], trials: bool = False, port: int = 0, **keys: Any) -> dict[str, Any]:
    plain = copy.deepcopy(TRIALS) if trials else tiny.document("outer.meta_steps=4")
    listen = (
        {"outside": {"listen": f"127.0.0.1:{port or free_port()}", **keys}}
        if any(g.get("outside") for g in groups)
        else {}
    )
    return {**plain, "workers": [dict(g) for g in groups], **listen}


def experiment(made: dict[str, Any], *overrides: str) -> Experiment:
    return build(override(made, overrides))


def rounds(run: Experiment, scheduler: Any, each: Callable[[int, Any], None] = lambda step, scheduler: None) -> str:
    """Run all meta-steps without tracking, checkpoints and evaluations; return the hash of the parameters."""
    learner = run.learner
    state = learner.initial(run.seed)
    for step in range(learner.outer.meta_steps):
        each(step, scheduler)
        state, _ = run_rounds(learner.meta_step(MetaStepKey("run", step, run.seed), state), scheduler.sum)
    return state.sha256()


def train(
    run: Experiment,
    *,
    fault: Callable[[Any, Any], object] | None = None,
    each: Callable[[int, Any], None] = lambda step, scheduler: None,
    **options: Any,
) -> tuple[str, Any]:
    """Train with workers of ``start_workers``; ``fault(executor, shard)`` runs after every submission."""
    with start_workers(run, "run", wrap=everywhere(fault) if fault else None, **options) as scheduler:
        return rounds(run, scheduler, each), scheduler


class Hand:
    """``remote.work`` in a thread, as soon as the driver listens."""

    def __init__(self, run: Experiment, *, role: str = "learner", name: str = "hand", **options: Any) -> None:
        self.said: list[str] = []
        self.ended: str | None = None
        self.error: MetadistError | None = None
        self._stop = threading.Event()
        self._address = run.outside.listen
        self._options = WorkerOptions(role=role, name=name, **{"patience": 60.0, **options})
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()

    def _run(self) -> None:
        if self._options.patience > 5:
            listening(self._address)
        try:
            self.ended = remote.work(self._address, self._options, Shell(self.said.append, self._stop.is_set))
        except MetadistError as error:
            self.error = error

    def stop(self) -> None:
        self._stop.set()

    def join(self, timeout: float = 120.0) -> None:
        self._thread.join(timeout)
        assert not self._thread.is_alive(), self.said


@contextmanager
def hands(run: Experiment, *roles: str) -> Iterator[list[Hand]]:
    working = [Hand(run, role=role, name=f"{role}-{i}") for i, role in enumerate(roles)]
    try:
        yield working
    finally:
        for hand in working:
            hand.stop()
            hand.join()


def listening(address: str) -> None:
    host, _, port = address.rpartition(":")

    def open() -> bool:
        with socket.socket() as tried:
            return tried.connect_ex((host, int(port))) == 0

    wait_for(open)


def wait_for(what: Callable[[], Any], scheduler: Any = None, seconds: float = 120.0) -> None:
    """``scheduler``: of a driver that waits in the meantime, between rounds."""
    end = time.monotonic() + seconds
    while not what():
        assert time.monotonic() < end, "it did not come to be"
        if scheduler is not None:
            scheduler.idle()
        time.sleep(0.02)
