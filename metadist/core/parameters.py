"""Named tensors with arithmetic, and their layout in a flat vector."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Union

import torch
import torch.utils._pytree as pytree
from torch import Tensor

Scalar = Union[float, Tensor]


class Parameters(Mapping[str, Tensor]):
    """Named tensors that add, subtract and scale: ``phi = theta - lr * gradient``. A pytree node for ``torch.func``.

    ``flat`` is the vector that all the tensors are views of, where there is one.
    """

    __slots__ = ("_tensors", "flat")

    def __init__(self, tensors: Mapping[str, Tensor], flat: Tensor | None = None) -> None:
        self._tensors = dict(tensors)
        self.flat = flat

    def __getitem__(self, name: str) -> Tensor:
        return self._tensors[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._tensors)

    def __len__(self) -> int:
        return len(self._tensors)

    def __repr__(self) -> str:
        return f"Parameters({ {n: tuple(t.shape) for n, t in self.items()} })"

    def map(self, function: Callable[..., Tensor], *others: Parameters | Scalar) -> Parameters:
        """Apply ``function`` to the tensors of each name in ``self`` and ``others``; scalars go to every name."""
        return Parameters(
            {n: function(t, *(o[n] if isinstance(o, Parameters) else o for o in others)) for n, t in self.items()}
        )

    def __add__(self, other: Parameters | Scalar) -> Parameters:
        return self.map(torch.add, other)

    def __sub__(self, other: Parameters | Scalar) -> Parameters:
        return self.map(torch.sub, other)

    def __mul__(self, other: Parameters | Scalar) -> Parameters:
        return self.map(torch.mul, other)

    __radd__ = __add__
    __rmul__ = __mul__

    def __truediv__(self, other: Parameters | Scalar) -> Parameters:
        return self.map(torch.div, other)

    def __neg__(self) -> Parameters:
        return self.map(torch.neg)

    def sqrt(self) -> Parameters:
        """Return the element-wise square root."""
        return self.map(torch.sqrt)

    def square(self) -> Parameters:
        """Return the element-wise square."""
        return self.map(torch.square)

    def detach(self) -> Parameters:
        """Return the same values as constants of automatic differentiation."""
        return self.map(torch.Tensor.detach)

    def zeros(self) -> Parameters:
        """Return zeros with the same names and shapes."""
        return self.map(torch.zeros_like)

    def select(self, predicate: Callable[[str], bool]) -> Parameters:
        """Return the tensors with a name that satisfies ``predicate``."""
        return Parameters({n: t for n, t in self.items() if predicate(n)})

    def replace(self, other: Mapping[str, Tensor]) -> Parameters:
        """Return these parameters and those of ``other``; for names that both have, those of ``other``."""
        return Parameters({**self._tensors, **other})


pytree.register_pytree_node(
    Parameters,
    lambda p: (list(p.values()), tuple(p)),
    lambda values, names: Parameters(dict(zip(names, values))),
    serialized_type_name="metadist.core.Parameters",
)


@dataclass(frozen=True)
class Layout:
    """The order, names and shapes of tensors of one dtype in a flat vector."""

    names: tuple[str, ...]
    shapes: tuple[tuple[int, ...], ...]
    dtype: torch.dtype = torch.float32

    @classmethod
    def of(cls, tensors: Mapping[str, Tensor]) -> Layout:
        """Return the layout of ``tensors`` in their order. Raise ValueError where their dtypes differ."""
        dtypes = {t.dtype for t in tensors.values()}
        if len(dtypes) > 1:
            raise ValueError(f"one layout holds one dtype, got {sorted(map(str, dtypes))}")
        return cls(
            tuple(tensors), tuple(tuple(t.shape) for t in tensors.values()), dtypes.pop() if dtypes else torch.float32
        )

    @cached_property
    def sizes(self) -> tuple[int, ...]:
        """The number of elements of each tensor."""
        return tuple(int(torch.Size(s).numel()) for s in self.shapes)

    @cached_property
    def numel(self) -> int:
        """The number of elements of the vector."""
        return sum(self.sizes)

    @cached_property
    def fingerprint(self) -> str:
        """16 hex digits of a hash of names, shapes, order and dtype."""
        text = json.dumps([str(self.dtype), list(zip(self.names, self.shapes))])
        return hashlib.sha256(text.encode()).hexdigest()[:16]

    def flatten(self, tensors: Mapping[str, Tensor]) -> Tensor:
        """Return ``tensors`` as a vector [numel], without a copy where they are the views of such a vector.

        Raises KeyError for a missing tensor: a missing gradient must never count as zero.
        """
        if isinstance(tensors, Parameters) and tensors.flat is not None and tuple(tensors) == self.names:
            return tensors.flat
        if not self.names:
            return torch.empty(0, dtype=self.dtype)
        return torch.cat([tensors[n].reshape(-1) for n in self.names])

    def unflatten(self, vector: Tensor) -> Parameters:
        """Return named views of ``vector`` [numel]. Raise ValueError for another length."""
        if vector.numel() != self.numel:
            raise ValueError(f"expected a vector of {self.numel} elements, got {tuple(vector.shape)}")
        parts = vector.split(self.sizes)
        return Parameters({n: p.view(s) for n, s, p in zip(self.names, self.shapes, parts)}, flat=vector)
