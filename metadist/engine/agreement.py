"""Compare the gradients of an engine with unrolled gradients in float64, at a θ in general position.

At θ_0 a difference can hide: heads and biases may be zero there, and an inner gradient that is clipped elsewhere may be
too short.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import replace

import torch
from torch import Tensor

from metadist.core.algorithm import Theta, with_inner_steps
from metadist.core.engine import Engine
from metadist.core.errors import NonFiniteError, first_line
from metadist.core.parameters import Parameters
from metadist.core.random import TaskKey
from metadist.core.state import Contribution
from metadist.engine.memory import float64_within
from metadist.engine.subject import Subject, initial_theta

#: distances from θ_0 in units of each tensor's root mean square
DISTANCES = (2.0, 0.5, 0.0)
#: relative change of a float64 gradient by the rounding of θ, above which nothing is compared at this θ
MAX_BLUR = 1e-6
#: relative rounding error without compilation, above which a compiled shard is compared nearer to θ_0
MAX_ROUNDING = 1e-3


def perturbed_theta(subject: Subject, seed: int, distance: float) -> Theta:
    """Return θ_0 with normal noise on every learned tensor, of ``distance`` times the tensor's root mean square.

    That of a tensor of zeros counts as 0.05. Slots keep to their bounds.
    """
    generator, theta = torch.Generator().manual_seed(0), initial_theta(subject, seed)

    def moved(t: Tensor) -> Tensor:
        size = t.double().square().mean().sqrt().clamp(min=0.05)
        noise = torch.randn(t.shape, generator=generator, dtype=torch.float64).to(t.device)
        return (t.double() + distance * size * noise).to(t.dtype)

    def bounded(name: str) -> Parameters:
        low, high = subject.slots[name].bounds
        values = theta[name].map(moved)
        return values if low is None and high is None else values.map(lambda t: t.clamp(low, high))

    learned = [name for name in theta if subject.slots[name].rule == "gradient"]
    return {**theta, **{name: bounded(name) for name in learned}} if distance else theta


def compiled_disagrees(subject: Subject, seed: int, memory_bytes: int | None = None) -> str | None:
    """Compare a compiled shard with the unrolled shard in float64: return the difference as text, or None.

    An implicit shard is compared with the implicit one that is not compiled.

    Compilers have bugs, and a wrong gradient raises no error. The rounding error of the unrolled shard without
    compilation gives the scale; θ is as far from θ_0 as this error allows. None too where no gradient is finite:
    training reports such tasks itself. Mixed differentiation is compared over as many inner steps as unrolled ones fit
    into ``memory_bytes``; its graphs are the same for any number.
    """
    steps, chunk = float64_within(subject, memory_bytes)
    if subject.engine.differentiation == "mixed":
        subject = subject.with_algorithm(with_inner_steps(subject.algorithm, steps))
    exact, eager = subject.in_float64(subject.algorithm), subject.eager()
    # Unrolled too: an eager shard in mixed mode would be wrong in the same way, and its error would pass for rounding.
    reference = Engine(chunk=chunk)
    if subject.engine.differentiation == "implicit":
        reference = replace(reference, differentiation="implicit", hessian=subject.engine.hessian)
    exact.set_engine(reference)
    eager.set_engine(replace(reference, precision=subject.engine.precision))
    for keys in subject.keys_of_graphs(seed):
        for distance in DISTANCES:
            theta = perturbed_theta(subject, seed, distance)
            true, usual = _finite(exact, _as_in(exact, theta, seed), keys), _finite(eager, theta, keys)
            if true is None or usual is None:
                continue
            rounding = _differences(usual, true)
            if max(rounding.values()) <= MAX_ROUNDING or not distance:
                if found := _beyond_rounding(_finite(subject, theta, keys), true, rounding):
                    return found
                break
    return None


def _beyond_rounding(found: Contribution | None, true: Contribution, rounding: Mapping[str, float]) -> str | None:
    if found is None:
        return "gives NaN or Inf where it is finite without compilation"
    single = any(vector.dtype == torch.float32 for vector in found.slots.values())
    for name, off in _differences(found, true).items():
        if not off <= 10 * rounding[name] + (1e-4 if single else 1e-9):
            return f"is off by {off:.0e} in slot {name}, where rounding explains {rounding[name]:.0e}"
    return None


def _as_in(exact: Subject, theta: Theta, seed: int) -> Theta:
    """Return θ of ``exact`` with the learned values of ``theta``."""
    own = initial_theta(exact, seed)
    learned = [name for name in own if exact.slots[name].rule == "gradient"]
    return {**own, **{n: theta[n].map(lambda t, n=n: t.to(exact.slots[n].layout.dtype)) for n in learned}}


def _finite(subject: Subject, theta: Theta, keys: TaskKey) -> Contribution | None:
    try:
        return subject.contribute(theta, keys, 0)
    except NonFiniteError:
        return None


def mixed_disagrees(
    subject: Subject, engine: Engine, memory_bytes: int | None = None, tolerance: float = 1e-8
) -> str | None:
    """Compare one task's gradient under ``engine`` with the unrolled one in float64, far from θ_0.

    The inner loop has all steps, or fewer, where the unrolled ones do not fit into ``memory_bytes``. Return the
    difference (or the error) as text, or None if the relative difference of every slot is within ``tolerance``, or
    within a hundred times the change by the rounding of θ. An operator may lack a forward derivative, have a wrong one
    that raises no error (batch norm's second order: pytorch#196699), or one that is NaN where the gradient is finite.
    """
    steps, _ = float64_within(subject, memory_bytes)
    exact, keys = subject.in_float64(with_inner_steps(subject.algorithm, steps)), TaskKey.of(0, "train", 0, [0])
    mixed = subject.in_float64(exact.algorithm)
    mixed.set_engine(engine)
    for distance in DISTANCES:
        theta = perturbed_theta(exact, 0, distance)
        expected = _finite(exact, theta, keys)
        if expected is None:
            continue
        try:
            differences = _differences(mixed.contribute(theta, keys, 0), expected)
        except (RuntimeError, NotImplementedError) as error:
            return f"fails: {first_line(error)}"
        except NonFiniteError:
            return "gives NaN or Inf where unrolled differentiation is finite"
        if all(off <= tolerance for off in differences.values()):
            return None
        nearby = _finite(exact, _rounded_otherwise(exact, theta), keys)
        blur = math.inf if nearby is None else max(_differences(nearby, expected).values())
        if blur <= MAX_BLUR or not distance:
            return next(
                (
                    f"is off by {off:.0e} in slot {n}"
                    for n, off in differences.items()
                    if off > max(tolerance, 100 * blur)
                ),
                None,
            )
    return None


def _differences(found: Contribution, expected: Contribution) -> dict[str, float]:
    """Return the relative difference of every slot."""
    return {
        name: float((found.slots[name].double() - vector.double()).norm() / vector.double().norm().clamp(min=1e-300))
        for name, vector in expected.slots.items()
    }


def _rounded_otherwise(subject: Subject, theta: Theta) -> Theta:
    """Return θ with learned values that differ by a few units of the last place."""
    generator = torch.Generator().manual_seed(1)

    def moved(t: Tensor) -> Tensor:
        noise = torch.randn(t.shape, generator=generator, dtype=torch.float64).to(t.device)
        return t * (1 + 2.0**-51 * noise.to(t.dtype))

    return {n: p.map(moved) if subject.slots[n].rule == "gradient" else p for n, p in theta.items()}
