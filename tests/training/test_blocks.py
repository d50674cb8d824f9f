"""Blocks: which shards are summed where they are computed, and what becomes of a block that fails."""

from __future__ import annotations

import time
from collections import Counter
from dataclasses import replace

import pytest
import tiny
import torch
from test_scheduler import STATE, Toy, bits, error, evaluation_round, gradient_round, hang

from metadist.core.computation import Evaluate, Gradient
from metadist.core.errors import WorkerError
from metadist.core.round import Failed, Finished
from metadist.core.state import Contribution
from metadist.training import scheduler as scheduling
from metadist.training.blocks import BLOCK_SECONDS, UNEVEN_BLOCKS, cuts, in_blocks, largest
from metadist.training.scheduler import Scheduler
from metadist.wire import ThetaHeader, decode_result
from metadist.wire.codec import theta_parts
from metadist.workers.actor import Actor, ActorSettings
from metadist.workers.calls import Call
from metadist.workers.worker import TaskError, Worker

LEARNER = tiny.learner("outer.meta_batch_size=31", "outer.shard_size=2")  # 16 shards, the last of one task
ROUND = gradient_round(learner=LEARNER)
EXPECTED = bits(Scheduler(Toy(1, learner=LEARNER), LEARNER).run(ROUND))


# How large ------------------------------------------------------------------------------------------------------------


def loads(parts, workers):
    """Each worker's shards, where whoever is free takes the next block."""
    found = [0] * workers
    for part in parts:
        found[found.index(min(found))] += len(part)
    return found


