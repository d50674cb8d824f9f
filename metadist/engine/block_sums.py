"""Sum in blocks, in compiled shards.

A compiled loop adds up to 4096 numbers one after the other, where PyTorch's own kernels add in a tree. In float32 the
loop costs two digits of batch norm's statistics and of every bias's gradient, and inner steps multiply the error. Here
``make_fx`` traces every long sum as a sum of short sums, and a matrix product that sums one term as a product.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from functools import wraps
from types import NotImplementedType
from typing import Any, ParamSpec, TypeVar

import torch
from torch import Tensor
from torch._ops import OpOverload

#: PyTorch creates operators at run time and gives them no types.
aten: Any = torch.ops.aten

#: terms that one loop adds
SHORT = 32

P = ParamSpec("P")
T = TypeVar("T")


def _dims(x: Tensor, dims: Sequence[int] | None) -> list[int]:
    return sorted(d % x.dim() for d in dims) if dims else list(range(x.dim()))


def _count(x: Tensor, dims: Sequence[int]) -> int:
    return math.prod(x.shape[d] for d in dims)


def _sum(x: Tensor, dim: int, keepdim: bool = True) -> Tensor:
    total: Tensor = aten.sum.dim_IntList(x, [dim], keepdim)
    return total


def block_sum(
    x: Tensor, dims: Sequence[int] | None = None, keepdim: bool = False, *, dtype: torch.dtype | None = None
) -> Tensor | None:
    """Compute ``aten.sum`` over one dimension after the other, a long dimension as rows of about its square root.

    Return None for sums that need no blocks: short ones, sums of integers and sums with another ``dtype``.
    """
    chosen = _dims(x, dims)
    if not x.is_floating_point() or dtype not in (None, x.dtype) or _count(x, chosen) <= SHORT:
        return None
    kept = [d for d in range(x.dim()) if d not in chosen]
    rest = [x.shape[d] for d in kept]
    # Images in channels-last memory: sum rows of channels.
    if kept and kept[-1] == x.dim() - 3 and x.stride(kept[-1]) == 1:
        rows = x.permute(*kept[:-1], *chosen, kept[-1]).flatten(len(rest) - 1, -2)
        x = _along(rows, len(rest) - 1).reshape([1 if d in chosen else s for d, s in enumerate(x.shape)])
    else:
        for d in reversed(chosen):
            x = _along(x, d)
    return x if keepdim else x.reshape(rest)


def _along(x: Tensor, d: int) -> Tensor:
    """Sum along dimension ``d`` and keep it with size 1."""
    count = x.shape[d]
    if count <= SHORT:
        return _sum(x, d)
    rows = math.isqrt(count)
    whole = count // rows * rows
    blocks = torch.unflatten(x.narrow(d, 0, whole), d, (rows, whole // rows))
    total = _sum(_sum(blocks, d + 1, keepdim=False), d)
    return total if whole == count else total + _sum(x.narrow(d, whole, count - whole), d)


def _block_mean(
    x: Tensor, dims: Sequence[int] | None = None, keepdim: bool = False, *, dtype: torch.dtype | None = None
) -> Tensor | None:
    total = block_sum(x, dims, keepdim, dtype=dtype)
    return None if total is None else total / _count(x, _dims(x, dims))


def _block_var_mean(
    x: Tensor, dims: Sequence[int] | None = None, *, correction: float | None = None, keepdim: bool = False
) -> tuple[Tensor, Tensor] | None:
    chosen = _dims(x, dims)
    count, mean = _count(x, chosen), _block_mean(x, chosen, True)
    if mean is None:
        return None
    squares = (x - mean).square()
    total = block_sum(squares, chosen, keepdim)
    assert total is not None, "a sum as long as the mean's is a sum in blocks too"
    variance = total / max(0.0, count - (1 if correction is None else correction))
    return variance, mean if keepdim else mean.reshape(variance.shape)


def _outer(a: Tensor, b: Tensor) -> Tensor | None:
    """Compute [..., M, 1] · [..., 1, N] as a product: unlike a library call, Inductor fuses it with its neighbours."""
    return a * b if a.shape[-1] == 1 else None


def _or_default(function: Callable[P, T | None]) -> Callable[P, T | NotImplementedType]:
    """Return NotImplemented, ``make_fx``'s word for the operator itself, where ``function`` returns None."""

    @wraps(function)
    def decomposition(*args: P.args, **kwargs: P.kwargs) -> T | NotImplementedType:
        result = function(*args, **kwargs)
        return NotImplemented if result is None else result

    return decomposition


#: operator → function that ``make_fx`` traces in its place
DECOMPOSITIONS: dict[OpOverload[..., object], Callable[..., object]] = {
    aten.sum.dim_IntList: _or_default(block_sum),
    aten.sum.default: _or_default(block_sum),
    aten.mean.dim: _or_default(_block_mean),
    aten.mean.default: _or_default(_block_mean),
    aten.var_mean.correction: _or_default(_block_var_mean),
    aten.mm.default: _or_default(_outer),
    aten.bmm.default: _or_default(_outer),
}
