"""Measure the peak memory of one shard's meta-gradient over the number of inner steps: unrolled against mixed.

Each measurement has its own process. The process first computes a gradient of one step, which loads libraries and
kernels; the resident memory after that is its baseline. glibc returns freed blocks immediately, so that the peak counts
live tensors and not memory that the allocator keeps. Times are measured afterwards in one process, in turn, with the
allocator settings of a worker.
"""

from __future__ import annotations

import gc
import json
import os
import subprocess
import sys
from dataclasses import dataclass, replace
from typing import Any

import torch

from metadist.benchmarks.inner_loop import DisagreementError, document_of
from metadist.benchmarks.timing import compare, interleaved
from metadist.config.build import build
from metadist.config.schema import Document
from metadist.core.algorithm import with_inner_steps
from metadist.core.engine import Engine, Hessian
from metadist.core.errors import ConfigError, MetadistError, one_of
from metadist.core.random import TaskKey
from metadist.core.state import Contribution
from metadist.engine.memory import footprint
from metadist.learners import supervised
from metadist.learners.few_shot import FewShotLearner
from metadist.workers.worker import keep_freed_memory, resolve_device

MODELS = ("conv4", "transformer")
STEPS = (1, 5, 20, 50)
WAYS = UNROLLED, MIXED = ("unrolled", "mixed")
BLOCK = 2
MIB = 2**20
#: A small rate: fifty steps neither diverge nor magnify rounding errors.
INNER_LR = 0.01
#: The largest relative error of mixed against unrolled, both in float64.
TOLERANCE = 1e-8
#: The targets: the peak of mixed over (its peak at one step + the stored states), and the time of mixed over unrolled.
PEAK_TARGET, TIME_TARGET = 1.5, 1.3


class MeasurementError(MetadistError):
    """A process that measures its memory failed."""


@dataclass(frozen=True)
class MemoryOptions:
    """The options of ``bench memory``.

    ``inner_steps`` defaults to ``STEPS``; ``tasks`` is the number of tasks per shard (default: the shipped config).
    With ``compiled`` mixed is compiled, and unrolled is not: the graph of many unrolled steps takes minutes.
    """

    model: str = "conv4"
    inner_steps: list[int] | None = None
    tasks: int | None = None
    device: str = "cpu"
    compiled: bool = False
    threads: int = 1
    rounds: int = 3


def run(**given: Any) -> dict[str, Any]:
    """Measure one table: a row per number of inner steps and way of differentiating.

    The arguments are the fields of ``MemoryOptions``.
    """
    options = MemoryOptions(**given)
    model, device, compiled, threads = options.model, options.device, options.compiled, options.threads
    one_of("--model", model, MODELS)
    steps = sorted(options.inner_steps or STEPS)
    if steps[0] < 1:
        raise ConfigError(f"--inner-steps {steps}: each must be at least 1")
    if resolve_device(device, 1.0).type == "cpu" and not os.access("/proc/self/clear_refs", os.W_OK):
        raise ConfigError(
            "bench memory: only Linux can tell a process's peak memory (/proc/self/clear_refs); use --device cuda "
            "elsewhere"
        )
    torch.set_num_threads(threads)
    measured: dict[tuple[int, str], dict[str, float]] = {}
    seconds: dict[int, dict[str, list[float]]] = {}
    for k in steps:
        document = document_of(model, "omniglot", k, options.tasks, INNER_LR, {})
        agree(document, device)
        for way in WAYS:
            _say(f"{k} inner steps, {way}: memory")
            measured[k, way] = _in_a_process(document, _engine(way, compiled), device, threads)
        _say(f"{k} inner steps: time")
        seconds[k] = _times(document, compiled, device, options.rounds)
    settings = {
        "model": model,
        "tasks": document["outer"]["shard_size"],
        "inner_lr": INNER_LR,
        "threads": threads,
        "device": device,
        "compiled": "mixed alone" if compiled else "no",
    }
    return {"settings": settings, "cases": {model: _case(steps, measured, seconds)}}


def _case(
    steps: list[int], measured: dict[tuple[int, str], dict[str, float]], seconds: dict[int, dict[str, list[float]]]
) -> dict[str, Any]:
    rows = {}
    for (k, way), found in measured.items():
        timed = compare(seconds[k], UNROLLED, block=BLOCK)[way]
        rows[f"{k} inner step{'s' * (k != 1)}, {way}"] = {
            "peak": found["peak"] / MIB,
            "predicted": found["predicted"] / MIB,
            "stored_states": found["stored"] / MIB,
            "seconds": timed["median"],
            "of_unrolled": timed["ratio"],
            "of_unrolled_ci95": timed["ratio_ci95"],
        }
    first, last = (measured[k, MIXED] for k in (steps[0], steps[-1]))
    allowed = PEAK_TARGET * first["peak"] + last["stored"]
    slower = max(compare(s, UNROLLED, block=BLOCK)[MIXED]["ratio"] for s in seconds.values())
    return {
        "unit": "MiB",
        "contestants": rows,
        "target_peak": {"mixed": last["peak"] / MIB, "allowed": allowed / MIB, "met": last["peak"] <= allowed},
        "target_time": {"mixed_over_unrolled": slower, "allowed": TIME_TARGET, "met": slower <= TIME_TARGET},
        "same_gradient": f"to {TOLERANCE:g} in float64",
    }


def _say(message: str) -> None:
    print(f"bench memory: {message} …", file=sys.stderr, flush=True)


