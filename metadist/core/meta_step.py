"""The meta-step of an algorithm as its rounds, on the driver: sum, publish, update."""

from __future__ import annotations

from collections.abc import Callable, Generator, Mapping, Sequence
from dataclasses import dataclass, field, replace

from torch import Tensor

from metadist.core.computation import Computation, Gradient, StageSum
from metadist.core.outer import OuterLoop
from metadist.core.round import Report, Round, Shard
from metadist.core.state import Contribution, Slot, State

Asked = Generator[Round, Contribution, Contribution]
"""A round that is asked for: yields it, receives its sum, and returns the sum."""


@dataclass
class MetaStep:
    """A meta-step in progress: ``state`` and ``report``, which its rounds change.

    ``shards`` makes the shards of a round from its computation. All rounds of a meta-step see the same tasks.
    """

    meta_step: int
    state: State
    slots: Mapping[str, Slot]
    outer: OuterLoop
    shards: Callable[[Computation], Sequence[Shard]]
    report: Report = field(default_factory=dict)
    round: int = 0

    def __getitem__(self, slot: str) -> Tensor:
        """Return the vector of ``slot`` [numel]."""
        return self.state.slots[slot]

    def sum(self, stage: str | None = None, /, **published: Tensor) -> Asked:
        """Yield a round and return the sum of its contributions over the meta-batch: ``total = yield from …``.

        ``stage`` is one of the algorithm's stages; None: the algorithm itself. The workers compute under the current
        state, in which vectors of ``published`` replace those of the slots with their names, in this round alone. The
        means of the round's metrics enter the report, after the first round as ``STAGE/METRIC``.
        """
        values = {n: v.to(self.slots[n].layout.dtype) for n, v in published.items()}
        theta = replace(self.state, slots={**self.state.slots, **values}) if values else self.state
        shards = self.shards(Gradient() if stage is None else StageSum(stage))
        number, self.round = self.round, self.round + 1
        total = yield Round(number, theta, [replace(shard, round=number) for shard in shards])
        if total.weight:
            means = {n: v / total.weight for n, v in total.metrics.items()}
            self.report.update(means if not number else {f"{stage}/{n}": v for n, v in means.items()})
        return total

    def update(self, total: Contribution) -> None:
        """Update the slots of ``total``: θ ← outer(θ, Σ contributions / Σ weights)."""
        slots = {name: slot for name, slot in self.slots.items() if name in total.slots}
        self.state, measured = self.outer.update(slots, self.state, total, self.meta_step)
        several = set(total.slots) != {n for n, slot in self.slots.items() if slot.rule != "constant"}
        name = "model" if "model" in total.slots else next(iter(total.slots))
        prefix = f"{name}/" if several and name != "model" else ""
        self.report.update({f"{prefix}{n}": value for n, value in measured.items()})

    def rate(self, slot: str) -> float:
        """Return the outer rate of ``slot`` at this meta-step."""
        settings = self.outer.settings(slot, self.slots[slot])
        return settings.schedule.rate(settings.group.lr, self.meta_step)
