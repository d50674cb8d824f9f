"""Submit shards to an executor, resubmit lost ones, and reduce the results in the canonical order."""

from __future__ import annotations

import logging
import math
import statistics
import time
from collections import Counter, defaultdict, deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from metadist.core.errors import WorkerError
from metadist.core.round import Event, Executor, Failed, Finished, OutputKey, Result, Round, Shard
from metadist.core.state import Contribution, Records, TreeSum, is_finite
from metadist.learners.base import Learner
from metadist.training.blocks import in_blocks

log = logging.getLogger(__name__)

#: a shard during which this many workers died is not submitted again
MAX_DEATHS = 3
#: a shard that failed this many times, each time with another message, is not submitted again
MAX_FAILURES = 5
#: an attempt is at least this old before an idle worker computes its shard as well
BACKUP_SECONDS = 3.0


@dataclass
class Measurements:
    """Sums since the last reading, and the newest measurements of every worker."""

    seconds: defaultdict[str, float] = field(default_factory=lambda: defaultdict(float))
    counts: Counter[str] = field(default_factory=Counter)
    workers: dict[str, dict[str, float]] = field(default_factory=dict)

    def read(self) -> Measurements:
        """Return the measurements since the last call, and clear them."""
        taken = Measurements(self.seconds.copy(), self.counts.copy(), dict(self.workers))
        for sums in (self.seconds, self.counts, self.workers):
            sums.clear()
        return taken


@dataclass
class _Progress:
    """A round in progress, together with shards of earlier rounds whose outputs were lost.

    ``open`` holds every shard without a result, ``left`` counts those of this round, and ``leaves`` is the size of the
    largest block.
    """

    round: Round
    pending: deque[Shard]
    open: set[Shard]
    left: int
    leaves: int
    #: shards that wait for lost outputs, with the keys of those
    waiting: dict[Shard, set[OutputKey]] = field(default_factory=dict)
    missed: Counter[Shard] = field(default_factory=Counter)
    deaths: Counter[Shard] = field(default_factory=Counter)
    messages: defaultdict[Shard, list[str]] = field(default_factory=lambda: defaultdict(list))
    blamed: defaultdict[Shard, list[str]] = field(default_factory=lambda: defaultdict(list))

    def wait_for(self, shard: Shard, producers: list[Shard]) -> None:
        """Submit ``producers`` next, and ``shard`` after them."""
        lost = [p for p in producers if p not in self.open]
        self.open.update(lost)
        self.pending.extendleft(lost)
        self.waiting[shard] = {p.key for p in producers}

    def finish(self, shard: Shard) -> bool:
        """Close ``shard``, release the shards that waited for its output alone, and return whether it is one of this
        round.
        """
        self.open.discard(shard)
        self.waiting.pop(shard, None)
        for other, keys in list(self.waiting.items()):
            keys.discard(shard.key)
            if not keys:
                del self.waiting[other]
                self.pending.appendleft(other)
        mine = self.is_mine(shard)
        self.left -= shard.leaves if mine else 0
        return mine

    def is_mine(self, shard: Shard) -> bool:
        """Return whether ``shard`` belongs to this round, and was not submitted again for its output alone."""
        return shard.of_round == self.round.shards[0].of_round

    def again(self, shard: Shard) -> None:
        """Submit a shard again; a block as single shards, which spread over the workers and fail one by one."""
        self.open.remove(shard)
        self.open.update(shard.each())
        self.pending.extendleft(reversed(shard.each()))


