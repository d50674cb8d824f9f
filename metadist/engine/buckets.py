"""Choose the few sizes to which the tasks of compiled shards are padded, where tasks differ in size.

A graph serves one shape. The *bucket* of a task, its padded (support, query) rows, is a function of the task's own rows
alone. The buckets are those few sizes that add the least expected computation over all sizes that a family can draw.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from metadist.core.algorithm import Algorithm
from metadist.core.task import Task, TaskFamily, with_rows
from metadist.core.tree import first

#: graphs that the shards of one run may need
MOST = 6
#: numbers of rows that a bucket is chosen from, for each of the two sets
CANDIDATES = 32

_NEVER = 1 << 50


@dataclass(frozen=True)
class Buckets:
    """The padded (support, query) rows of tasks.

    A support row costs ``support_cost`` query rows. Where ``sizes`` is empty, because the family does not state its
    possible sizes, a bucket has powers of two.
    """

    sizes: tuple[tuple[int, int], ...]
    support_cost: int

    @classmethod
    def of(cls, family: TaskFamily, algorithm: Algorithm) -> Buckets:
        """Return the buckets of the training tasks of ``family``, at most ``MOST``."""
        # A support row is passed once by each inner step; second order passes it about once more.
        cost = max(1, algorithm.inner_steps * (1 if algorithm.first_order else 2))
        possible = family.possible_sizes("train")
        return cls(_chosen(possible, cost) if possible else (), cost)

    def rows(self, support: int, query: int) -> tuple[int, int]:
        """Return the cheapest bucket that holds so many rows."""
        holding = [size for size in self.sizes if size[0] >= support and size[1] >= query]
        if not holding:
            return 1 << (support - 1).bit_length(), 1 << (query - 1).bit_length()
        return min(holding, key=lambda size: (self.support_cost * size[0] + size[1], size))

    @property
    def largest(self) -> tuple[int, int] | None:
        """The largest bucket, which holds every possible size; None where these are unknown."""
        return (max(s for s, _ in self.sizes), max(q for _, q in self.sizes)) if self.sizes else None

    def pad(self, tasks: Task) -> Task:
        """Return stacked ``tasks`` of one size in their bucket, with masks."""
        support, query = (first(e.y).shape[1] for e in (tasks.support, tasks.query))
        return with_rows(tasks, *self.rows(support, query))


def _chosen(possible: Sequence[tuple[int, int]], cost: int) -> tuple[tuple[int, int], ...]:
    """Choose sizes greedily, then exchange one of them at a time while the expected cost falls; in whole numbers."""
    stated = torch.tensor(possible)
    some = [_some(rows) for rows in stated.unbind(1)]
    # A candidate holds a size where it holds the size that is rounded up to the next numbers of rows among candidates.
    rounded = torch.stack([s[torch.searchsorted(s, rows.contiguous())] for s, rows in zip(some, stated.unbind(1))], 1)
    drawn, weight = rounded.unique(dim=0, return_counts=True)
    candidates = torch.cartesian_prod(*some)
    holds = (candidates.unsqueeze(1) >= drawn).all(-1)
    price = candidates[:, 0] * cost + candidates[:, 1]
    prices = torch.where(holds, price.unsqueeze(1), _NEVER // int(weight.sum()))  # [candidates, drawn sizes]

    def expected(chosen: list[int]) -> Tensor:
        """Return the expected price with each candidate added to ``chosen``: [candidates]."""
        totals: Tensor = (torch.minimum(prices, prices[chosen].amin(0)) * weight).sum(1)
        return totals

    chosen = [len(candidates) - 1]  # the largest support and query sets
    while len(chosen) < MOST:
        chosen.append(int(expected(chosen).argmin()))
    best, improved = int(expected(chosen[:-1])[chosen[-1]]), True
    while improved:
        improved = False
        for place in range(1, MOST):
            others = chosen[:place] + chosen[place + 1 :]
            totals = expected(others)
            if int(totals.min()) < best:
                best, improved = int(totals.min()), True
                chosen = [*others[:place], int(totals.argmin()), *others[place:]]
    return tuple(sorted({(int(s), int(q)) for s, q in candidates[chosen].tolist()}))


def _some(rows: Tensor) -> Tensor:
    """Return at most ``CANDIDATES`` of the different numbers of rows, the largest one among them."""
    different: Tensor = rows.unique()
    count = min(CANDIDATES, len(different))
    return different[torch.linspace(0, len(different) - 1, count).round().long()]
