"""The protocol between the scheduler and whatever computes shards. The loop can't tell executors apart."""

from __future__ import annotations

from collections.abc import Callable, Generator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal, Protocol, Union

from metadist.core.engine import Engine
from metadist.core.state import Contribution, Records, State

Result = Union[Contribution, Records]
Setting = Union[None, bool, int, float, str]
"""A value that the shards of a round are given by name."""
OutputKey = tuple[int, int, int]
"""(meta-step, round, shard): names the cached output of a shard that a later round needs."""


@dataclass(frozen=True)
class WithOutput:
    """What a shard that ``keeps`` comes to: its result, and an output that stays with the workers."""

    result: Contribution
    output: Records


@dataclass(frozen=True)
class Shard:
    """The unit of work, of retry and of reduction: tasks [start, start + count) of one split under one θ.

    Or a block: the sum of several shards from ``index`` on, a node of the canonical tree, that one worker computes one after the other.
    """

    run: str
    meta_step: int
    round: int
    index: int
    function: str
    start: int
    count: int
    seed: int
    split: str = "train"
    #: the meta-step that keys the tasks (validation and test tasks are the same at every evaluation)
    key_step: int = 0
    role: str = "learner"
    needs: tuple[OutputKey, ...] = ()
    settings: tuple[tuple[str, Setting], ...] = ()
    #: whether it has an output besides its result, that later rounds need
    keeps: bool = False
    #: how many tasks each shard of a block has (the last may have fewer); 0 where it is one shard
    leaf: int = 0

    @property
    def leaves(self) -> int:
        """How many shards it is the sum of."""
        return -(-self.count // self.leaf) if self.leaf else 1

    def each(self) -> tuple[Shard, ...]:
        """The shards of a block, as they were before; itself where it is none."""
        if not self.leaf:
            return (self,)
        end = self.start + self.count
        starts = range(self.start, end, self.leaf)
        return tuple(
            replace(self, index=self.index + i, start=start, count=min(self.leaf, end - start), leaf=0)
            for i, start in enumerate(starts)
        )

    @property
    def key(self) -> OutputKey:
        """What its output is called."""
        return self.meta_step, self.round, self.index

    def __str__(self) -> str:
        last = self.start + self.count - 1
        tasks = f"task {self.start}" if self.count == 1 else f"tasks {self.start}…{last}"
        which = f"shards {self.index}…{self.index + self.leaves - 1}" if self.leaf else f"shard {self.index}"
        return f"meta-step {self.meta_step}, round {self.round}, {which} ({self.split} {tasks}, seed {self.seed})"


@dataclass(frozen=True)
class Round:
    """Shards that are computed under one θ.

    Where ``reduce`` is true, the shards return contributions, and the result of the round is their canonical sum. Otherwise the
    shards return records, and the result is their concatenation in shard order.
    """

    index: int
    parameters: State
    shards: Sequence[Shard]
    reduce: bool = True


Report = dict[str, float]
"""Metrics of one meta-step by name, for plots."""

Rounds = Generator[Round, Contribution, "tuple[State, Report]"]
"""The rounds of one meta-step. The generator is sent the sum of each round, and returns the new state and the report."""


def run_rounds(rounds: Rounds, run: Callable[[Round], Contribution]) -> tuple[State, Report]:
    """Run each round of a meta-step with ``run``, send its sum back, and return the new state and the report."""
    try:
        round = next(rounds)
        while True:
            round = rounds.send(run(round))
    except StopIteration as done:
        state, report = done.value
        return state, report


@dataclass(frozen=True)
class MetaStepKey:
    """Names one meta-step: the run's id and seed, and the number of meta-steps before it."""

    run: str
    meta_step: int
    seed: int


@dataclass(frozen=True)
class EvaluationRequest:
    """Which tasks judge the θ of ``key``: ``tasks`` tasks of ``split``, after ``inner_steps`` adaptation steps.

    Where ``inner_steps`` is None, the algorithm's own number applies.
    """

    key: MetaStepKey
    split: str
    tasks: int
    inner_steps: int | None = None


@dataclass(frozen=True)
class Finished:
    """A shard's result, as it arrived, in memory that is the receiver's to spend. ``stats`` are the worker's own measurements
    (seconds, bytes, memory)."""

    shard: Shard
    attempt: int
    worker: str
    result: Result
    stats: dict[str, float] = field(default_factory=dict)


@dataclass(frozen=True)
class Failed:
    """A shard that came to nothing: ``lost`` with its worker, ``rejected`` at the border, an ``error`` in the task code, or
    ``missing`` outputs that it needs (``missing`` names those to be computed anew; none where asking again is enough)."""

    shard: Shard
    attempt: int
    worker: str
    kind: Literal["lost", "rejected", "error", "missing"]
    message: str
    tasks: tuple[int, ...] = ()
    #: False where the shard was merely queued behind the one that its worker died of
    guilty: bool = True
    #: the traceback, for a file; ``message`` is for people
    detail: str = ""
    missing: tuple[OutputKey, ...] = ()


Event = Union[Finished, Failed]


class HasEngine(Protocol):
    """A plan of a run."""

    @property
    def engine(self) -> Engine: ...


class Executor(Protocol):
    """Runs shards. Never blocks for longer than ``wait``'s timeout, and never raises for a worker's failure.

    ``plan.engine`` is the engine that every worker computes with. ``blocks``: whether results travel, so that the one sum of
    several shards is worth asking for.
    """

    plan: HasEngine | None
    blocks: bool

    def publish(self, meta_step: int, round: int, state: State) -> int:
        """Make θ available to every worker, for shards of this round; returns the bytes published.

        Round 0 begins anew: outputs and θs of what came before are dropped. Until then outputs are kept, and with them the θ
        of the rounds that they come from, so that shards of such a round may be submitted again.
        """
        ...

    def capacity(self, role: str) -> int:
        """How many more shards of ``role`` can be submitted now."""
        ...

    def submit(self, shard: Shard, attempt: int) -> None: ...

    def cancel(self, shard: Shard, attempt: int) -> None:
        """Forget an attempt; if it is hanging, its worker is recycled."""
        ...

    def wait(self, timeout: float) -> list[Event]:
        """Events since the last call; empty after ``timeout`` seconds without one."""
        ...

    def shortage(self) -> str:
        """What was asked for and what there is, for a message when no worker is to be had."""
        ...

    def workers(self) -> dict[str, dict[str, Any]]:
        """Alive workers: name → {role, device, fingerprint, pid, …}."""
        ...

    def cannot_resize(self, role: str, count: int) -> str | None:
        """Why there can't be ``count`` workers of ``role``, if there can't. May be called from any thread."""
        ...

    def resize(self, role: str, count: int) -> None:
        """Go on with ``count`` workers of ``role``. Nothing waits for new ones; what those that go had in flight is lost."""
        ...

    def kill_busy(self) -> str | None:
        """Kill a worker that has a shard in flight and return its name; None where there is none to kill."""
        ...

    def close(self) -> None: ...
