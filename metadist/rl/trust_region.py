"""Update a policy once within a bounded mean KL divergence (TRPO: Schulman et al., ICML 2015)."""

from __future__ import annotations

import math
from collections.abc import Callable, Generator
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from metadist.core.computation import FisherProduct, Gradient, Surrogate
from metadist.core.round import Round
from metadist.core.state import Contribution, State
from metadist.rl.updates import TrialMetaStep

#: the slot that carries a direction in parameter space to the workers
DIRECTION = "direction"
#: factor between one step of the line search and the next
BACKTRACK = 0.8


@dataclass(frozen=True)
class TrustRegion:
    """The bounds of an update.

    ``kl`` is the largest mean KL divergence, ``cg_steps`` the number of conjugate-gradient steps, ``damping`` the term
    added to the Fisher matrix's diagonal, and ``backtracks`` the largest number of line-search steps.
    """

    kl: float
    cg_steps: int
    damping: float
    backtracks: int


def trust_region_rounds(step: TrialMetaStep, region: TrustRegion) -> Generator[Round, Contribution, None]:
    """Yield a gradient round, a round of Fisher-vector products per conjugate-gradient step, and line-search rounds.

    Every sum is the canonical sum, and the driver's own arithmetic is float64 in blocks: the bits are the same for any
    number of workers.
    """
    total = yield from step.ask(Gradient(step.statistics), step.rolled)
    step.describe(total)
    ascent = -total.slots["model"].double() / total.weight

    def fisher(direction: Tensor) -> Generator[Round, Contribution, Tensor]:
        product = yield from step.ask(FisherProduct(), step.rolled, _with(step.state, direction))
        return product.slots["model"].double() / product.weight

    solution, image = yield from conjugate_gradient(ascent, fisher, region)
    curvature = dot(solution, image)
    step.report["cg_residual"] = math.sqrt(dot(ascent - image, ascent - image) / max(dot(ascent, ascent), 1e-300))
    if curvature > 0:
        # The largest multiple that the quadratic model of the divergence allows (appendix C).
        yield from _line_search(step, region, solution * math.sqrt(2 * region.kl / curvature))


def conjugate_gradient(
    b: Tensor, product: Callable[[Tensor], Generator[Round, Contribution, Tensor]], region: TrustRegion
) -> Generator[Round, Contribution, tuple[Tensor, Tensor]]:
    """Return x and A x, where A = F + damping · I and x approximates the solution of A x = b (Hestenes & Stiefel 1952).

    ``product(p)`` yields rounds and returns F p; there are at most ``cg_steps`` of them.
    """
    x, residual = torch.zeros_like(b), b
    p, square = b, dot(b, b)
    for _ in range(region.cg_steps):
        if square <= 1e-20 * dot(b, b):
            break
        image = (yield from product(p)) + region.damping * p
        bend = dot(p, image)
        if not bend > 0:  # rounding, or a divergence without curvature along p
            break
        x, residual = x + square / bend * p, residual - square / bend * image
        last, square = square, dot(residual, residual)
        p = residual + square / last * p
    return x, b - residual


def _line_search(step: TrialMetaStep, region: TrustRegion, whole: Tensor) -> Generator[Round, Contribution, None]:
    """Set θ ← θ + fraction · ``whole`` for the first fraction that improves the surrogate within the bound.

    θ does not change if no fraction does (appendix C). Each round publishes θ and ``whole``, and the workers add them,
    because they measure the divergence from θ.
    """
    published = _with(step.state, whole)
    for number in range(region.backtracks):
        fraction = BACKTRACK**number
        total = yield from step.ask(Surrogate(fraction, step.statistics), step.rolled, published)
        improvement, kl = total.metrics["improvement"] / total.weight, total.metrics["kl"] / total.weight
        accepted = improvement > 0 and kl <= region.kl
        step.report.update(
            improvement=improvement if accepted else 0.0,
            kl=kl if accepted else 0.0,
            step_fraction=fraction * accepted,
        )
        if accepted:
            moved = published.slots["model"] + fraction * published.slots[DIRECTION]
            step.state = replace(step.state, slots={**step.state.slots, "model": moved})
            return


def _with(state: State, direction: Tensor) -> State:
    return replace(state, slots={**state.slots, DIRECTION: direction.to(state.slots["model"].dtype)})


def dot(a: Tensor, b: Tensor) -> float:
    """Compute Σ a b in float64 in blocks of fixed size, so that the result does not depend on the number of threads."""
    terms = a.double() * b.double()
    while terms.numel() > 1024:
        terms = torch.nn.functional.pad(terms, (0, -terms.numel() % 1024)).view(-1, 1024).sum(1)
    return float(terms.sum())
