"""Confidence intervals of means over tasks that were drawn, listed, or made from few sources."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import torch
from torch import Tensor


@dataclass(frozen=True)
class Sampling:
    """The way in which the tasks of an evaluation were chosen: the reason for their confidence interval.

    ``sources`` [tasks, sources of a task] numbers the fields, classes, … that the tasks are drawn from; None where
    every task is a draw of its own. ``listed`` is the number of tasks where they are a list, each taken once.
    """

    tasks: int
    sources: Tensor | None = None
    listed: int | None = None

    def part(self, rows: Tensor) -> Sampling:
        """Return the sampling of the tasks that a mask [tasks] selects."""
        return self if self.sources is None else replace(self, sources=self.sources[rows])

    def half_width(self, values: Tensor) -> Tensor:
        """Return half the 95 % confidence interval of the mean of ``values`` [tasks, …] over the tasks; NaN for one.

        Over tasks that were drawn: 1.96 standard errors. Over listed tasks: Student's t. Over sources that are fewer
        than the tasks: Student's t and the error that tasks with common sources give, never below that of tasks.
        """
        count = values.shape[0]
        if self.independent or count == 1:
            return over_tasks(values)
        return self.error(values) * student_t((self.distinct if self.by_source else count) - 1)

    def error(self, values: Tensor) -> Tensor:
        """Return the standard error of the mean of ``values`` [tasks, columns] over the tasks; NaN for one task."""
        count = values.shape[0]
        if count == 1:
            return torch.full_like(values[0], math.nan)
        error = values.std(0) / math.sqrt(count)
        if self.sources is None or not self.by_source:
            return error
        return torch.maximum(error, _clustered(values, self.sources))

    @property
    def independent(self) -> bool:
        """Whether the interval is that of independent draws."""
        return self.listed is None and not self.by_source

    @property
    def by_source(self) -> bool:
        """Whether the interval is one over sources: more than those of one task, and fewer than the tasks."""
        return self.sources is not None and self.sources.shape[1] < self.distinct < self.tasks

    @property
    def distinct(self) -> int:
        """The number of different sources."""
        return 0 if self.sources is None else len(self.sources.unique())

    def described(self) -> str:
        """Return the interval in words, for a protocol."""
        if self.sources is not None and self.distinct < self.tasks:
            if self.by_source:
                return f"over {self.distinct} sources (Student's t)"
            return f"over tasks, all of the same {self.distinct} sources: it says nothing about other sources"
        if self.listed is not None:
            return f"over tasks, each of {self.tasks} once (Student's t)"
        return "over tasks"


def over_tasks(values: Tensor) -> Tensor:
    """Return 1.96 standard errors of the mean of ``values`` [tasks, …] over independent tasks; NaN for one task."""
    count = values.shape[0]
    deviation = values.std(0) if count > 1 else torch.full_like(values[0], math.nan)
    return 1.96 * deviation / math.sqrt(count)


def _clustered(values: Tensor, sources: Tensor) -> Tensor:
    """Return the standard error of the mean of ``values`` [tasks, columns] whose tasks share ``sources`` [tasks, m].

    The covariances of all pairs of tasks with a common source are summed, with the factor G / (G − 1) for G sources
    (Liang & Zeger 1986; for several sources of a task: Aronow, Samii & Assenova 2015, eq. 3, where a pair counts once
    for each common source).
    """
    distinct, place = sources.unique(return_inverse=True)
    member = torch.zeros(len(sources), len(distinct), dtype=values.dtype).scatter_(1, place, 1)
    centred = values - values.mean(0)
    own = (centred.square() * (member.sum(1) - 1).unsqueeze(1)).sum(0)  # a task is no pair with itself, m times over
    variance = ((member.T @ centred).square().sum(0) - own) / len(values) ** 2
    return (variance.clamp(min=0) * len(distinct) / (len(distinct) - 1)).sqrt()


def student_t(freedom: int, level: float = 0.95) -> float:
    """Return t such that a Student-t variable lies within ± t with probability ``level``.

    Bisection of the distribution function (Abramowitz & Stegun 1964, 26.7.3 and 26.7.4).
    """
    low, high = 0.0, math.pi / 2
    for _ in range(60):
        angle = (low + high) / 2
        low, high = (angle, high) if _within(angle, freedom) < level else (low, angle)
    return math.tan(low) * math.sqrt(freedom)


def _within(angle: float, freedom: int) -> float:
    """Return the probability that |t| ≤ tan(``angle``) · √``freedom``."""
    cosine, odd = math.cos(angle), freedom % 2
    term, total = (cosine if odd else 1.0), 0.0
    for power in range(odd, freedom - 1, 2):
        total += term
        term *= cosine**2 * (power + 1) / (power + 2)
    total *= math.sin(angle)
    return 2 / math.pi * (angle + total) if odd else total
