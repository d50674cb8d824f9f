"""The update rounds of one meta-step of meta-reinforcement learning."""

from __future__ import annotations

from collections.abc import Generator, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace

import torch

from metadist.core.computation import Computation, Statistics
from metadist.core.outer import OuterLoop
from metadist.core.random import seeded
from metadist.core.round import Round, Shard
from metadist.core.state import Contribution, Slot, State

UPDATES = "updates"
"""Name in the outer state: the number of updates so far. Early stops make it differ from meta-steps × minibatches."""


@dataclass
class TrialMetaStep:
    """A meta-step in progress: its trials, its current state, and its update rounds.

    ``rolled`` are the shards of round 0, whose outputs later rounds need. ``statistics`` are the global rollout
    statistics that update rounds receive. ``report`` collects the metrics.
    """

    meta_step: int
    seed: int
    rolled: Sequence[Shard]
    statistics: Statistics
    state: State
    slots: Mapping[str, Slot]
    outer: OuterLoop
    report: dict[str, float]
    round: int = 0
    updates: int = 0
    _means: dict[str, tuple[float, float]] = field(default_factory=dict)

    def ask(
        self, computation: Computation, shards: Sequence[Shard], published: State | None = None
    ) -> Generator[Round, Contribution, Contribution]:
        """Yield a round of ``computation`` on the trials of ``shards`` and return its sum.

        Workers compute under the current state, or under ``published`` where it is given.
        """
        self.round += 1
        asked = [
            replace(
                shard,
                round=self.round,
                index=i,
                computation=computation,
                role="learner",
                keeps=False,
                needs=((self.meta_step, 0, shard.index),),
            )
            for i, shard in enumerate(shards)
        ]
        total = yield Round(self.round, self.state if published is None else published, asked)
        return total

    def descend(self, total: Contribution) -> None:
        """Update the state: θ ← outer(θ, Σ contributions / Σ weights)."""
        count = int(self.state.outer[UPDATES].item())
        bare = replace(self.state, outer={n: v for n, v in self.state.outer.items() if n != UPDATES})
        new, extra = self.outer.update(self.slots, bare, total, self.meta_step, count=count)
        self.updates += 1
        self.report.update(extra)
        self.state = replace(new, outer={**new.outer, UPDATES: torch.tensor([count + 1.0], dtype=torch.float64)})

    def minibatch_rounds(
        self, computation: Computation, epochs: int, minibatches: int, kl_limit: float | None = None
    ) -> Generator[Round, Contribution, None]:
        """Yield a round and make an update for every minibatch, until the mean KL divergence of one exceeds
        ``kl_limit``.
        """
        for number, shards in enumerate(self._minibatches(epochs, minibatches)):
            total = yield from self.ask(computation, shards)
            if not total.weight:  # every trial of these shards was left out
                continue
            self.descend(total)
            self.describe(total)
            kl = total.metrics.get("kl", 0.0) / total.weight
            if number == 0 and "kl" in total.metrics:
                self.report["first_kl"] = kl
            if kl_limit is not None and kl > kl_limit:
                return

    def _minibatches(self, epochs: int, minibatches: int) -> Iterator[list[Shard]]:
        """Yield minibatches of whole shards, in a new order every epoch, keyed by the meta-step."""
        generator = seeded(self.seed, f"minibatches/{self.meta_step}")
        for _ in range(epochs):
            order = torch.randperm(len(self.rolled), generator=generator)
            for part in order.tensor_split(minibatches):
                yield [self.rolled[i] for i in part.tolist()]

    def describe(self, total: Contribution) -> None:
        """Add the metrics of a round to the means in the report."""
        for name, value in total.metrics.items():
            seen, weight = self._means.get(name, (0.0, 0.0))
            self._means[name] = seen + value, weight + total.weight
            self.report[name] = (seen + value) / (weight + total.weight)
