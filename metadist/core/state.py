"""The state of a run, the contributions of tasks, and their sum over a canonical tree."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Generic, Literal, TypeVar

import torch
from torch import Tensor

from metadist.core.errors import ConfigError, within
from metadist.core.parameters import Layout, Parameters

Rule = Literal["gradient", "average", "constant"]
Weights = Literal["trained", "averaged"]
"""Which values of the slots a score, an export or a service holds."""
AVERAGE = "average"
"""Name in the outer state, behind ``{slot}/``: the average of a slot's values, which is judged in place of them."""
T = TypeVar("T")


@dataclass(frozen=True)
class Slot:
    """A named part of the state. ``rule`` determines how contributions change it.

    ``gradient``: the outer optimiser applies their mean, with this slot's own ``lr``, ``bounds`` and ``weight_decay``
    where given. ``average``: their weighted mean replaces the value. ``constant``: the value never changes.
    ``matrices`` names the tensors that optimisers of whole matrices (Muon) treat as such.
    """

    layout: Layout
    rule: Rule = "gradient"
    lr: float | None = None
    bounds: tuple[float | None, float | None] = (None, None)
    weight_decay: float | None = None
    matrices: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        within(0, math.inf, **{"lr of a slot": self.lr, "weight_decay of a slot": self.weight_decay})
        low, high = (unbounded if b is None else b for b, unbounded in zip(self.bounds, (-math.inf, math.inf)))
        if not low <= high:
            raise ConfigError(f"bounds of a slot: {self.bounds}; expected (low, high) with low ≤ high, or None for one")


@dataclass(frozen=True)
class State:
    """The slot vectors and the vectors of the outer optimiser, by name: all that a run needs to resume.

    ``slots`` are the trained values. Where the outer loop averages them, their averages are in ``outer``.
    """

    slots: Mapping[str, Tensor]
    outer: Mapping[str, Tensor] = field(default_factory=dict)

    @property
    def weights(self) -> Weights:
        """Which values ``judged`` returns: ``averaged`` where the outer loop keeps an average of a slot."""
        return "averaged" if any(f"{name}/{AVERAGE}" in self.outer for name in self.slots) else "trained"

    def judged(self) -> State:
        """Return the state that is evaluated, exported and served: with the averages of the slots that have one."""
        averages = {n: self.outer[f"{n}/{AVERAGE}"] for n in self.slots if f"{n}/{AVERAGE}" in self.outer}
        return replace(self, slots={**self.slots, **averages}) if averages else self

    def trained(self) -> State:
        """Return the trained values without the outer state: ``judged`` of the result is the result."""
        return replace(self, outer={})

    def theta(self, slots: Mapping[str, Slot]) -> dict[str, Parameters]:
        """Return θ in the form that algorithms use: slot → named tensors (views)."""
        return {name: slots[name].layout.unflatten(vector) for name, vector in self.slots.items()}

    def sha256(self) -> str:
        """Return the SHA-256 of every slot's name, dtype and bytes, in the order of names; without the outer state."""
        digest = hashlib.sha256()
        for name in sorted(self.slots):
            vector = self.slots[name].detach().cpu().contiguous()
            digest.update(f"{name}:{vector.dtype}:{vector.numel()}:".encode())
            digest.update(vector.view(torch.uint8).numpy().tobytes())
        return digest.hexdigest()


def is_finite(vector: Tensor) -> bool:
    """Return whether ``vector`` has neither NaN nor Inf.

    A finite sum proves finite terms, in one pass. A sum that is not finite can be an overflow, and needs a second pass.
    """
    if not vector.is_floating_point():
        return True
    return bool(torch.isfinite(vector.sum())) or bool(torch.isfinite(vector).all())


@dataclass(frozen=True)
class Contribution:
    """Sums over the tasks of one or more shards: Σ slot vectors, Σ weight, number of tasks, Σ metrics in float64.

    Slots and metrics are divided by ``weight`` once, after the last addition.
    """

    slots: Mapping[str, Tensor]
    weight: float
    tasks: int
    metrics: Mapping[str, float] = field(default_factory=dict)

    def __add__(self, other: Contribution) -> Contribution:
        return self._plus(other, torch.add)

    def absorb(self, other: Contribution) -> Contribution:
        """Return ``self + other``, with the same bits, in the memory of ``self``, which loses its value."""
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

    def mean(self, slot: str) -> Tensor:
        """Return the mean of a slot's vectors: their sum divided by the weight."""
        return self.slots[slot] / self.weight

    def scaled(self, factor: float) -> Contribution:
        """Return the contribution with every slot vector multiplied by ``factor``."""
        return replace(self, slots={n: v * factor for n, v in self.slots.items()})

    def is_finite(self) -> bool:
        """Return whether all slot vectors are free of NaN and Inf."""
        return all(map(is_finite, self.slots.values()))


@dataclass(frozen=True)
class Records:
    """Columns with one row per task (or step): name → [rows, …]. Shards are concatenated in order, never summed."""

    columns: Mapping[str, Tensor]

    @property
    def rows(self) -> int:
        """The number of rows."""
        return next(iter(self.columns.values())).shape[0] if self.columns else 0

    def part(self, rows: slice | Tensor) -> Records:
        """Return the rows that a slice, or a mask [rows], selects."""
        return Records({name: column[rows] for name, column in self.columns.items()})

    @staticmethod
    def concatenate(parts: Sequence[Records]) -> Records:
        """Return the rows of all ``parts``, in order."""
        return Records({n: torch.cat([p.columns[n] for p in parts]) for n in parts[0].columns})


class TreeSum(Generic[T]):
    """A sum over the balanced binary tree with leaves 0 … count−1, which may arrive in any order.

    Neighbours (0,1), (2,3), … are added, then their sums, level by level; an odd last node moves up unchanged. The
    shape depends only on ``count``, so the floating-point result does not depend on the worker that computed a leaf,
    or on the order of arrival. A node covers 2^k leaves from a multiple of 2^k on (fewer at the end); a separate
    ``TreeSum`` over these leaves gives the same sum for the node.
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
        """Add leaf ``index``, or the sum ``value`` of the ``leaves`` leaves that start there.

        Raises ValueError for a leaf that is out of range or arrived before, and for leaves that are not one node.
        """
        level, end = (leaves - 1).bit_length(), index + leaves
        for leaf in range(index, end):
            if not 0 <= leaf < self.count:
                raise ValueError(f"leaf {leaf} is not one of {self.count}")
            if leaf in self._seen:
                raise ValueError(f"leaf {leaf} arrived twice")
        if leaves < 1 or index % (1 << level) or (leaves != 1 << level and end != self.count):
            raise ValueError(f"{leaves} leaves from {index} on are not a node of the tree over {self.count} leaves")
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
        """Return the sum. Raise ValueError where leaves are missing."""
        if len(self._seen) < self.count:
            missing = sorted(set(range(self.count)) - self._seen)
            raise ValueError(f"{len(missing)} of {self.count} leaves are missing: {missing[:8]}")
        return self._waiting[len(self._widths) - 1, 0]