# The measured shard ---------------------------------------------------------------------------------------------------


def _engine(way: str, compiled: bool) -> Engine:
    hessian: Hessian = "forward" if compiled else "reverse"
    return Engine(compile=compiled and way == MIXED, differentiation=way, hessian=hessian)  # type: ignore[arg-type]


def learner_of(document: Document, device: torch.device, dtype: str = "float32") -> FewShotLearner:
    """Return the prepared learner of a document."""
    learner = supervised(build({**document, "engine": {"dtype": dtype}}).learner)
    learner.prepare(device)
    return learner


class FirstShard:
    """The first shard of a run; its contribution can be computed repeatedly."""

    def __init__(self, learner: FewShotLearner) -> None:
        self.learner = learner
        self.keys = TaskKey.of(0, "train", 0, range(learner.outer.shard_size))
        self.theta = {
            n: p.map(lambda t: t.to(learner.device)) for n, p in learner.initial(0).theta(learner.slots).items()
        }
        self.tasks = learner.sample(self.keys)

    def contribute(self) -> Contribution:
        """Compute the contribution."""
        return self.learner.contribute_tasks(self.theta, self.tasks, self.keys, 0)


def agree(document: Document, device: str) -> None:
    """Compute one task in float64 in both ways. Raises DisagreementError where the gradients differ."""
    learner = learner_of(
        {**document, "outer": {**document["outer"], "meta_batch_size": 1, "shard_size": 1}},
        resolve_device(device, 1.0),
        "float64",
    )
    vectors = {}
    for way in WAYS:
        learner.set_engine(_engine(way, False))
        vectors[way] = FirstShard(learner).contribute().slots["model"]
    off = float((vectors[MIXED] - vectors[UNROLLED]).norm() / vectors[UNROLLED].norm())
    if not off <= TOLERANCE:
        raise DisagreementError(
            f"bench memory: mixed differs from unrolled by {off:.1e} in float64; more than {TOLERANCE:g}"
        )


def _times(document: Document, compiled: bool, device: str, rounds: int) -> dict[str, list[float]]:
    keep_freed_memory()
    contestants = {}
    for way in WAYS:
        learner = learner_of(document, resolve_device(device, 1.0))
        learner.set_engine(_engine(way, compiled))
        contestants[way] = FirstShard(learner).contribute
    # A contribution is on the CPU, so its computation has ended when the call returns.
    return interleaved(contestants, rounds=rounds, block=BLOCK)


def _in_a_process(document: Document, engine: Engine, device: str, threads: int) -> dict[str, float]:
    given = json.dumps({"document": document, "engine": engine.__dict__, "device": device, "threads": threads})
    # Large blocks come from the kernel and return to it; small blocks come from a single arena.
    calm = {"MALLOC_ARENA_MAX": "1", "MALLOC_MMAP_THRESHOLD_": str(64 << 10), "MALLOC_TRIM_THRESHOLD_": str(128 << 10)}
    done = subprocess.run(
        [sys.executable, "-m", "metadist.benchmarks.memory"],
        input=given,
        capture_output=True,
        text=True,
        env={**os.environ, **calm, "OMP_NUM_THREADS": str(threads)},
    )
    if done.returncode != 0:
        last = (done.stderr.strip().splitlines() or ["no message"])[-1]
        raise MeasurementError(
            f"bench memory: the process that measured {engine.differentiation} ended with {done.returncode}: {last}"
        )
    found: dict[str, float] = json.loads(done.stdout.splitlines()[-1])
    return found


def measure(document: Document, engine: dict[str, Any], device: str, threads: int) -> dict[str, float]:
    """Return the peak beyond the baseline, the predicted peak, and the stored states, in bytes. Use a new process."""
    torch.set_num_threads(threads)
    where = resolve_device(device, 1.0)
    learner = learner_of(document, where)
    learner.set_engine(Engine(**engine))
    shard = FirstShard(learner)
    plan = footprint(learner, learner.engine)
    _warm_up(learner, shard)
    before = _rewind(where)
    shard.contribute()
    peak = _peak(where) - before
    tasks = learner.outer.shard_size
    return {
        "peak": float(peak),
        "predicted": float(plan.peak(tasks)),
        "stored": float(tasks * plan.state * plan.inner_steps),
    }


def _warm_up(learner: FewShotLearner, shard: FirstShard) -> None:
    """Compute a gradient of one step; of all steps where it is compiled, because all its graphs must be loaded."""
    algorithm = learner.algorithm
    if not learner.engine.compile:
        learner.algorithm = with_inner_steps(algorithm, 1)
        learner.set_engine(learner.engine)
    shard.contribute()
    if learner.algorithm is not algorithm:
        learner.algorithm = algorithm
        learner.set_engine(replace(learner.engine))
        learner.meta_gradient  # noqa: B018  computed once, and not a part of a shard


def _rewind(device: torch.device) -> int:
    """Reset the peak, and return the bytes in use."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(device)
        return torch.cuda.memory_allocated(device)
    import ctypes

    ctypes.CDLL(None).malloc_trim(0)
    with open("/proc/self/clear_refs", "w") as file:
        file.write("5")
    return _status("VmRSS")


def _peak(device: torch.device) -> int:
    return torch.cuda.max_memory_allocated(device) if device.type == "cuda" else _status("VmHWM")


def _status(name: str) -> int:
    with open("/proc/self/status") as lines:
        return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(f"{name}:"))


if __name__ == "__main__":
    print(json.dumps(measure(**json.load(sys.stdin))))
