"""Blocks leased to remote workers: the same bits, and a false claim about the shards of a sum is refused."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace

import pytest
from outsiders import HERE, OUTSIDE, document, experiment, hands, train

from metadist.training import blocks
from metadist.wire.codec import ResultHeader, decode_result, result_parts
from metadist.workers.remote.messages import Computed
from metadist.workers.remote.runner import Runner

pytestmark = pytest.mark.lane("services")

TWO = {**OUTSIDE, "min": 2}


@pytest.fixture(scope="module")
def expected():
    return train(experiment(document(HERE)))[0]


@pytest.fixture(autouse=True)
def even(monkeypatch):
    monkeypatch.setattr(blocks, "EVEN", 1e9)


def given(run, *roles, **options):
    """What was leased while the run trained."""
    shards = []
    with hands(run, *roles) as working:
        sha256, scheduler = train(run, fault=lambda _, shard: shards.append(shard), **options)
    return sha256, scheduler, shards, working


def test_the_bits_of_this_process(expected):
    sha256, scheduler, shards, working = given(experiment(document(TWO)), "learner", "learner")
    assert sha256 == expected
    assert max(s.leaves for s in shards) > 1
    assert not scheduler.retried
    assert scheduler.tasks_done == 40


def test_a_driver_that_computes_itself_leases_single_shards(expected):
    sha256, _, shards, _ = given(experiment(document(HERE, OUTSIDE)), "learner")
    assert sha256 == expected
    assert {s.leaves for s in shards} == {1}


LIES = {
    "one shard of so many tasks": lambda block: replace(block, leaf=0),
    "other shards": lambda block: replace(block, leaf=block.leaf + 1),
    "its first shard": lambda block: block.each()[0],
    "the shards behind": lambda block: replace(
        block, index=block.index + block.leaves, start=block.start + block.count
    ),
}


@pytest.mark.parametrize("lie", LIES)
def test_who_claims_to_have_summed_other_shards_is_dismissed(expected, lie, monkeypatch):
    lied = []

    class Liar(Runner):
        def compute(self, lease):
            answer, call = super().compute(lease), lease.call
            if lied or not call.shard.leaf:
                return answer
            lied.append(call.shard)
            slots, told = self._built[1].slots, LIES[lie](call.shard)
            result, _ = decode_result(b"".join(memoryview(p).tobytes() for p in answer.result), call.shard, slots)
            result = replace(result, tasks=told.count, weight=float(told.count))
            return Computed(result_parts(result, slots, ResultHeader(told, call.attempt, "liar")))

    monkeypatch.setattr("metadist.workers.remote.runner.Runner", Liar)
    sha256, scheduler, shards, working = given(experiment(document(TWO)), "learner", "learner")
    assert sha256 == expected
    [block] = lied
    assert scheduler.retried["rejected"] == block.leaves
    assert scheduler.retried == Counter(rejected=block.leaves) + Counter(lost=scheduler.retried["lost"])
    [error] = [hand.error for hand in working if hand.error is not None]
    assert "refused this worker" in str(error)
    assert "expected" in str(error)
    again = [s for s in shards if s.meta_step == block.meta_step]
    assert set(block.each()) <= set(again), "single shards, to whoever is left"
