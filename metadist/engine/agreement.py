"""Compare the gradients of an engine with unrolled gradients in float64."""

from __future__ import annotations

from dataclasses import replace

import torch

from metadist.core.algorithm import with_inner_steps
from metadist.core.engine import Engine
from metadist.core.errors import NonFiniteError, first_line
from metadist.core.random import TaskKey
from metadist.core.state import Contribution
from metadist.engine.subject import Subject, initial_theta


def compiled_disagrees(subject: Subject, seed: int) -> str | None:
    """Compare a compiled shard with the same shard in float64: return the difference as text, or None if they agree.

    Compilers have bugs, and a wrong gradient raises no error. The rounding error of the same shard without compilation
    gives the scale. None too where a contribution is not finite: training reports such tasks itself.
    """
    keys = TaskKey.of(seed, "train", 0, range(subject.outer.shard_size))
    exact = subject.in_float64(subject.algorithm)
    exact.set_engine(replace(subject.engine, compile=False, precision="float32"))
    try:
        found, usual, true = (_contribution(one, seed, keys) for one in (subject, subject.eager(), exact))
    except NonFiniteError:
        return None
    for name, vector in true.slots.items():
        size = vector.double().norm().clamp(min=1e-300)
        off, rounding = (float((c.slots[name].double() - vector).norm() / size) for c in (found, usual))
        if not off <= 10 * rounding + (1e-4 if subject.model.dtype == torch.float32 else 1e-9):
            return f"is off by {off:.0e} in slot {name}, where rounding explains {rounding:.0e}"
    return None


def _contribution(subject: Subject, seed: int, keys: TaskKey) -> Contribution:
    return subject.contribute(initial_theta(subject, seed), keys, 0)


def mixed_disagrees(subject: Subject, engine: Engine, tolerance: float = 1e-8) -> str | None:
    """Compare one task's gradient under ``engine`` with the unrolled one, in float64 over at most two inner steps.

    Return the difference (or the error) as text, or None if the relative difference of every slot is within
    ``tolerance``. An operator may lack a forward derivative or have a wrong one that raises no error (batch norm's
    second order: pytorch#196699).
    """
    steps = min(2, subject.algorithm.inner_steps)
    exact = subject.in_float64(with_inner_steps(subject.algorithm, steps))
    keys = TaskKey.of(0, "train", 0, [0])
    expected = _contribution(exact, 0, keys)
    exact.set_engine(engine)
    try:
        got = _contribution(exact, 0, keys)
    except (RuntimeError, NotImplementedError) as error:
        return f"fails: {first_line(error)}"
    for name, vector in expected.slots.items():
        off = float((got.slots[name] - vector).norm() / vector.norm().clamp(min=1e-300))
        if not off <= tolerance:
            return f"is off by {off:.0e} in slot {name}"
    return None
