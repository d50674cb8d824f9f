"""Compare engines with the unrolled gradient in float64."""

from __future__ import annotations

from dataclasses import replace

import torch

from metadist.core.algorithm import Algorithm, with_inner_steps
from metadist.core.engine import Engine
from metadist.core.errors import NonFiniteError, first_line
from metadist.core.model import Model
from metadist.core.random import TaskKey
from metadist.core.state import Contribution
from metadist.learners.few_shot import Learner


def compiled_disagrees(learner: Learner, seed: int) -> str | None:
    """How a compiled shard differs from the mathematics by more than rounding explains, or None: compilers have bugs, and a
    wrong gradient says nothing. The scale is what the same shard loses uncompiled, both against float64."""
    keys = TaskKey.of(seed, "train", 0, range(learner.outer.shard_size))
    exact = _in_float64(learner, learner.algorithm)
    exact.set_engine(replace(learner.engine, compile=False, precision="float32"))
    eager = Learner(
        learner.algorithm, learner.model, learner.tasks, learner.outer, engine=replace(learner.engine, compile=False)
    )
    eager.prepared_like(learner)
    try:
        found, usual, true = (_contribution(one, seed, keys) for one in (learner, eager, exact))
    except NonFiniteError:
        return None
    for name, vector in true.slots.items():
        size = vector.double().norm().clamp(min=1e-300)
        off, rounding = (float((c.slots[name].double() - vector).norm() / size) for c in (found, usual))
        if not off <= 10 * rounding + (1e-4 if learner.model.dtype == torch.float32 else 1e-9):
            return f"is off by {off:.0e} in slot {name}, where rounding explains {rounding:.0e}"
    return None


def _contribution(learner: Learner, seed: int, keys: TaskKey) -> Contribution:
    theta = {n: p.map(lambda t: t.to(learner.device)) for n, p in learner.initial(seed).theta(learner.slots).items()}
    return learner.contribute(theta, keys, 0)


def _in_float64(learner: Learner, algorithm: Algorithm) -> Learner:
    model = Model(learner.model.factory, dtype=torch.float64, freeze=learner.model.freeze)
    subject = Learner(algorithm, model, learner.tasks, learner.outer)
    subject.prepared_like(learner)
    return subject


def mixed_disagrees(learner: Learner, engine: Engine, tolerance: float = 1e-8) -> str | None:
    """How the gradient of one task under ``engine`` differs in float64 from the unrolled one, or None: an operator's forward
    derivative may be missing, or wrong without a word (batch norm's second order: pytorch#196699)."""
    steps = min(2, learner.algorithm.inner_steps)
    subject = _in_float64(learner, with_inner_steps(learner.algorithm, steps))
    keys = TaskKey.of(0, "train", 0, [0])
    expected = _contribution(subject, 0, keys)
    subject.set_engine(engine)
    try:
        got = _contribution(subject, 0, keys)
    except (RuntimeError, NotImplementedError) as error:
        return f"fails: {first_line(error)}"
    for name, vector in expected.slots.items():
        off = float((got.slots[name] - vector).norm() / vector.norm().clamp(min=1e-300))
        if not off <= tolerance:
            return f"is off by {off:.0e} in slot {name}"
    return None
