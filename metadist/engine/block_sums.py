"""Sums in blocks, for compiled shards.

A compiled loop adds up to 4096 numbers one after the other, where PyTorch's own kernels add in a tree. In float32 that costs
two digits of batch norm's statistics and of every bias's gradient, and inner steps multiply the error. Here every long sum
is traced as a sum of short sums, and a matrix product that sums one term as a product.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

aten: Any = torch.ops.aten

#: terms that are added one after the other
SHORT = 32


def _dims(x: Tensor, dims: Sequence[int] | None) -> list[int]:
    return sorted(d % x.dim() for d in dims) if dims else list(range(x.dim()))


def _count(x: Tensor, dims: Sequence[int]) -> int:
    return math.prod(x.shape[d] for d in dims)


def block_sum(
    x: Tensor, dims: Sequence[int] | None = None, keepdim: bool = False, *, dtype: torch.dtype | None = None
) -> Any:
    """``aten.sum``: one dimension after the other, a long one as rows of about its square root."""
    chosen = _dims(x, dims)
    if not x.is_floating_point() or dtype not in (None, x.dtype) or _count(x, chosen) <= SHORT:
        return NotImplemented
    kept = [d for d in range(x.dim()) if d not in chosen]
    rest = [x.shape[d] for d in kept]
    if (
        kept and kept[-1] == x.dim() - 3 and x.stride(kept[-1]) == 1
    ):  # images that lie channels last: rows are summed, of channels
        rows = x.permute(*kept[:-1], *chosen, kept[-1]).flatten(len(rest) - 1, -2)
        x = _along(rows, len(rest) - 1).reshape([1 if d in chosen else s for d, s in enumerate(x.shape)])
    else:
        for d in reversed(chosen):
            x = _along(x, d)
    return x if keepdim else x.reshape(rest)


def _along(x: Tensor, d: int) -> Tensor:
    count = x.shape[d]
    if count <= SHORT:
        return aten.sum.dim_IntList(x, [d], True)
    rows = math.isqrt(count)
    whole = count // rows * rows
    total = aten.sum.dim_IntList(
        aten.sum.dim_IntList(x.narrow(d, 0, whole).unflatten(d, (rows, whole // rows)), [d + 1]), [d], True
    )
    return total if whole == count else total + aten.sum.dim_IntList(x.narrow(d, whole, count - whole), [d], True)


def _block_mean(
    x: Tensor, dims: Sequence[int] | None = None, keepdim: bool = False, *, dtype: torch.dtype | None = None
) -> Any:
    total = block_sum(x, dims, keepdim, dtype=dtype)
    return total if total is NotImplemented else total / _count(x, _dims(x, dims))


def _block_var_mean(
    x: Tensor, dims: Sequence[int] | None = None, *, correction: float | None = None, keepdim: bool = False
) -> Any:
    chosen = _dims(x, dims)
    count, mean = _count(x, chosen), _block_mean(x, chosen, True)
    if mean is NotImplemented:
        return NotImplemented
    variance = block_sum((x - mean).square(), chosen, keepdim) / max(
        0.0, count - (1 if correction is None else correction)
    )
    return variance, mean if keepdim else mean.reshape(variance.shape)


def _outer(a: Tensor, b: Tensor) -> Any:
    """[..., M, 1] · [..., 1, N]: a library is called for nothing, and what surrounds it can't fuse with it."""
    return a * b if a.shape[-1] == 1 else NotImplemented


#: what ``make_fx`` traces in place of ATen's reductions; NotImplemented leaves them as they are
DECOMPOSITIONS: dict[Any, Callable[..., Any]] = {
    aten.sum.dim_IntList: block_sum,
    aten.sum.default: block_sum,
    aten.mean.dim: _block_mean,
    aten.mean.default: _block_mean,
    aten.var_mean.correction: _block_var_mean,
    aten.mm.default: _outer,
    aten.bmm.default: _outer,
}
