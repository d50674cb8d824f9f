"""The rate of the outer optimiser by meta-step."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass


def _constant(lr: float, final: float, done: float) -> float:
    return lr


def _linear(lr: float, final: float, done: float) -> float:
    return final + (lr - final) * max(0.0, 1 - done)


def _cosine(lr: float, final: float, done: float) -> float:
    return final + (lr - final) * 0.5 * (1 + math.cos(math.pi * min(1.0, done)))


SCHEDULES: dict[str, Callable[[float, float, float], float]] = {
    "constant": _constant,
    "linear": _linear,
    "cosine": _cosine,
}
"""(first rate, last rate, part of the meta-steps done in [0, 1]) → rate."""


@dataclass(frozen=True)
class Schedule:
    """The rate by meta-step: a linear warm-up, then from ``lr`` to ``final_lr`` on the curve ``SCHEDULES[name]``.

    Meta-step t of the ``warmup`` first ones has the rate ``lr`` · (t + 1) / ``warmup``; the curve takes the rest of the
    ``meta_steps``.
    """

    name: str
    lr: float
    final_lr: float
    meta_steps: int
    warmup: int = 0

    def rate(self, lr: float, meta_step: int) -> float:
        """Return the rate at ``meta_step`` (from 0) of a slot whose rate after the warm-up is ``lr``.

        The ratio of last to first rate is the same for all slots.
        """
        if meta_step < self.warmup:
            return lr * ((meta_step + 1) / self.warmup)
        final = lr * (self.final_lr / self.lr if self.lr else 0.0)
        return SCHEDULES[self.name](lr, final, (meta_step - self.warmup) / max(1, self.meta_steps - self.warmup))
