"""Call functions of tensors, differentiate them with types, and sum pytrees of tensors."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Protocol, TypeVar, cast

import torch
import torch.utils._pytree as pytree
from torch import Tensor, func

if TYPE_CHECKING:
    from typing_extensions import TypeVarTuple, Unpack

    Ts = TypeVarTuple("Ts")

T = TypeVar("T")


class TensorCall(Protocol):
    """Call a function of tensors, directly or compiled under ``name``.

    Of the arguments, pytrees of tensors and numbers, a compiled function receives every number as a 0-d tensor.
    """

    def __call__(self, name: str, function: Callable[..., T], *arguments: object) -> T: ...


def directly(name: str, function: Callable[..., T], *arguments: object) -> T:
    """Call ``function`` without compilation: the ``TensorCall`` of eager shards."""
    return function(*arguments)


def vjp(function: Callable[[Unpack[Ts]], T], *primals: Unpack[Ts]) -> tuple[T, Callable[[T], tuple[Unpack[Ts]]]]:
    """Return ``function(*primals)`` and its vector-Jacobian product: ``torch.func.vjp``, typed for two results."""
    return cast("tuple[T, Callable[[T], tuple[Unpack[Ts]]]]", func.vjp(function, *primals))


def jvp(function: Callable[[Unpack[Ts]], T], primals: tuple[Unpack[Ts]], tangents: tuple[Unpack[Ts]]) -> tuple[T, T]:
    """Return ``function(*primals)`` and its directional derivative: ``torch.func.jvp``, typed for two results."""
    return cast("tuple[T, T]", func.jvp(function, primals, tangents))


def tree_sum(stacked: Tensor) -> Tensor:
    """Sum over the leading dimension as a balanced binary tree, like ``TreeSum``.

    The sums of complete subtrees (chunks of a power of two) can be summed further without a changed bit.
    """
    terms = list(stacked.unbind(0))
    while len(terms) > 1:
        terms = [torch.add(*terms[i : i + 2]) if i + 1 < len(terms) else terms[i] for i in range(0, len(terms), 2)]
    return terms[0]


def kept_sum(keep: Tensor, tree: T) -> T:
    """Sum every tensor [T, …] of a pytree over the tasks for which ``keep`` [T] is true."""

    def total(t: Tensor) -> Tensor:
        return tree_sum(torch.where(keep.view(-1, *(1,) * (t.dim() - 1)), t, torch.zeros_like(t)))

    return mapped(total, tree)


def mapped(function: Callable[[Tensor], Tensor], tree: T) -> T:
    """Apply ``function`` to every tensor of a pytree."""
    return cast("T", pytree.tree_map(function, tree))


def added(a: T, b: T) -> T:
    """Add the tensors of two pytrees of one structure."""
    return cast("T", pytree.tree_map(torch.add, a, b))


def apart(t: Tensor) -> Tensor:
    """Return ``t`` in memory of its own.

    Forward mode gives each tangent the memory layout of its φ: φ may be one row that all tasks share, or a part of a
    vector (the tangent then takes as many bytes as the vector).
    """
    return t if t.untyped_storage().nbytes() == t.nbytes else t.clone(memory_format=torch.contiguous_format)
