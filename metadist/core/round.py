"""Shards, rounds, and the protocol of executors. The loop cannot tell executors apart."""

from __future__ import annotations

from collections.abc import Callable, Generator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal, Protocol, Union

from metadist.core.computation import Computation
from metadist.core.engine import Engine
from metadist.core.state import Contribution, Records, State

Result = Union[Contribution, Records]
OutputKey = tuple[int, int, int]
"""(meta-step, round, shard): names the cached output of a shard that a later round needs."""
RoundKey = tuple[int, int]
"""(meta-step, round): names the θ of a round."""


@dataclass(frozen=True)
class WithOutput:
    """The result of a shard that ``keeps`` an output, and the output, which stays with the workers."""

    result: Contribution
    output: Records


@dataclass(frozen=True)
class Shard:
    """The unit of work, of retry and of reduction: ``computation`` for tasks [start, start + count) under one θ.

    A block is the sum of several shards from ``index`` on, a node of the canonical tree. One worker computes its
    shards in turn.
    """

    run: str
    meta_step: int
    round: int
    index: int
    computation: Computation
    start: int
    count: int
    seed: int
    split: str = "train"
    #: the meta-step that keys the tasks (validation and test tasks are the same at every evaluation)
    key_step: int = 0
    role: str = "learner"
    needs: tuple[OutputKey, ...] = ()
    #: whether later rounds need an output of this shard besides its result
    keeps: bool = False
    #: tasks in each shard of a block (the last shard may have fewer); 0 for a single shard
    leaf: int = 0

    @property
    def function(self) -> str:
        """The name of the computation, in messages and metrics."""
        return self.computation.name

    @property
    def carries(self) -> bool:
        """Whether the output is a state that the next meta-step needs."""
        return self.computation.carries

    @property
    def counts(self) -> bool:
        """Whether its tasks are new ones: not those of an earlier round of the meta-step, or of states in a folder."""
        return self.computation.reads_theta and (self.carries or not self.needs)

    @property
    def of_round(self) -> RoundKey:
        """The round that the shard belongs to."""
        return self.meta_step, self.round

    @property
    def leaves(self) -> int:
        """The number of shards in a block; 1 for a single shard."""
        return -(-self.count // self.leaf) if self.leaf else 1

    def each(self) -> tuple[Shard, ...]:
        """Return the shards of a block; a single shard returns itself."""
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
        """The name of the shard's output."""
        return self.meta_step, self.round, self.index

    def __str__(self) -> str:
        last = self.start + self.count - 1
        tasks = f"task {self.start}" if self.count == 1 else f"tasks {self.start}…{last}"
        which = f"shards {self.index}…{self.index + self.leaves - 1}" if self.leaf else f"shard {self.index}"
        return f"meta-step {self.meta_step}, round {self.round}, {which} ({self.split} {tasks}, seed {self.seed})"


@dataclass(frozen=True)
class Round:
    """Shards that are computed under one θ.

    Where ``reduce`` is true, the shards return contributions, and the result of the round is their canonical sum.
    Otherwise the shards return records, and the result is their concatenation in shard order.
    """

    index: int
    parameters: State
    shards: Sequence[Shard]
    reduce: bool = True


Report = dict[str, float]
"""Metrics of one meta-step by name, for plots."""

Rounds = Generator[Round, Contribution, "tuple[State, Report]"]
"""The rounds of one meta-step.

The generator is sent the sum of each round, and returns the new state and the report.
"""


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
    """A shard's result.

    Its memory belongs to the receiver. ``stats`` are the worker's measurements (seconds, bytes, memory).
    """

    shard: Shard
    attempt: int
    worker: str
    result: Result
    stats: dict[str, float] = field(default_factory=dict)


@dataclass(frozen=True)
class Failed:
    """A shard without a result: ``lost`` with its worker, ``rejected`` by a check, an ``error`` in the task code, or
    ``missing`` outputs.

    ``missing`` names the outputs to compute again; it is empty where another attempt is enough.
    """

    shard: Shard
    attempt: int
    worker: str
    kind: Literal["lost", "rejected", "error", "missing"]
    message: str
    tasks: tuple[int, ...] = ()
    #: False where the worker died of another shard and this one only waited in its queue
    guilty: bool = True
    #: the traceback, for a file; ``message`` is for the user
    detail: str = ""
    missing: tuple[OutputKey, ...] = ()


Event = Union[Finished, Failed]


WorkerFacts = dict[str, Any]
"""Facts about a worker: name, role, device, host, pid, fingerprint, compile_seconds, data_sha256."""


class HasEngine(Protocol):
    """A plan of a run."""

    @property
    def engine(self) -> Engine: ...


class Executor(Protocol):
    """Runs shards. Never blocks for longer than ``wait``'s timeout, and never raises for a worker's failure.

    ``plan.engine`` is the engine of every worker. ``blocks``: whether results cross a process border, so that one sum
    of several shards saves messages.
    """

    plan: HasEngine | None
    blocks: bool

    def publish(self, meta_step: int, round: int, state: State) -> int:
        """Make θ available to every worker for the shards of this round, and return the number of bytes published.

        Round 0 drops the outputs and the θs of earlier meta-steps. Until then outputs are kept together with the θ of
        their rounds, so that shards of those rounds can be submitted again. States (outputs of shards that ``carries``)
        of the meta-step before are kept too, and the θ of their rounds until ``release``.
        """
        ...

    def release(self, meta_step: int) -> None:
        """Drop the θs from which states of meta-steps before ``meta_step`` were computed: those can be loaded."""
        ...

    def capacity(self, role: str) -> int:
        """Return the number of further shards of ``role`` that can be submitted now."""
        ...

    def near(self, shard: Shard) -> bool:
        """Return whether a worker with room holds all outputs that ``shard`` needs."""
        ...

    def submit(self, shard: Shard, attempt: int) -> None:
        """Start an attempt at a shard."""
        ...

    def cancel(self, shard: Shard, attempt: int) -> None:
        """Forget an attempt, and recycle its worker where the attempt hangs."""
        ...

    def wait(self, timeout: float) -> list[Event]:
        """Return the events since the last call; an empty list after ``timeout`` seconds without one."""
        ...

    def shortage(self) -> str:
        """Describe the requested and the available workers, for the message that no worker is available."""
        ...

    def workers(self) -> dict[str, WorkerFacts]:
        """Return the facts about every living worker by name."""
        ...

    def cannot_resize(self, role: str, count: int) -> str | None:
        """Return why ``count`` workers of ``role`` are impossible, or None. Any thread may call it."""
        ...

    def resize(self, role: str, count: int) -> None:
        """Continue with ``count`` workers of ``role``.

        New ones start in the background; removed ones lose their shards.
        """
        ...

    def kill_busy(self) -> str | None:
        """Kill a worker that has a shard in flight and return its name; None where there is none to kill."""
        ...

    def close(self) -> None:
        """End all workers."""
        ...