class Scheduler:
    """Runs rounds on an executor.

    After ``timeout`` seconds per shard an attempt counts as hung and its worker is recycled; an idle worker gets a
    backup attempt long before. ``patience`` seconds without any worker end the run with a WorkerError. ``on_failure``
    writes the traceback of a task and returns a hint for the message.
    """

    def __init__(
        self,
        executor: Executor,
        learner: Learner,
        *,
        timeout: float = 300.0,
        patience: float = 60.0,
        on_failure: Callable[[str], str] | None = None,
    ) -> None:
        self.executor, self._learner = executor, learner
        self._timeout, self._patience, self._on_failure = timeout, patience, on_failure
        #: seconds per shard, by function: a rollout may take a hundred times as long as a gradient
        self._durations: defaultdict[str, deque[float]] = defaultdict(lambda: deque(maxlen=64))
        #: seconds of computation per shard, by function and worker
        self._paces: defaultdict[tuple[str, str], deque[float]] = defaultdict(lambda: deque(maxlen=8))
        # Attempts without an answer. Those of earlier rounds stay: a worker whose backup was faster may hang.
        self._outstanding: dict[tuple[Shard, int], float] = {}
        # Of this meta-step: the shards that keep outputs, and the number of attempts of each shard.
        self._producers: dict[OutputKey, Shard] = {}
        self._attempts: Counter[Shard] = Counter()
        self.measured = Measurements()
        #: tasks, or rolled-out trials, whose contributions were summed since the start
        self.tasks_done = 0
        #: shards submitted again since the start, by cause
        self.retried: Counter[str] = Counter()
        #: the reason for the end of the run, for remote workers; empty where it broke off
        self.ended = ""

    def sum(self, round: Round) -> Contribution:
        """Publish the round's θ, compute its shards, and return their canonical sum."""
        total = self.run(round)
        assert isinstance(total, Contribution)
        return total

    def records(self, round: Round) -> Records:
        """Publish the round's θ, compute its shards, and return their records in shard order."""
        records = self.run(round)
        assert isinstance(records, Records)
        return records

    def run(self, round: Round) -> Result:
        """Run a round and return its sum, or its records where the round does not ``reduce``."""
        self._begin(round)
        began = time.perf_counter()
        bytes_out = self.executor.publish(round.shards[0].meta_step, round.index, round.parameters)
        self.measured.seconds["publish"] += time.perf_counter() - began
        self.measured.counts["bytes_published"] += bytes_out
        total: TreeSum[Contribution] = TreeSum(len(round.shards), Contribution.absorb)
        records: dict[int, Records] = {}
        shards = self._blocks(round)
        progress = _Progress(round, deque(shards), set(shards), len(round.shards), max(s.leaves for s in shards))
        began = idle_since = time.monotonic()
        while progress.left:
            self._submit(progress)
            events = self.executor.wait(0.25)
            for event in events:
                result = self._take(progress, event)
                if isinstance(result, Records):
                    records[event.shard.index] = result
                elif result is not None:
                    reducing = time.perf_counter()
                    total.add(event.shard.index, result, event.shard.leaves)
                    self.tasks_done += result.tasks if event.shard.counts else 0
                    self.measured.seconds["reduce"] += time.perf_counter() - reducing
            if events or self._outstanding:
                idle_since = time.monotonic()
            elif time.monotonic() - idle_since > self._patience:
                raise WorkerError(f"no worker for {self._patience:.0f} s: {self.executor.shortage()}")
            self._replace_slow_attempts(progress)
        self.measured.seconds["gather"] += time.monotonic() - began
        return total.result() if round.reduce else Records.concatenate([records[i] for i in range(len(round.shards))])

    def anchor(self, loads: Sequence[Shard]) -> None:
        """Compute lost states from those that ``loads`` read from now on: the θs from before are not needed."""
        self._producers = {shard.key: shard for shard in loads}
        self.executor.release(loads[0].meta_step + 1)

    def idle(self) -> None:
        """Let workers start between rounds. Late answers are dropped."""
        for event in self.executor.wait(0.0):
            self._outstanding.pop((event.shard, event.attempt), None)

    def _begin(self, round: Round) -> None:
        if round.index == 0:
            self._producers = {key: shard for key, shard in self._producers.items() if shard.carries}
            self._attempts.clear()
        self._producers.update((shard.key, shard) for shard in round.shards if shard.keeps)

    def _blocks(self, round: Round) -> Sequence[Shard]:
        """Join the shards of a round to blocks. Shards that keep or need outputs stay single."""
        gradients = all(s.function in self._learner.gradients and not s.needs and not s.keeps for s in round.shards)
        if not (round.reduce and gradients and self.executor.blocks) or len(round.shards) == 1:
            return round.shards
        there, first = self.executor.workers(), round.shards[0]
        for key in [key for key in self._paces if key[1] not in there]:
            del self._paces[key]
        paces = [
            self._paces.get((first.function, name)) for name, about in there.items() if about["role"] == first.role
        ]
        return in_blocks(round.shards, [statistics.median(p) if p else None for p in paces])

    def _submit(self, progress: _Progress) -> None:
        while progress.pending and self.executor.capacity(progress.pending[0].role) > 0:
            self._give(self._next(progress.pending))

    def _next(self, pending: deque[Shard]) -> Shard:
        """Take the first shard out of ``pending``; if there is one, the first whose states a free worker holds."""
        if pending[0].carries and pending[0].needs:
            near = next((shard for shard in pending if shard.needs and self.executor.near(shard)), pending[0])
            pending.remove(near)
            return near
        return pending.popleft()

    def _give(self, shard: Shard) -> None:
        self._attempts[shard] += 1
        attempt = self._attempts[shard]
        self._outstanding[shard, attempt] = time.monotonic()
        self.executor.submit(shard, attempt)

    def _take(self, progress: _Progress, event: Event) -> Result | None:
        shard = event.shard
        started = self._outstanding.pop((shard, event.attempt), None)
        if started is None or shard not in progress.open:
            self.measured.counts["duplicates"] += 1
            return None
        if isinstance(event, Finished):
            reduce = progress.round.reduce or not progress.is_mine(shard)
            fault = fault_of(event.result, shard, self._learner, reduce)
            if fault is None:
                self._durations[shard.function].append((time.monotonic() - started) / shard.leaves)
                self._measure(event)
                return event.result if progress.finish(shard) else None
            event = Failed(shard, event.attempt, event.worker, "rejected", fault)
        self._failed(progress, event)
        return None

    def _measure(self, event: Finished) -> None:
        self.measured.counts["results"] += 1
        self.measured.seconds["compute"] += event.stats.get("seconds", 0.0)
        if "seconds" in event.stats:
            self._paces[event.shard.function, event.worker].append(event.stats["seconds"] / event.shard.leaves)
        for name, seconds in event.stats.items():
            if name.startswith("seconds"):
                self.measured.seconds[f"compute/{event.shard.function}{name.removeprefix('seconds')}"] += seconds
        self.measured.counts["bytes_received"] += int(event.stats.get("bytes", 0))
        self.measured.workers[event.worker] = event.stats

    def _failed(self, progress: _Progress, event: Failed) -> None:
        shard = event.shard
        log.warning("worker %s: %s %s: %s", event.worker, shard, event.kind, event.message)
        if not shard.leaf:  # the shards of a block are judged one by one when they are submitted again
            self._judge(progress, event)
        self.retried[event.kind] += shard.leaves
        self.measured.counts["retried"] += shard.leaves
        queued = shard in progress.waiting or shard in progress.pending
        if not queued and not any(other == shard for other, _ in self._outstanding):
            progress.again(shard)

    def _judge(self, progress: _Progress, event: Failed) -> None:
        """Raise WorkerError where another attempt would fail too."""
        shard = event.shard
        if event.kind == "lost":
            if event.guilty:
                progress.deaths[shard] += 1
                progress.blamed[shard].append(event.worker)
            if progress.deaths[shard] >= MAX_DEATHS:
                raise WorkerError(
                    f"{shard} killed {MAX_DEATHS} workers ({', '.join(progress.blamed[shard])}), the last with: "
                    f"{event.message}; "
                    f"reproduce it with workers: 0 and seed {shard.seed}"
                )
        elif event.kind == "missing":
            self._missing(progress, event)
        else:
            earlier = progress.messages[shard]
            alike = event.message in earlier
            earlier.append(event.message)
            if alike or len(earlier) >= MAX_FAILURES:
                where = self._on_failure(event.detail) if self._on_failure and event.detail else ""
                tasks = f"task {', '.join(map(str, event.tasks))}: " if event.tasks else ""
                times = "alike twice" if alike else f"{MAX_FAILURES} times, the last with"
                raise WorkerError(f"{shard} failed {times}: {tasks}{event.message}{where}")

    def _missing(self, progress: _Progress, event: Failed) -> None:
        """Submit the producers of lost outputs again, under the θ of their own round."""
        progress.missed[event.shard] += 1
        if progress.missed[event.shard] > MAX_FAILURES:
            raise WorkerError(
                f"{event.shard} lacked outputs that it needs {progress.missed[event.shard]} times, the last with: "
                f"{event.message}"
            )
        if event.missing:
            progress.wait_for(event.shard, [self._producers[key] for key in event.missing])

    def _replace_slow_attempts(self, progress: _Progress) -> None:
        """Start a backup of a slow shard on an idle worker, and recycle the worker of a hung one.

        The first result counts.
        """
        now = time.monotonic()
        usual = {f: statistics.median(durations) for f, durations in self._durations.items()}
        for (shard, attempt), started in list(self._outstanding.items()):
            age = now - started
            # The attempt may have waited behind a block.
            if age > self._timeout * max(shard.leaves, progress.leaves):
                log.warning("%s: no answer for %.0f s; its worker is recycled", shard, age)
                self.executor.cancel(shard, attempt)
                self._outstanding[shard, attempt] = now
            elif age > max(
                BACKUP_SECONDS, 8 * shard.leaves * usual.get(shard.function, self._timeout)
            ) and self._may_back_up(progress, shard, attempt):
                self.measured.counts["backups"] += 1
                self._give(shard)

    def _may_back_up(self, progress: _Progress, shard: Shard, attempt: int) -> bool:
        idle = not progress.pending and self.executor.capacity(shard.role) > 0
        return idle and shard in progress.open and attempt == self._attempts[shard] < 2


