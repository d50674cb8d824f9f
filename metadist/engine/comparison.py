"""Compare the ways of differentiating that an algorithm admits: time and bias, on one sampled task."""

from __future__ import annotations

import statistics
import time
from collections.abc import Mapping
from dataclasses import dataclass, fields, is_dataclass, replace

import torch

from metadist.core.algorithm import Algorithm, with_inner_steps
from metadist.core.differences import relative_error
from metadist.core.engine import Differentiation, Engine
from metadist.core.errors import NonFiniteError, first_line
from metadist.core.random import TaskKey
from metadist.engine.functions import directly
from metadist.engine.implicit import norm
from metadist.engine.memory import float64_within
from metadist.engine.subject import Subject, initial_theta

#: measurements of the time of one task, after one that loads kernels
REPEATS = 3


@dataclass(frozen=True)
class Estimator:
    """One way of differentiating: the seconds of one task, not compiled, and the error of its gradient in words.

    ``seconds`` is None where it fails.
    """

    name: Differentiation
    seconds: float | None
    bias: str


def estimators(
    subject: Subject, kinds: Mapping[Differentiation, Engine], memory_bytes: int | None = None
) -> list[Estimator]:
    """Measure one training task of ``subject`` at θ_0 under each of ``kinds``, a kind's name → its engine.

    Biases are measured in float64; the unrolled gradient, their reference, may take ``memory_bytes``.
    """
    return [_estimator(subject, name, engine, memory_bytes) for name, engine in kinds.items()]


def _estimator(subject: Subject, name: Differentiation, engine: Engine, memory_bytes: int | None) -> Estimator:
    try:
        return Estimator(name, _seconds(subject, engine), _bias(subject, engine, memory_bytes))
    except (RuntimeError, NotImplementedError) as error:
        return Estimator(name, None, f"fails: {first_line(error)}")


def _task() -> TaskKey:
    return TaskKey.of(0, "train", 0, [0])


def _gradient(subject: Subject, engine: Engine) -> torch.Tensor:
    """Return one task's contribution to all learned slots; NaN where it is not finite."""
    subject.set_engine(engine)
    try:
        found = subject.contribute(initial_theta(subject, 0), _task(), 0).slots
    except NonFiniteError:
        return torch.full((1,), torch.nan)
    return torch.cat([vector.double() for vector in found.values()])


def _seconds(subject: Subject, engine: Engine) -> float:
    eager, measured = subject.eager(), []
    for _ in range(1 + REPEATS):
        began = time.perf_counter()
        _gradient(eager, engine)
        measured.append(time.perf_counter() - began)
    return statistics.median(measured[1:])


def _bias(subject: Subject, engine: Engine, memory_bytes: int | None) -> str:
    algorithm, kind = subject.algorithm, engine.differentiation
    steps, _ = float64_within(subject, memory_bytes)
    if algorithm.contribution == "delta":
        return "no gradient: the algorithm contributes a delta"
    if kind == "implicit":
        return _implicit_bias(subject, engine, steps)
    if exact := _with_second_order(with_inner_steps(algorithm, steps)):
        off = _apart(subject, with_inner_steps(algorithm, steps), engine, exact)
        return f"first order: the inner Hessian is left out, {off} from the exact gradient of {steps} steps"
    if kind == "mixed":
        same = with_inner_steps(algorithm, steps)
        return f"exact: {_apart(subject, same, engine, same)} from unrolled over {steps} steps"
    return f"exact: the gradient of {algorithm.inner_steps} inner steps" if algorithm.inner_steps else "exact"


def _with_second_order(algorithm: Algorithm) -> Algorithm | None:
    """Return a first-order algorithm with its inner Hessians; None where it is not first order, or always is."""
    if not algorithm.first_order or not is_dataclass(algorithm):
        return None
    return replace(algorithm, first_order=False) if "first_order" in {f.name for f in fields(algorithm)} else None


def _apart(subject: Subject, algorithm: Algorithm, engine: Engine, reference: Algorithm) -> str:
    """Return the relative distance of a gradient in float64 from the unrolled one of ``reference``."""
    exact = _gradient(subject.in_float64(reference), Engine())
    return f"{relative_error(_gradient(subject.in_float64(algorithm), engine), exact):.0e}"


def _implicit_bias(subject: Subject, engine: Engine, steps: int) -> str:
    exact = subject.in_float64(subject.algorithm)
    residual, slope, iterations = _accuracy(exact, engine)
    parts = [
        f"exact at a minimum; inner gradient {slope:.0e} of its start after {subject.algorithm.inner_steps} steps",
        f"residual {residual:.0e} after {iterations} iterations",
    ]
    if steps == subject.algorithm.inner_steps:
        off = _apart(subject, subject.algorithm, engine, subject.algorithm)
        parts.append(f"{off} from the gradient of the steps")
    return "; ".join(parts)


def _accuracy(exact: Subject, engine: Engine) -> tuple[float, float, int]:
    """Return ‖v − A x‖ / ‖v‖, the norm of the inner gradient at φ_k over that at φ_0, and the number of iterations."""
    gradient = exact.meta_gradient_under(engine)
    shard = gradient.pieces(directly, initial_theta(exact, 0), exact.sample(_task()), _task().to(exact.device), 0)
    solver, (phi, _, v, _, _) = gradient.solver, gradient.ending(shard)
    first = shard.piece("first", lambda bound: bound.descent().phi)
    slopes = [norm(shard.piece("slope", solver.slope, (at,), (solver.step,))) for at in (first, phi)]
    _, residual, _ = solver.solution(shard.piece, phi, v)
    return norm(residual) / norm(v), slopes[1] / slopes[0], solver.settings.iterations
