"""Compare N Ray actors with N processes that compute the same shards without driver, Ray and transport.

The two contestants compute some meta-steps in turn; the other one waits for a message meanwhile. The overhead of a
meta-step is measured separately: through Ray with shards that compute nothing, and the driver's work for one
contribution.
"""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import statistics
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import psutil
import torch

from metadist.benchmarks.meta_steps import MetaSteps, experiment_with
from metadist.benchmarks.timing import compare, interleaved
from metadist.benchmarks.transport import Echo
from metadist.config.schema import Document
from metadist.core.computation import Gradient
from metadist.core.errors import ConfigError, WorkerError
from metadist.core.round import Finished, MetaStepKey, Shard
from metadist.core.state import Contribution
from metadist.experiment.fleet import start_workers
from metadist.learners import supervised
from metadist.training.scheduler import Scheduler, fault_of
from metadist.wire import ResultHeader, decode_result, result_parts
from metadist.workers.local import LocalExecutor
from metadist.workers.numerics import Numerics
from metadist.workers.settings import RunSettings

#: Meta-steps of a contestant per turn.
TURN = 4


def run(
    document: Document, *, workers: Sequence[int], steps: int, sizes: Sequence[float] = (1, 10, 100)
) -> dict[str, Any]:
    """Measure ``steps`` meta-steps per contestant and number of workers, and the driver's work for ``sizes`` in MB."""
    if not workers or min(workers) < 1:
        raise ConfigError(f"--workers: {list(workers)}; expected numbers of workers, such as 1,2")
    threads, turns = torch.get_num_threads(), max(2, -(-steps // TURN))
    torch.set_num_threads(1)
    try:
        cases = _cases(document, workers, turns, sizes)
    finally:
        torch.set_num_threads(threads)
    return {"settings": {"config": document.get("name"), "meta_steps": turns * TURN, "turn": TURN}, "cases": cases}


def _cases(document: Document, workers: Sequence[int], turns: int, sizes: Sequence[float]) -> dict[str, Any]:
    cases = {}
    for count in workers:
        cases[f"{count} worker{'s' * (count > 1)}"] = _efficiency(document, count, turns)
    for count in workers:
        cases[f"empty meta-steps, {count} worker{'s' * (count > 1)}"] = _empty(document, count, turns)
    for size in sizes:
        cases[f"the driver's time for a contribution of {size:g} MB"] = _driver(size)
    return cases


# Efficiency -----------------------------------------------------------------------------------------------------------


def _efficiency(document: Document, count: int, turns: int) -> dict[str, Any]:
    experiment = experiment_with(document, str(count))
    tasks = TURN * experiment.learner.outer.meta_batch_size
    with start_workers(experiment, "bench") as scheduler:
        actors = MetaSteps(supervised(experiment.learner), experiment.seed, scheduler)
        nice = _niceness(scheduler)
        with _processes(document, count, experiment.workers[0].threads, nice) as alone:
            measured = interleaved({"alone": alone, "actors": lambda: _repeat(actors, TURN)}, rounds=turns, block=1)
        taken = scheduler.measured.read()
        seconds = taken.seconds
    rates = {name: [tasks / s for s in values] for name, values in measured.items()}
    step = sum(measured["actors"]) / len(measured["actors"]) / TURN
    compared = compare(rates, "alone", block=1)
    row = compared["actors"]
    return {
        "unit": "tasks/s",
        "contestants": compared,
        "efficiency": row["ratio"],
        "efficiency_ci95": row["ratio_ci95"],
        "shards_per_meta_step": -(-experiment.learner.outer.meta_batch_size // experiment.learner.outer.shard_size),
        "results_per_meta_step": round(taken.counts["results"] / actors.meta_step, 2),
        "ms_per_meta_step": {
            "all": _ms(step),
            **{name: _ms(seconds[name] / actors.meta_step) for name in ("publish", "gather", "reduce")},
            "compute_per_worker": _ms(seconds["compute"] / actors.meta_step / count),
        },
        "niceness": nice,
    }


def _repeat(step: Callable[[], None], times: int) -> None:
    for _ in range(times):
        step()


def _ms(seconds: float) -> float:
    return round(1e3 * seconds, 3)


def _niceness(scheduler: Scheduler) -> int:
    """Return the niceness of the actors: Ray may lower their priority, and then the processes must have the same."""
    return max(psutil.Process(about["pid"]).nice() for about in scheduler.executor.workers().values())


@contextmanager
def _processes(document: Document, count: int, threads: int, nice: int) -> Iterator[Callable[[], None]]:
    """Start ``count`` processes; yield a function that computes ``TURN`` meta-steps on them and waits for all."""
    context = multiprocessing.get_context("spawn")
    with ExitStack() as stack:
        connections = []
        for index in range(count):
            ours, theirs = context.Pipe()
            process = context.Process(target=_alone, args=(theirs, document, index, count, nice), daemon=True)
            with _environment(OMP_NUM_THREADS=str(threads), MKL_NUM_THREADS=str(threads)):
                process.start()
            theirs.close()  # then the death of a process raises EOFError here
            stack.callback(process.join, 10.0)
            stack.callback(_dismiss, ours)
            connections.append(ours)
        for connection in connections:
            connection.recv()
        turn = iter(range(1 << 30))

        def compute() -> None:
            first = TURN * next(turn)
            for connection in connections:
                connection.send(first)
            for connection in connections:
                connection.recv()

        yield compute


def _dismiss(connection: Any) -> None:
    with contextlib.suppress(OSError):
        connection.send(None)


@contextmanager
def _environment(**variables: str) -> Iterator[None]:
    before = dict(os.environ)
    os.environ.update(variables)
    try:
        yield
    finally:
        os.environ.clear()
        os.environ.update(before)


def _alone(connection: Any, document: Document, index: int, count: int, nice: int) -> None:
    """Compute every ``count``-th shard of the meta-steps in each message, from the initial θ."""
    os.nice(nice - os.nice(0))
    experiment = experiment_with(document, "0")
    learner, state = experiment.learner, experiment.learner.initial(experiment.seed)
    with start_workers(experiment, "bench") as scheduler:
        executor, published = scheduler.executor, -1
        connection.send(None)
        while (first := connection.recv()) is not None:
            keys = (MetaStepKey("bench", m, experiment.seed) for m in range(first, first + TURN))
            for shard in [s for key in keys for s in next(learner.meta_step(key, state)).shards][index::count]:
                if shard.meta_step != published:
                    executor.publish(published := shard.meta_step, 0, state)
                executor.submit(shard, 1)
                (event,) = executor.wait(0.0)
                if not isinstance(event, Finished):
                    raise WorkerError(f"{shard} {event.kind}: {event.message}")
            connection.send(None)


# The overhead of a meta-step ---------------------------------------------------------------------------------------


def _empty(document: Document, count: int, turns: int) -> dict[str, Any]:
    """Time meta-steps with the same numbers of parameters and shards, in which the workers compute nothing."""
    from metadist.workers.ray.executor import RayExecutor

    experiment = experiment_with(document, str(count))
    parameters = sum(s.layout.numel for s in experiment.learner.slots.values() if s.rule == "gradient")
    echo = Echo.of(parameters, outer=experiment.learner.outer)
    echo.copy = True
    ray = f"{count} Ray actor{'s' * (count > 1)}"
    with ExitStack() as stack:
        groups, settings = experiment.workers, RunSettings("bench", device="cpu")
        actors = RayExecutor(echo, groups, settings, Numerics(groups))
        stack.callback(actors.close)
        local = LocalExecutor(echo, settings)
        stack.callback(local.close)
        through_ray = Scheduler(actors, echo)
        contestants = {
            "in this process": MetaSteps(echo, experiment.seed, Scheduler(local, echo)),
            ray: MetaSteps(echo, experiment.seed, through_ray),
        }
        measured = interleaved(dict(contestants), rounds=turns, block=TURN)
        seconds = through_ray.measured.read().seconds
    milliseconds = {name: [1e3 * s for s in values] for name, values in measured.items()}
    middle = {name: statistics.median(values) for name, values in milliseconds.items()}
    steps = contestants[ray].meta_step
    return {
        "unit": "ms/meta-step",
        "contestants": compare(milliseconds, "in this process", block=TURN),
        "overhead_of_ray_ms": round(middle[ray] - middle["in this process"], 3),
        "ms_per_meta_step": {name: _ms(seconds[name] / steps) for name in ("publish", "gather", "reduce")},
        "parameters": parameters,
    }


def _driver(size: float) -> dict[str, Any]:
    """Time decoding, checking and adding a contribution of ``size`` megabytes, by the functions of training."""
    echo, shard = Echo.of(int(size * 250_000)), Shard("bench", 0, 0, 0, Gradient(), 0, 1, seed=0)
    vector = echo.initial(0).slots["model"]
    target, total = torch.zeros_like(vector), Contribution({"model": torch.zeros_like(vector)}, 0.0, 0)
    parts = result_parts(Contribution({"model": vector}, 1.0, 1), echo.slots, ResultHeader(shard, 1, "w"))

    def take() -> None:
        result, _ = decode_result(parts, shard, echo.slots)
        if not isinstance(result, Contribution) or (reason := fault_of(result, shard, echo, True)):
            raise WorkerError(f"the decoded contribution differs from the encoded one: {reason}")
        total.absorb(result)

    contestants = {"memcpy": lambda: target.copy_(vector), "decode, check and add": take}
    measured = interleaved(contestants, rounds=10, block=3)
    milliseconds = {name: [1e3 * s for s in values] for name, values in measured.items()}
    return {"unit": "ms", "contestants": compare(milliseconds, "memcpy", block=3)}
