"""The driver's state, the currency of contributions, and the canonical sum."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Generic, Literal, TypeVar

import torch
from torch import Tensor

from metadist.core.parameters import Layout, Parameters

Rule = Literal["gradient", "average", "constant"]
T = TypeVar("T")


@dataclass(frozen=True)
class Slot:
    """A named part of the state. ``rule`` says what becomes of the contributions to it:

    ``gradient`` goes through the outer optimiser, with this slot's own ``lr``, ``bounds`` and ``weight_decay`` where
    given; ``average`` is replaced by the weighted mean; ``constant`` never changes.
    """

    layout: Layout
    rule: Rule = "gradient"
    lr: float | None = None
    bounds: tuple[float | None, float | None] = (None, None)
    weight_decay: float | None = None


@dataclass(frozen=True)
class State:
    """Everything a run needs to go on: slot vectors and the outer optimiser's own vectors, by name."""

    slots: Mapping[str, Tensor]
    outer: Mapping[str, Tensor] = field(default_factory=dict)

    def theta(self, slots: Mapping[str, Slot]) -> dict[str, Parameters]:
        """θ as algorithms see it: slot → named tensors (views)."""
        return {name: slots[name].layout.unflatten(vector) for name, vector in self.slots.items()}

    def sha256(self) -> str:
        """SHA-256 over every slot's name, dtype and bytes, in name order. The outer state doesn't enter."""
        digest = hashlib.sha256()
        for name in sorted(self.slots):
            vector = self.slots[name].detach().cpu().contiguous()
            digest.update(f"{name}:{vector.dtype}:{vector.numel()}:".encode())
            digest.update(vector.view(torch.uint8).numpy().tobytes())
        return digest.hexdigest()


def is_finite(vector: Tensor) -> bool:
    """One pass: NaN and Inf survive a sum, so a finite sum proves finite terms. An overflowing one proves nothing."""
    if not vector.is_floating_point():
        return True
    return bool(torch.isfinite(vector.sum())) or bool(torch.isfinite(vector).all())


@dataclass(frozen=True)
class Contribution:
    """Sums over the tasks of one or more shards: Σ slot vectors, Σ weight, number of tasks, Σ metrics.

    ``metrics`` are float64 sums that are divided by ``weight`` once, at the end, like the slots.
    """

    slots: Mapping[str, Tensor]
    weight: float
    tasks: int
    metrics: Mapping[str, float] = field(default_factory=dict)

    def __add__(self, other: Contribution) -> Contribution:
        return self._plus(other, torch.add)

    def absorb(self, other: Contribution) -> Contribution:
        """``self + other``, the same bits, in the memory of ``self``, which is spent: for a sum that owns its terms."""
        return self._plus(other, Tensor.add_)

    def _plus(self, other: Contribution, add: Callable[[Tensor, Tensor], Tensor]) -> Contribution:
        if self.slots.keys() != other.slots.keys() or self.metrics.keys() != other.metrics.keys():
            raise ValueError(
                f"contributions differ: {sorted(self.slots)} {sorted(self.metrics)} and {sorted(other.slots)}"
            )
        return Contribution(
            {n: add(v, other.slots[n]) for n, v in self.slots.items()},
            self.weight + other.weight,
            self.tasks + other.tasks,
            {n: v + other.metrics[n] for n, v in self.metrics.items()},
        )

    def is_finite(self) -> bool:
        return all(map(is_finite, self.slots.values()))


@dataclass(frozen=True)
class Records:
    """Fixed-width columns with one row per task (or step): name → [rows, …]. Concatenated in shard order, never summed."""

    columns: Mapping[str, Tensor]

    @property
    def rows(self) -> int:
        return next(iter(self.columns.values())).shape[0] if self.columns else 0

    def part(self, rows: slice | Tensor) -> Records:
        """The rows that a slice, or a mask [rows], picks."""
        return Records({name: column[rows] for name, column in self.columns.items()})

    @staticmethod
    def concatenate(parts: Sequence[Records]) -> Records:
        return Records({n: torch.cat([p.columns[n] for p in parts]) for n in parts[0].columns})


class TreeSum(Generic[T]):
    """The balanced binary tree over indices 0 … count−1, summed as its leaves arrive, in whatever order.

    Neighbours (0,1), (2,3), … are added, then their sums, level by level; an odd one moves up as it is. The shape
    depends on ``count`` alone, so the floating-point result doesn't depend on who computed a leaf, or when. Nor on who
    added some up: 2^k leaves from a multiple of 2^k on (fewer at the end) are a node, and a tree of their own gives its sum.
    """

    def __init__(self, count: int, add: Callable[[T, T], T] = lambda a, b: a + b) -> None:  # type: ignore[operator]
        if count < 1:
            raise ValueError(f"a sum needs at least one leaf, got {count}")
        self.count, self._add = count, add
        self._widths = [count]
        while self._widths[-1] > 1:
            self._widths.append((self._widths[-1] + 1) // 2)
        self._waiting: dict[tuple[int, int], T] = {}
        self._seen: set[int] = set()

    def add(self, index: int, value: T, leaves: int = 1) -> None:
        """Leaf ``index``, or the sum of so many from there on."""
        level, end = (leaves - 1).bit_length(), index + leaves
        for leaf in range(index, end):
            if not 0 <= leaf < self.count:
                raise ValueError(f"leaf {leaf} is not one of {self.count}")
            if leaf in self._seen:
                raise ValueError(f"leaf {leaf} arrived twice")
        if leaves < 1 or index % (1 << level) or (leaves != 1 << level and end != self.count):
            raise ValueError(f"{leaves} leaves from {index} on are no node of a tree over {self.count}")
        self._seen.update(range(index, end))
        index >>= level
        while level < len(self._widths) - 1:
            sibling = index ^ 1
            if sibling < self._widths[level]:
                if (level, sibling) not in self._waiting:
                    break
                other = self._waiting.pop((level, sibling))
                value = self._add(value, other) if index < sibling else self._add(other, value)
            level, index = level + 1, index // 2
        self._waiting[level, index] = value

    def result(self) -> T:
        if len(self._seen) < self.count:
            missing = sorted(set(range(self.count)) - self._seen)
            raise ValueError(f"{len(missing)} of {self.count} leaves are missing: {missing[:8]}")
        return self._waiting[len(self._widths) - 1, 0]
