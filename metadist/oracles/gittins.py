"""Compute Gittins indices: an arm's value, including the information from its pulls (J. R. Stat. Soc. B 1979)."""

from __future__ import annotations

import math
from functools import lru_cache

import torch
from torch import Tensor


@lru_cache(maxsize=8)
def bernoulli_index(pulls: int, discount: float, grid: int = 401) -> Tensor:
    """Compute the index of an arm after s successes and f failures from Beta(1, 1): float64 [pulls, pulls] at [s, f].

    Entries with s + f < pulls are defined. The index is found by calibration (Gittins, Glazebrook & Weber,
    "Multi-armed bandit allocation indices", 2011, §1.6): it is the constant reward λ per pull for which further pulls
    and λ for ever have equal values. The recursion goes backwards from a number of pulls after which rewards count
    little, for all λ of a grid together; between neighbours of the grid the advantage of pulling is nearly linear.
    """
    charge = torch.linspace(0, 1, grid, dtype=torch.float64)
    depth = pulls + math.ceil(3 / (1 - discount))
    s = torch.arange(depth + 1, dtype=torch.float64).unsqueeze(1)
    advantage = ((s + 1) / (depth + 2) - charge) / (1 - discount)  # the mean counts as known there
    index = torch.zeros(pulls, pulls, dtype=torch.float64)
    for t in reversed(range(depth)):
        worth = advantage.clamp_(min=0)
        p = (s[: t + 1] + 1) / (t + 2)
        advantage = p - charge + discount * (p * worth[1:] + (1 - p) * worth[:-1])
        if t < pulls:
            rows = torch.arange(t + 1)
            last = (advantage > 0).sum(-1) - 1
            here, beyond = advantage[rows, last], advantage[rows, last + 1]
            index[rows, t - rows] = charge[last] + here / (here - beyond) / (grid - 1)
    return index


@lru_cache(maxsize=8)
def normal_index(pulls: int, discount: float, precision: float, grid: int = 801) -> Tensor:
    """Compute the index minus the posterior mean after n pulls, for normal rewards of variance 1: float64 [pulls].

    The prior's precision is ``precision``. The difference depends on n alone (Gittins et al. 2011, §8.2), so a constant
    reward of 0 suffices: the difference is minus the lowest mean for which a pull is worth as much as 0. The recursion
    goes backwards over means in units of the posterior's deviation.
    """
    depth = pulls + math.ceil(3 / (1 - discount))
    z = torch.linspace(-6, 6, grid, dtype=torch.float64)
    steps = torch.linspace(-4, 4, 41, dtype=torch.float64)
    weights = (-0.5 * steps.square()).softmax(0)
    worth = z.clamp(min=0) / (precision + depth) ** 0.5 / (1 - discount)  # the mean counts as known there
    distance = torch.zeros(pulls, dtype=torch.float64)
    for n in reversed(range(depth)):
        known = precision + n
        following = z.unsqueeze(1) * ((known + 1) / known) ** 0.5 + steps / known**0.5
        place = ((following + 6) * ((grid - 1) / 12)).clamp(min=0)
        left = place.long().clamp(max=grid - 2)  # above the grid, worth is linear
        ahead = torch.lerp(worth[left], worth[left + 1], place - left)
        advantage = z / known**0.5 + discount * (ahead * weights).sum(1)
        if n < pulls:
            last = int((advantage < 0).sum()) - 1
            here, beyond = advantage[last], advantage[last + 1]
            distance[n] = -(z[last] - here / (beyond - here) * (12 / (grid - 1))) / known**0.5
        worth = advantage.clamp(min=0)
    return distance
