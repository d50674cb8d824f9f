"""Compute the exact Bayes-optimal policy of a small Bernoulli bandit, by dynamic programming over beliefs."""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import Tensor

from metadist.core.errors import ConfigError
from metadist.core.random import seeded

#: the largest number of states; 2,000,000 take seconds and some hundred MB
LIMIT = 3_000_000


@dataclass(frozen=True)
class Codes:
    """The pasts of an arm, (successes, failures), as numbers.

    For each past: the ``mean`` of its posterior, the past after a win, the past after a loss, and 64 random bits. A
    state is the multiset of its arms' pasts; the sum of their bits identifies it, because arms are exchangeable.
    """

    mean: Tensor
    win: Tensor
    lose: Tensor
    bits: Tensor

    @classmethod
    def of(cls, pulls: int) -> Codes:
        """Return the pasts of at most ``pulls`` pulls."""
        t = torch.arange(pulls + 1).repeat_interleave(torch.arange(1, pulls + 2))
        s = torch.cat([torch.arange(n + 1) for n in range(pulls + 1)])
        lose = (t + 1) * (t + 2) // 2 + s
        high, low = torch.randint(0, 1 << 32, (2, len(t)), generator=seeded(0, "states of a bandit"))
        return cls((s + 1).double() / (t + 2), lose + 1, lose, (high << 32) | low)


@dataclass(frozen=True)
class Solution:
    """A solved bandit: ``layers[w]`` has the states after w pulls, as sorted sums, and their values."""

    arms: int
    codes: Codes
    layers: list[tuple[Tensor, Tensor]]

    @property
    def value(self) -> float:
        """Return the expected return of a trial."""
        return float(self.layers[0][1])

    def worth(self, w: int, pasts: Tensor) -> Tensor:
        """Return the value of pulling each arm after w pulls: pasts [B, arms] → float64 [B, arms]."""
        codes = self.codes
        mean = codes.mean[pasts]
        if w + 1 == len(self.layers):
            return mean
        own = codes.bits[pasts]
        # With more arms than pulls some are never pulled, and the solution leaves out as many of these as it can.
        rest = own.sum(1, keepdim=True) - (own.shape[1] - self.arms) * codes.bits[0] - own
        sums, values = self.layers[w + 1]
        won, lost = (
            values[torch.searchsorted(sums, rest + codes.bits[after[pasts]])] for after in (codes.win, codes.lose)
        )
        return mean * (1 + won) + (1 - mean) * lost


@lru_cache(maxsize=4)
def solve(arms: int, pulls: int) -> Solution:
    """Solve Bellman's equation over beliefs, from Beta(1, 1) for every arm.

    Raises ConfigError where there are more than ``LIMIT`` states.
    """
    expected = count_states(min(arms, pulls), pulls)
    if expected is None:
        raise ConfigError(
            f"optimal: {arms} arms and {pulls} pulls have more than {LIMIT:,} states of belief; expected fewer "
            "(10 pulls of any number of arms, 20 of 5, 100 of 2); 'gittins' comes close"
        )
    arms, codes = min(arms, pulls), Codes.of(pulls)
    states = [torch.zeros(1, arms, dtype=torch.int32)]
    sums = [codes.bits[:1] * arms]
    for w in range(pulls - 1):
        found, parents, columns, wins = _children(codes, states[w], sums[w])
        children = states[w][parents]
        old = children.gather(1, columns.unsqueeze(1)).long()
        children.scatter_(
            1, columns.unsqueeze(1), torch.where(wins.unsqueeze(1), codes.win[old], codes.lose[old]).int()
        )
        assert len(found) == expected[w + 1], "two states share their 64 bits"
        states.append(children)
        sums.append(found)
    solution = Solution(arms, codes, [(s, s) for s in sums])
    for w in reversed(range(pulls)):
        values = [solution.worth(w, part.long()).amax(1) for part in states[w].split(100_000)]
        solution.layers[w] = (sums[w], torch.cat(values))
    return solution


def _children(codes: Codes, states: Tensor, sums: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return the states after one more pull: sorted sums, and for each a parent's number, an arm and whether it won."""
    own = codes.bits[states]
    rest = sums.unsqueeze(1) - own
    reached = torch.stack((rest + codes.bits[codes.lose[states]], rest + codes.bits[codes.win[states]]), -1)
    found, order = reached.flatten().sort()
    new = torch.ones_like(found, dtype=torch.bool)
    new[1:] = found[1:] != found[:-1]
    first = order[new]
    return found[new], first // (2 * states.shape[1]), first // 2 % states.shape[1], first % 2 == 1


@lru_cache(maxsize=64)
def count_states(arms: int, pulls: int) -> list[int] | None:
    """Count the states after 0 … pulls − 1 pulls; return None where their sum is above ``LIMIT``.

    A state is a multiset of at most ``arms`` pasts other than (0, 0); there are m + 1 pasts with m pulls.
    """
    table = [[1] + [0] * (pulls - 1)] + [[0] * pulls for _ in range(arms)]
    for m in range(1, pulls):
        for _ in range(m + 1):
            for k in range(1, arms + 1):
                for w in range(m, pulls):
                    table[k][w] += table[k - 1][w - m]
        if sum(map(sum, table)) > LIMIT:
            return None
    return [sum(row[w] for row in table) for w in range(pulls)]
