"""Sample gamma, beta and Dirichlet distributions as pure functions of the task's key."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from metadist.core.random import Stream, philox, uniform

#: the first counter of the proposals' words, above those of the exponentials
_PROPOSALS = 1 << 24


def standard_gamma(stream: Stream, shape: Tensor) -> Tensor:
    """Sample Gamma(shape, 1) for shape [B, n] ≥ 1: float64 [B, n], of float32 precision.

    Marsaglia & Tsang, "A simple method for generating gamma variables", ACM TOMS 2000. Where the shape is 1 (no
    observation yet), an exponential.
    """
    count = shape.shape[-1]
    drawn = -torch.log1p(-stream.uniform(count).double())
    left = (shape > 1).flatten().nonzero().squeeze(1)
    flat = drawn.view(-1)
    attempt = 0
    while len(left):
        position, task = left % count, stream.tasks[left // count]
        zero = torch.zeros_like(task)
        words = philox(
            (_PROPOSALS + attempt * count + position, task, zero + stream.meta_step, zero + stream.high_word),
            stream.key,
        )
        u1, u2, u, _ = (uniform(w).double() for w in words)
        normal = (-2 * torch.log1p(-u1)).sqrt() * torch.cos(2 * math.pi * u2)
        d = shape.reshape(-1)[left].double() - 1 / 3
        v = (1 + normal / (9 * d).sqrt()) ** 3
        proposal = d * v
        taken = (v > 0) & (torch.log1p(-u) < 0.5 * normal**2 + d - proposal + d * v.clamp(min=1e-300).log())
        flat[left[taken]] = proposal[taken]
        left, attempt = left[~taken], attempt + 1
    return drawn.to(torch.float32).double()


def beta(stream: Stream, a: Tensor, b: Tensor) -> Tensor:
    """Sample Beta(a, b) for a and b [B, n] ≥ 1: float64 [B, n]."""
    x, y = standard_gamma(stream, torch.cat((a, b), -1)).chunk(2, -1)
    return x / (x + y)


def dirichlet(stream: Stream, concentration: Tensor) -> Tensor:
    """Sample Dirichlet over the last dimension of ``concentration`` [B, …, n] ≥ 1: float64."""
    drawn = standard_gamma(stream, concentration.flatten(1)).view_as(concentration)
    return drawn / drawn.sum(-1, keepdim=True)
