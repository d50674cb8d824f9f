"""The executor that fails on purpose: the scheduler notices every fault, and none changes a bit."""

from __future__ import annotations

import time
from collections import Counter
from dataclasses import replace

import pytest
import tiny

from metadist.core.errors import WorkerError
from metadist.core.round import Executor, MetaStepKey, run_rounds
from metadist.training.scheduler import MAX_DEATHS, Scheduler
from metadist.workers.faulty import Act, Corrupt, Delay, FaultyExecutor, Kill, Lose
from metadist.workers.local import LocalExecutor

SEED, STEPS = 3, 2


def train(learner, *rules):
    """``STEPS`` meta-steps in this process: the hash of the parameters, and the scheduler."""
    faulty = FaultyExecutor(LocalExecutor(learner))
    for rule in rules:
        faulty.fail_at(*rule)
    scheduler, state = Scheduler(faulty, learner), learner.initial(SEED)
    for step in range(STEPS):
        state, _ = run_rounds(learner.meta_step(MetaStepKey("run", step, SEED), state), scheduler.sum)
    faulty.close()
    return state.sha256(), scheduler


@pytest.fixture(scope="module")
def learner():
    return tiny.learner()


@pytest.fixture(scope="module")
def expected(learner):
    return train(learner)[0]


def second(shard):
    return shard.meta_step == 1 and shard.index == 1


def negated(result):
    return replace(result, slots={name: -vector.double() for name, vector in result.slots.items()})


@pytest.mark.parametrize(
    ("fault", "retried"),
    [
        (Lose(), Counter(lost=1)),
        (Kill(), Counter()),
        (Delay(0.3), Counter()),
        (Corrupt(negated), Counter(rejected=1)),
    ],
    ids=["lose", "kill", "delay", "corrupt"],
)
def test_a_fault_changes_nothing(learner, expected, fault, retried):
    sha256, scheduler = train(learner, (second, fault))
    assert sha256 == expected
    assert scheduler.retried == retried
    assert scheduler.tasks_done == 10 * STEPS


def test_a_corruption_that_nothing_can_notice_changes_the_result(learner, expected):
    """Else the tests above could not fail."""

    def other(result):
        return replace(result, slots={name: -vector for name, vector in result.slots.items()})

    assert train(learner, (second, Corrupt(other)))[0] != expected


def test_a_delayed_result_arrives_late(learner, expected):
    began = time.monotonic()
    assert train(learner, (second, Delay(1.0)))[0] == expected
    assert time.monotonic() - began >= 1.0


def test_a_shard_is_blamed_for_workers_that_it_kills(learner):
    with pytest.raises(WorkerError, match=f"shard 1 .* killed {MAX_DEATHS} workers"):
        train(learner, (second, Lose(guilty=True), None))


def test_several_faults_at_one_shard_disturb_one_attempt_each(learner, expected):
    sha256, scheduler = train(learner, (second, Lose()), (second, Corrupt(negated)), (second, Lose()))
    assert sha256 == expected
    assert scheduler.retried == Counter(lost=2, rejected=1)


def test_an_action_sees_the_wrapped_executor_and_this_process_kills_nobody(learner):
    seen, kill = [], Kill()
    train(learner, (second, Act(lambda executor, shard: seen.append((type(executor), shard.index)))), (second, kill))
    assert seen == [(LocalExecutor, 1)]
    train(learner, (second, kill))
    assert kill.killed == [None]


def test_all_that_executors_can_do_reaches_the_wrapped_one(learner):
    local = LocalExecutor(learner)
    faulty: Executor = FaultyExecutor(local)
    assert faulty.plan is local.plan
    assert faulty.blocks == local.blocks
    assert faulty.workers().keys() == local.workers().keys()
    assert faulty.shortage() == local.shortage()
    assert faulty.capacity("learner") == 1
    assert faulty.cannot_resize("learner", 2) == local.cannot_resize("learner", 2)
    assert faulty.kill_busy() is None
    faulty.close()
