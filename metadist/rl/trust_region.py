"""One policy update within a bounded mean KL divergence (Schulman et al., "Trust region policy optimization", ICML 2015)."""

from __future__ import annotations

import math
from collections.abc import Callable, Generator
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from metadist.core.round import Round
from metadist.core.state import Contribution, State
from metadist.rl.updates import MetaStep

#: the slot by which workers are told a direction in parameter space
DIRECTION = "direction"
#: each step of the line search is so much of the one before
BACKTRACK = 0.8


@dataclass(frozen=True)
class TrustRegion:
    """Mean KL divergence of a step at most; conjugate-gradient steps; what is added to the Fisher matrix's diagonal; steps of the
    line search at most."""

    kl: float
    cg_steps: int
    damping: float
    backtracks: int


def trust_region_rounds(step: MetaStep, region: TrustRegion) -> Generator[Round, Contribution, None]:
    """A gradient round; a round of Fisher-vector products for each conjugate-gradient step; rounds of the line search.

    Every sum is the canonical one, and the driver's own arithmetic is float64 by blocks: the same bits for any number of workers.
    """
    total = yield from step.ask("gradient", step.rolled)
    step.describe(total)
    ascent = -total.slots["model"].double() / total.weight

    def fisher(direction: Tensor) -> Generator[Round, Contribution, Tensor]:
        product = yield from step.ask("fisher", step.rolled, published=_with(step.state, direction))
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
    """x and A x, where A = F + damping · I and x solves A x = b as well as ``cg_steps`` products F p can (Hestenes & Stiefel 1952)."""
    x, residual = torch.zeros_like(b), b
    p, square = b, dot(b, b)
    for _ in range(region.cg_steps):
        if square <= 1e-20 * dot(b, b):
            break
        image = (yield from product(p)) + region.damping * p
        bend = dot(p, image)
        if not bend > 0:  # rounding, or a divergence that is flat along p
            break
        x, residual = x + square / bend * p, residual - square / bend * image
        last, square = square, dot(residual, residual)
        p = residual + square / last * p
    return x, b - residual


def _line_search(step: MetaStep, region: TrustRegion, whole: Tensor) -> Generator[Round, Contribution, None]:
    """θ ← θ + fraction · ``whole`` for the first fraction that improves the surrogate within the bound; or θ stays (appendix C).

    θ and ``whole`` are published once more each time; workers add them up, since the divergence is measured from θ.
    """
    published = _with(step.state, whole)
    for number in range(region.backtracks):
        fraction = BACKTRACK**number
        total = yield from step.ask("surrogate", step.rolled, published=published, fraction=fraction)
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
    """Σ a b in float64 by blocks of fixed size, so that the result doesn't depend on the number of threads."""
    terms = a.double() * b.double()
    while terms.numel() > 1024:
        terms = torch.nn.functional.pad(terms, (0, -terms.numel() % 1024)).view(-1, 1024).sum(1)
    return float(terms.sum())
