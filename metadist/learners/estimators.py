"""Measure a shard of particles under each estimator of its gradient, for ``metadist plan``."""

from __future__ import annotations

import copy
import statistics
import time
from collections.abc import Callable
from dataclasses import asdict, replace

import torch

from metadist.core.engine import Differentiation
from metadist.core.round import MetaStepKey, WithOutput
from metadist.engine.comparison import REPEATS, Estimator
from metadist.engine.estimators import ESTIMATORS
from metadist.engine.memory import peak_while
from metadist.learners.base import Learner

KINDS: tuple[Differentiation, ...] = ("truncated", "es", "pes")


def measured_estimators(learner: Learner, usable_bytes: int) -> dict[str, object]:
    """Advance the first shard of particles at θ_0 by a window, under each estimator.

    Returns the peak of its tensors in bytes, and the seconds of one particle.
    """
    learner.prepare(torch.device("cpu"))
    peaks, found = {}, []
    for kind in KINDS:
        advance, shard_size = _second_window(learner, kind)
        peaks[kind] = peak_while(advance, learner.initial(0).slots)
        measured = []
        for _ in range(REPEATS):
            began = time.perf_counter()
            advance()
            measured.append(time.perf_counter() - began)
        found.append(asdict(Estimator(kind, statistics.median(measured) / shard_size, ESTIMATORS[kind])))
    return {
        "shard_size": shard_size,
        "tasks_at_once": shard_size,
        "predicted_peak_bytes": peaks,
        "estimators": found,
        "usable_bytes": usable_bytes,
    }


def _second_window(learner: Learner, kind: Differentiation) -> tuple[Callable[[], object], int]:
    """Return a function that advances the first shard by its second window, and the number of its particles."""
    other, state = copy.copy(learner), learner.initial(0)
    other.set_engine(replace(learner.engine, differentiation=kind))
    first, second = (next(other.meta_step(MetaStepKey("plan", n, 0), state)).shards[0] for n in (0, 1))
    started = other.compute(first, state.slots)
    assert isinstance(started, WithOutput)
    return lambda: other.compute(second, state.slots, [started.output]), first.count
