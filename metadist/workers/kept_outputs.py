"""What the later rounds of a meta-step may ask for."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Generic, TypeVar

from metadist.core.round import OutputKey, Shard

Theta = TypeVar("Theta")
Output = TypeVar("Output")


@dataclass
class Kept(Generic[Theta, Output]):
    """The outputs of shards that keep them, and the θ of every round that has some: a lost one is computed anew under it."""

    thetas: dict[int, Theta] = field(default_factory=dict)
    outputs: dict[OutputKey, Output] = field(default_factory=dict)
    _rounds: set[int] = field(default_factory=set)

    def publish(self, round: int, theta: Theta) -> None:
        """Round 0 drops everything; any round drops the θs that no output comes from."""
        if round == 0:
            self._rounds.clear()
            self.outputs.clear()
        self.thetas = {r: t for r, t in self.thetas.items() if r in self._rounds}
        self.thetas[round] = theta

    def hold(self, round: int) -> None:
        """Keep this round's θ although its outputs may all lie elsewhere."""
        self._rounds.add(round)

    def keep(self, shard: Shard, output: Output) -> None:
        self.hold(shard.round)
        self.outputs[shard.key] = output

    def lacking(self, shard: Shard) -> tuple[OutputKey, ...]:
        """Those that ``shard`` needs and that are not there."""
        return tuple(key for key in shard.needs if key not in self.outputs)
