"""Coordinate-wise networks: the parts that learned optimisers share."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from metadist.core.parameters import Parameters
from metadist.core.random import seeded


def log_and_sign(values: Tensor, p: float = 10.0) -> Tensor:
    """Return two features of ``values`` […]: […, 2] (Andrychowicz et al. 2016, appendix A).

    (log|v| / p, sign v) where |v| ≥ e^−p, otherwise (−1, e^p v).
    """
    size = values.abs()
    large = size >= math.exp(-p)
    first = torch.where(large, size, torch.full_like(size, math.exp(-p))).log() / p
    second = torch.where(large, values.sign(), values * math.exp(p))
    return torch.stack((first, second), -1)


def lstm_step(x: Tensor, memory: Tensor, weight: Tensor, bias: Tensor) -> tuple[Tensor, Tensor]:
    """Return (output [n, H], memory [n, 2 H]) of one LSTM step on x [n, F] and memory (h, c).

    ``weight`` is [4 H, F + H] and ``bias`` [4 H], in the order input, forget, cell, output. PyTorch's own cells have
    neither second derivatives nor a batching rule.
    """
    hidden, cell = memory.chunk(2, -1)
    i, f, candidate, o = F.linear(torch.cat((x, hidden), -1), weight, bias).chunk(4, -1)
    cell = f.sigmoid() * cell + i.sigmoid() * candidate.tanh()
    hidden = o.sigmoid() * cell.tanh()
    return hidden, torch.cat((hidden, cell), -1)


def initial_weights(name: str, shapes: Mapping[str, Sequence[int]], dtype: torch.dtype) -> Parameters:
    """Return the first weights of a network: the same for every run.

    Matrices [rows, columns] are normal with deviation columns^−½, cut at twice the deviation; vectors are zeros.
    """
    generator = seeded(0, name)

    def drawn(shape: Sequence[int]) -> Tensor:
        if len(shape) < 2:
            return torch.zeros(*shape, dtype=dtype)
        bound = math.erf(math.sqrt(2.0))  # the mass of a normal within two deviations
        uniform = torch.rand(*shape, generator=generator, dtype=torch.float64)
        normal = torch.erfinv((2 * uniform - 1) * bound) * math.sqrt(2.0)
        return (normal / math.sqrt(shape[-1])).to(dtype)

    return Parameters({n: drawn(shape) for n, shape in shapes.items()})