@pytest.mark.parametrize("workers", range(1, 10))
def test_even_workers_get_even_parts_in_few_blocks(workers):
    for count in range(1, 130):
        parts = list(cuts(count, workers, largest(count, [0.1] * workers)))
        assert sorted(i for p in parts for i in p) == list(range(count))
        assert all(p.start % (1 << (len(p) - 1).bit_length()) == 0 for p in parts), "nodes of the tree"
        assert max(loads(parts, workers)) == -(-count // workers), "nobody has more than with single shards"
        if workers == 1 or (count % workers == 0 and (count // workers).bit_count() == 1):
            assert len(parts) == workers, "one call each"
        assert len(parts) <= workers * (1 + max(1, count // workers).bit_length())


@pytest.mark.parametrize(
    ("count", "workers", "sizes"),
    [
        (4, 1, [4]),
        (4, 2, [2, 2]),
        (4, 4, [1] * 4),
        (4, 8, [1] * 4),
        (5, 1, [5]),
        (5, 2, [2, 2, 1]),
        (6, 2, [2, 2, 1, 1]),
        (7, 2, [4, 3]),
        (13, 2, [4, 4, 2, 2, 1]),
        (8, 3, [2, 2, 2, 1, 1]),
        (16, 5, [2] * 8),
        (100, 8, [8] * 8 + [4] * 8 + [1] * 4),
    ],
)
def test_sizes(count, workers, sizes):
    assert [len(p) for p in cuts(count, workers, largest(count, [0.1] * workers))] == sizes


def test_workers_that_differ_or_are_unknown_get_many_blocks():
    assert largest(64, [0.1, 0.1]) == 32
    assert largest(64, [0.1, 0.124]) == 32
    for paces in ([0.1, 0.13], [0.1, None], [None, None]):
        assert largest(64, paces) == 4
        assert largest(5, paces) == largest(16, paces) == 1
        assert (largest(3, paces), largest(4, paces)) == (2, 2), "all are given out at once anyhow"
        for count in range(2 * UNEVEN_BLOCKS, 200):
            assert len(list(cuts(count, 2, largest(count, paces)))) >= 2 * UNEVEN_BLOCKS
    assert largest(64, [1e-4, 9e-4]) == 32, "a call costs more than the difference"
    assert largest(64, []) == largest(64, [None]) == 8


def test_a_block_is_not_all_that_can_be_lost_in_a_minute():
    assert largest(64, [4.0, 4.0]) == 4
    assert BLOCK_SECONDS >= 4 * 4.0
    assert largest(64, [40.0, 40.0]) == 1
    assert largest(64, [0.0, 0.0]) == 32


def test_shards_that_do_not_follow_on_each_other_stay_as_they_are():
    shards = list(ROUND.shards)
    assert [b.leaves for b in in_blocks(shards, [0.1, 0.1])] == [8, 8]
    assert [s for b in in_blocks(shards, [0.1, 0.1]) for s in b.each()] == shards
    for strange in (
        [*shards[:3], replace(shards[3], start=99), *shards[4:]],
        [replace(s, computation=Gradient((("mean", float(s.index)),))) for s in shards],
        shards[::-1],
    ):
        assert in_blocks(strange, [0.1, 0.1]) == strange


# What becomes of them -------------------------------------------------------------------------------------------------


class Blocks(Toy):
    """Sums blocks by the code of workers.

    ``deed`` says what becomes of whatever holds shard ``bad``, as often as ``times``.
    """

    blocks = True

    def __init__(self, workers=2, order=0, learner=LEARNER, seconds=0.01):
        super().__init__(workers, order, learner)
        self.worker = Worker(learner, name="toy", device="cpu", gpus=0.0, threads=1)
        self.seconds = seconds if callable(seconds) else lambda worker: seconds
        self.bad, self.deed, self.times, self.given = None, None, 0, []

    def spoil(self, bad, deed, times=1):
        self.bad, self.deed, self.times = bad, deed, times
        return self

    def submit(self, shard, attempt):
        self.given.append(shard)
        hit = self.bad in [s.index for s in shard.each()] and self.times > 0
        if hit:
            self.times -= 1
            self.deeds[shard.index].insert(0, self.deed)
        super().submit(shard, attempt)

    def wait(self, timeout):
        computes, self.learner = self.learner, self
        try:
            return [
                replace(e, stats={"seconds": self.seconds(e.worker) * e.shard.leaves, "bytes": 8.0})
                if isinstance(e, Finished)
                else e
                for e in super().wait(timeout)
            ]
        finally:
            self.learner = computes

    def compute(self, shard, theta):
        return self.worker.compute(shard, theta)[0]


def known(toy, **options):
    """A scheduler that has measured its workers."""
    fleet = Scheduler(toy, LEARNER, **options)
    for name in toy.alive:
        fleet._paces["gradient", name].append(0.01)
    return fleet


@pytest.mark.parametrize("order", range(4))
@pytest.mark.parametrize("workers", [1, 2, 3, 5, 16, 40])
def test_the_same_bits_for_any_number_of_workers(workers, order):
    toy = Blocks(workers, order)
    assert bits(known(toy).run(ROUND)) == EXPECTED
    assert len(toy.given) == {1: 1, 2: 2, 3: 7, 5: 8, 16: 16, 40: 16}[workers]


def test_single_shards_until_the_workers_are_measured():
    toy = Blocks(2)
    fleet = Scheduler(toy, LEARNER)
    for step in range(3):
        fleet.run(gradient_round(step, learner=LEARNER))
    counts = Counter(s.meta_step for s in toy.given)
    assert counts == {0: 16, 1: 2, 2: 2}
    assert fleet.tasks_done == 3 * 31
    assert fleet.measured.read().counts["results"] == 20


def test_a_slow_worker_gets_fewer():
    toy = Blocks(2, seconds=lambda worker: 0.05 if worker == "toy-1" else 0.01)
    fleet = Scheduler(toy, LEARNER)
    for step in range(3):
        fleet.run(gradient_round(step, learner=LEARNER))
    assert len(toy.given) == 3 * 16


def test_validation_and_what_keeps_or_needs_go_one_by_one():
    toy = Blocks(2)
    fleet = known(toy)
    for name in toy.alive:
        fleet._paces["evaluate", name].append(0.01)
    fleet.run(evaluation_round())
    assert {s.leaves for s in toy.given} == {1}
    for change in ({"keeps": True}, {"needs": ((0, 0, 0),)}, {"computation": Evaluate()}):
        strange = replace(ROUND, shards=[replace(s, **change) for s in ROUND.shards])
        assert fleet._blocks(strange) == strange.shards
    assert fleet._blocks(replace(ROUND, reduce=False)) == ROUND.shards
    toy.blocks = False
    assert fleet._blocks(ROUND) == ROUND.shards


def lost(shard, attempt, worker, result):
    return [Failed(shard, attempt, worker, "lost", "died: killed by the test")]


@pytest.mark.parametrize("bad", [0, 3, 7, 8, 15])
def test_a_block_that_is_lost_goes_out_again_as_single_shards(bad):
    toy = Blocks(2).spoil(bad, lost)
    fleet = known(toy)
    assert bits(fleet.run(ROUND)) == EXPECTED
    assert [s.leaves for s in toy.given] == [8, 8] + [1] * 8
    assert [s.index for s in toy.given[2:]] == list(range(bad // 8 * 8, bad // 8 * 8 + 8))
    assert fleet.retried == Counter(lost=8)
    assert fleet.tasks_done == 31


def test_a_shard_that_kills_is_found_in_its_block():
    toy = Blocks(2).spoil(11, lost, times=99)
    with pytest.raises(
        WorkerError,
        match=r"round 0, shard 11 \(train tasks 22…23, seed 7\) killed 3 workers.*"
        r"reproduce it with workers: 0 and seed 7",
    ):
        known(toy).run(ROUND)


def test_an_error_in_a_block_is_that_of_its_shard():
    toy = Blocks(2).spoil(15, error("ValueError: no such sine", (30,)), times=99)
    with pytest.raises(
        WorkerError, match=r"shard 15 \(train task 30, seed 7\) failed alike twice: task 30: ValueError: no such sine"
    ):
        known(toy).run(ROUND)
    toy = Blocks(2).spoil(15, error("ValueError: no such sine", (30,)))
    fleet = known(toy)
    assert bits(fleet.run(ROUND)) == EXPECTED
    assert fleet.retried == Counter(error=8)


def test_what_is_wrong_with_a_block_is_found_before_the_sum():
    def other(change):
        return lambda shard, attempt, worker, result: [Finished(shard, attempt, worker, change(result))]

    for change in (
        lambda r: replace(r, tasks=99),
        lambda r: replace(r, slots={}),
        lambda r: replace(r, slots={n: v * float("nan") for n, v in r.slots.items()}),
    ):
        fleet = known(Blocks(2).spoil(4, other(change)))
        assert bits(fleet.run(ROUND)) == EXPECTED
        assert fleet.retried == Counter(rejected=8)


def test_a_block_has_as_long_as_its_shards():
    toy = Blocks(1).spoil(0, hang)
    fleet = known(toy, timeout=0.05)
    began = time.monotonic()
    assert bits(fleet.run(ROUND)) == EXPECTED
    assert time.monotonic() - began > 16 * 0.05
    assert toy.cancelled == [(0, 1)]
    assert fleet.retried == Counter(lost=16)


def test_a_backup_of_a_block_may_win_or_fail(monkeypatch):
    """It is divided once nobody computes it any more."""
    monkeypatch.setattr(scheduling, "BACKUP_SECONDS", 0.2)
    for deed in (None, lost):
        toy = Blocks(3).spoil(0, hang)
        fleet = known(toy, timeout=0.3)
        fleet._durations["gradient"].extend([1e-3] * 8)
        toy.deeds[0].append(deed) if deed else None
        assert bits(fleet.run(ROUND)) == EXPECTED
        assert fleet.measured.read().counts["backups"] >= 1
        assert [s.leaves for s in toy.given].count(4) >= 1


def test_the_first_result_of_a_block_counts():
    def twice(shard, attempt, worker, result):
        copy = replace(result, slots={n: v.clone() for n, v in result.slots.items()})
        return [Finished(shard, attempt, worker, r) for r in (result, copy)]

    fleet = known(Blocks(2).spoil(0, twice))
    assert bits(fleet.run(ROUND)) == EXPECTED
    fleet.run(gradient_round(1, learner=LEARNER))
    assert fleet.measured.read().counts["duplicates"] == 1


# Where they are computed ----------------------------------------------------------------------------------------------


def test_a_worker_computes_the_shards_of_a_block_each_as_if_it_were_alone(monkeypatch):
    worker = Worker(LEARNER, name="w", device="cpu", gpus=0.0, threads=1)
    [block] = in_blocks(ROUND.shards, [0.1])
    asked = []
    compute = type(LEARNER).compute
    monkeypatch.setattr(
        type(LEARNER), "compute", lambda self, shard, theta: (asked.append(shard), compute(self, shard, theta))[1]
    )
    result, output, stats = worker.compute(block, STATE.slots)
    assert asked == list(ROUND.shards)
    assert bits(result) == EXPECTED
    assert output is None
    assert stats["seconds"] > 0


def test_a_worker_names_the_task_of_the_block_that_fails(monkeypatch):
    worker = Worker(LEARNER, name="w", device="cpu", gpus=0.0, threads=1)
    [block] = in_blocks(ROUND.shards, [0.1])
    compute, asked = type(LEARNER).compute, []

    def broken(self, shard, theta):
        asked.append((shard.index, shard.start, shard.count, shard.leaf))
        if shard.start <= 13 < shard.start + shard.count:
            raise ValueError("no such sine")
        return compute(self, shard, theta)

    monkeypatch.setattr(type(LEARNER), "compute", broken)
    with pytest.raises(TaskError, match="ValueError: no such sine") as caught:
        worker.compute(block, STATE.slots)
    assert caught.value.tasks == (13,)
    assert asked[-2:] == [(6, 12, 1, 0), (6, 13, 1, 0)], "the shard's own context, and no other shard's tasks"


def test_a_block_in_half_precision_is_rounded_once_and_settled_under_its_own_name():
    actor = Actor(LEARNER, ActorSettings("a", device="cpu"))
    actor.start()
    theta = theta_parts(STATE.slots, LEARNER.slots, ThetaHeader("run", 0, 0))
    first, second = in_blocks(ROUND.shards, [0.1, 0.1])
    actor.compute(Call(first, 1, 1, 1, settled=[]), theta)
    error = actor._feedback.residual("model").clone()
    parts = actor.compute(Call(second, 1, 1, 2, settled=[((first, 1), False)]), None)
    alone = Actor(LEARNER, ActorSettings("b", device="cpu"))
    alone.start()
    expected = alone.compute(Call(second, 1, 1, 1, settled=[]), theta)
    assert error.abs().max() > 0
    got, other = (decode_result(p, second, LEARNER.slots, wire="bfloat16")[0].slots["model"] for p in (parts, expected))
    assert got.equal(other), "what was not counted leaves nothing behind"


def test_a_block_holds_no_more_than_a_path_of_the_tree(monkeypatch):
    import weakref

    worker = Worker(LEARNER, name="w", device="cpu", gpus=0.0, threads=1)
    [block] = in_blocks(ROUND.shards, [0.1])
    alive, most = weakref.WeakSet(), []

    def compute(self, shard, theta):
        most.append(len(alive))
        vector = torch.ones(3)
        alive.add(vector)
        return Contribution({"model": vector}, float(shard.count), shard.count)

    monkeypatch.setattr(type(LEARNER), "compute", compute)
    assert worker.compute(block, {})[0].tasks == 31
    assert max(most) <= 4, "of 16 shards"
