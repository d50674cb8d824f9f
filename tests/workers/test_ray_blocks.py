"""Real actors and blocks: one call per worker and meta-step, and the bits of this process in spite of failures."""

from __future__ import annotations

import time
from collections import Counter

import families
import pytest
import tiny
from faults import everywhere
from test_ray import SEED, executor, settle

from metadist.config.groups import WorkerGroup
from metadist.core.errors import WorkerError
from metadist.core.round import MetaStepKey, run_rounds
from metadist.learners.few_shot import FewShotLearner
from metadist.training import blocks
from metadist.training.scheduler import Scheduler
from metadist.workers.local import LocalExecutor

SHARDS, TASKS = 16, 32


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("mischief")


@pytest.fixture(scope="module")
def learner(folder):
    toy = tiny.learner(f"outer.meta_batch_size={TASKS}", f"outer.shard_size={TASKS // SHARDS}")
    return FewShotLearner(
        toy.algorithm, toy.model, families.Mischief(k_shot=4, query_shots=4, folder=str(folder)), toy.outer
    )


@pytest.fixture
def tell(folder):
    yield lambda deed: (folder / "deed").write_text(deed)
    (folder / "deed").unlink(missing_ok=True)


@pytest.fixture(scope="module")
def actors(cluster, learner):
    two = executor(learner, WorkerGroup(min=2, max=2, gpus=0))
    yield two
    two.close()


@pytest.fixture
def even(monkeypatch):
    """On a busy machine two actors are as fast as it happens to let them be."""
    monkeypatch.setattr(blocks, "EVEN", 1e9)


class Training:
    """Meta-steps one after the other, and what was given out in each."""

    def __init__(self, executor, learner, **options):
        self.given = []
        self.fleet = Scheduler(everywhere(lambda _, s: self.given.append(s))(executor), learner, **options)
        self.learner, self.state, self.step = learner, learner.initial(SEED), 0

    def go(self, steps):
        for _ in range(steps):
            rounds = self.learner.meta_step(MetaStepKey("run", self.step, SEED), self.state)
            self.state, _ = run_rounds(rounds, self.fleet.sum)
            self.step += 1
        return self

    def calls(self, step):
        return sum(s.meta_step == step for s in self.given)


def ready(actors, learner, count=2):
    """Wait until ``count`` workers have computed: a new one takes seconds for its first shard, and answers too late."""
    settle(actors, count)
    training, deadline = Training(actors, learner), time.monotonic() + 60.0
    while len(training.fleet._paces) < count:
        assert time.monotonic() < deadline, "a worker computes nothing"
        training.go(1)


@pytest.fixture(scope="module")
def expected(learner):
    local = LocalExecutor(learner)
    training, hashes = Training(local, learner), [None]
    for _ in range(8):
        hashes.append(training.go(1).state.sha256())
    local.close()
    assert {s.leaves for s in training.given} == {1}, "nothing travels in this process"
    return hashes


def test_one_call_per_worker_and_meta_step(actors, learner, expected, even):
    ready(actors, learner)
    training = Training(actors, learner).go(1)
    assert training.calls(0) == SHARDS, "nothing is known of the workers yet"
    first = training.fleet.measured.read()
    assert (first.counts["results"], len(first.workers)) == (SHARDS, 2)
    training.go(4)
    assert [training.calls(step) for step in range(1, 5)] == [2] * 4
    rest = training.fleet.measured.read()
    assert (rest.counts["results"], len(rest.workers)) == (8, 2)
    assert rest.counts["bytes_received"] / 4 == pytest.approx(first.counts["bytes_received"] * 2 / SHARDS, rel=0.1)
    assert training.state.sha256() == expected[5]
    assert training.fleet.tasks_done == 5 * TASKS
    assert not training.fleet.retried


def test_a_worker_killed_within_a_block(actors, learner, expected, even, tell):
    ready(actors, learner)
    training = Training(actors, learner).go(1)
    tell("once 13")
    assert training.go(1).state.sha256() == expected[training.step]
    assert training.fleet.retried == Counter(lost=SHARDS // 2)
    again = [s.index for s in training.given if s.meta_step == training.step - 1 and s.leaves == 1]
    assert again == list(range(SHARDS // 2))
    assert training.go(1).state.sha256() == expected[training.step]
    assert training.fleet.tasks_done == training.step * TASKS
    settle(actors, 2)


def test_the_failing_task_of_a_block_is_named(actors, learner, even, tell):
    ready(actors, learner)
    details = []
    training = Training(actors, learner, on_failure=lambda d: details.append(d) or "").go(1)
    tell("raise 21")
    with pytest.raises(WorkerError) as caught:
        training.go(1)
    message = str(caught.value)
    assert f"shard 10 (train tasks 20…21, seed {SEED}) failed alike twice" in message
    assert "twice: task 21: ValueError: the sine of task 21 is gone" in message
    assert "families.py" in details[0]
    assert max(s.leaves for s in training.given) == SHARDS // 2


def test_a_nan_in_a_block_is_attributed_to_its_task(actors, learner, even, tell):
    ready(actors, learner)
    training = Training(actors, learner).go(1)
    tell("nan 30")
    with pytest.raises(
        WorkerError, match=rf"shard 15 \(train tasks 30…31, seed {SEED}\).*task 30: tasks \[30\] gave NaN or Inf"
    ):
        training.go(1)


@pytest.mark.long
def test_a_task_that_kills_its_workers_is_found_in_its_block(actors, learner, even, tell):
    ready(actors, learner)
    training = Training(actors, learner).go(1)
    tell("exit 6")
    with pytest.raises(
        WorkerError, match=rf"shard 3 \(train tasks 6…7, seed {SEED}\) killed 3 workers.*workers: 0 and seed {SEED}"
    ):
        training.go(1)
    settle(actors, 2)


def test_a_slower_worker_gets_less(actors, learner, expected, tell):
    ready(actors, learner)
    slow = next(iter(actors.workers().values()))
    tell(f"lag {slow['pid']}")
    done = Counter()

    class Counting(Scheduler):
        def _measure(self, event):
            done[event.worker] += event.shard.leaves
            super()._measure(event)

    training = Training(actors, learner)
    training.fleet.__class__ = Counting
    assert training.go(5).state.sha256() == expected[5]
    assert min(training.calls(step) for step in range(5)) > 2
    assert done[slow["name"]] < 0.3 * done.total()


@pytest.mark.long
def test_workers_that_come_and_go_within_the_run(actors, learner, expected, even):
    ready(actors, learner)
    training = Training(actors, learner).go(2)
    actors.resize("learner", 4)
    settle(actors, 4)
    assert training.go(2).state.sha256() == expected[4]
    assert training.calls(2) > 2, "the new ones are not measured yet"
    actors.resize("learner", 1)
    settle(actors, 1)
    assert training.go(4).state.sha256() == expected[8]
    assert training.calls(7) == 1
    actors.resize("learner", 2)
    settle(actors, 2)
