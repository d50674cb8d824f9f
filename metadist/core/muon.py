"""Muon: momentum of whole matrices, orthogonalised by a Newton-Schulz iteration."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

from torch import Tensor

from metadist.core.parameters import Layout
from metadist.core.threads import one_thread
from metadist.core.transformations import (
    Memory,
    Proposal,
    ScaleByAdam,
    Transformation,
    UpdateContext,
    squared_norm,
)

#: the coefficients of X ← a X + (b X Xᵀ + c (X Xᵀ)²) X
COEFFICIENTS = (3.4445, -4.7750, 2.0315)
STEPS = 5
EPS = 1e-7
#: the root mean square of an update by Adam, which that of a matrix is scaled to (Liu et al. 2025, section 2.2)
ADAM_RMS = 0.2


def orthogonalised(matrix: Tensor) -> Tensor:
    """Return nearly U Vᵀ of ``matrix`` = U S Vᵀ [m, n]: its singular values become values between 0.5 and 1.5.

    The iteration runs in float64 with one thread, so its bits do not depend on the threads and on the precision of
    matrix products in the driver.
    """
    wide = matrix.double()
    if matrix.shape[0] > matrix.shape[1]:
        wide = wide.T.contiguous()
    a, b, c = COEFFICIENTS
    wide = wide / max(math.sqrt(float(squared_norm(wide.flatten()))), EPS)
    with one_thread():
        for _ in range(STEPS):
            gram = wide @ wide.T
            wide = a * wide + (b * gram + c * (gram @ gram)) @ wide
    return (wide.T if matrix.shape[0] > matrix.shape[1] else wide).to(matrix.dtype)


@dataclass(frozen=True)
class ScaleByMuon(Transformation):
    """Replace the gradient of every matrix by its orthogonalised Nesterov momentum (Jordan et al. 2024), others by
    Adam's step.

    ``matrices`` names the tensors of ``layout`` that are matrices; a convolution kernel [out, …] counts as the matrix
    [out, rest]. m ← μ m + (1 − μ) g is part of ``first``; the step is O(μ m + (1 − μ) g) · 0.2 √max(rows, columns), so
    that one rate serves matrices and all others.
    """

    layout: Layout
    matrices: tuple[str, ...]
    momentum: float
    others: ScaleByAdam

    def init(self, value: Tensor) -> Memory:
        return self.others.init(value)

    def update(self, proposal: Proposal, memory: Memory, context: UpdateContext) -> tuple[Proposal, Memory]:
        gradient, earlier = proposal.step, memory["first"]
        changed, kept = self.others.update(proposal, memory, context)
        assert changed.divisor is not None
        direction, divisor = changed.direction.clone(), changed.divisor.clone()
        first, second, start = kept["first"].clone(), kept["second"].clone(), 0
        for name, shape, size in zip(self.layout.names, self.layout.shapes, self.layout.sizes):
            part = slice(start, start + size)
            start += size
            if name not in self.matrices:
                continue
            fresh = gradient[part] * (1 - self.momentum)
            first[part] = earlier[part] * self.momentum + fresh
            ahead = (first[part] * self.momentum + fresh).view(shape[0], -1)
            scale = ADAM_RMS * math.sqrt(max(ahead.shape))
            direction[part] = orthogonalised(ahead).reshape(-1) * scale
            divisor[part], second[part] = 1.0, 0.0
        return replace(proposal, direction=direction, divisor=divisor), {**kept, "first": first, "second": second}