def fault_of(result: Result, shard: Shard, learner: Learner, reduce: bool) -> str | None:
    """Return why a result must not enter the sum, or None. The check is the same for every executor.

    A gradient has all slots that receive it. The sums of other functions (the statistics of a rollout) have none, and
    their metrics enter θ.
    """
    if isinstance(result, Records) == reduce:
        return f"{type(result).__name__.lower()} where {'a contribution' if reduce else 'records'} should be"
    if isinstance(result, Records):
        return None if result.rows == shard.count else f"{result.rows} rows for {shard.count} tasks"
    for name, vector in result.slots.items():
        slot = learner.slots.get(name)
        if slot is None or slot.rule == "constant":
            return f"slot '{name}' takes no contributions"
        if vector.shape != (slot.layout.numel,) or vector.dtype != slot.layout.dtype:
            expected = f"({slot.layout.numel},) {slot.layout.dtype}"
            return f"slot '{name}' is {tuple(vector.shape)} {vector.dtype}, expected {expected}"
        if not is_finite(vector):
            return f"slot '{name}' has NaN or Inf"
    names = learner.receivers(shard.computation)
    if result.slots.keys() != names:
        return f"slots {sorted(result.slots)}, expected {sorted(names)}"
    wrong = [] if names else [n for n, value in result.metrics.items() if not math.isfinite(value)]
    if wrong:
        return f"'{wrong[0]}' is {result.metrics[wrong[0]]}"
    skipped = learner.leaves_out_tasks and result.tasks == result.weight == 0
    if not skipped and not (0 < result.weight < math.inf and 1 <= result.tasks <= shard.count):
        return f"weight {result.weight} and {result.tasks} tasks for a shard of {shard.count}"
    return None
