"""Real actors that hold the states of particles: killed, without their states, with large ones; same parameters."""

from __future__ import annotations

import os
import signal

import particles
import pytest
from test_ray import executor

from metadist.config.groups import WorkerGroup
from metadist.core.outer import OuterLoop
from metadist.core.round import MetaStepKey, run_rounds
from metadist.testing.carried import LearnedRate
from metadist.training.scheduler import Scheduler
from metadist.workers.faulty import Act, FaultyExecutor, Kill
from metadist.workers.local import LocalExecutor

# Its fixtures are asked for by name, which the lanes do not see.
pytestmark = pytest.mark.lane("ray")

STEPS = 6
TWO = WorkerGroup(min=2, max=2, gpus=0)
OUTER = OuterLoop(lr=0.05, meta_batch_size=6, shard_size=1)


def train(executor, learner, steps=STEPS):
    fleet = Scheduler(executor, learner, patience=300.0)
    state = learner.initial(0)
    for step in range(steps):
        state, _ = run_rounds(learner.meta_step(MetaStepKey("run", step, 0), state), fleet.sum)
    return state.sha256(), fleet


def population(ballast=0):
    return particles.learner(LearnedRate(windows=3, ballast=ballast), outer=OUTER)


@pytest.fixture(scope="module")
def expected():
    local = LocalExecutor(population())
    yield train(local, population())[0]
    local.close()


@pytest.fixture(scope="module")
def actors(cluster):
    two = executor(population(), TWO)
    yield two
    two.close()


def test_the_bits_of_this_process_and_states_stay_where_they_are(actors, expected, monkeypatch):
    calls, moved = [], []
    original = actors._ask

    def ask(member, shard, attempt):
        if shard.needs:
            calls.append(shard)
            moved.extend(output for output in actors._kept.needed(shard) if output.token not in member.holds)
        original(member, shard, attempt)

    monkeypatch.setattr(actors, "_ask", ask)
    sha256, fleet = train(actors, population())
    assert sha256 == expected
    assert not fleet.retried
    assert len(calls) == 6 * (STEPS - 1)
    assert len(moved) < len(calls) / 2, "a holder goes before an idle worker"


@pytest.mark.long
def test_holders_are_killed(actors, expected):
    faulty = FaultyExecutor(actors)
    for step in (1, 3, 5):
        faulty.fail_at(lambda shard, step=step: shard.meta_step == step and shard.index == 4, Kill())
    sha256, fleet = train(faulty, population())
    assert sha256 == expected
    assert fleet.retried["lost"] >= 3


def test_all_holders_are_killed_and_the_object_store_has_lost_the_states(actors, expected):
    done = []

    def disaster(_, shard):
        if shard.meta_step == 4 and not done:
            done.append(shard)
            actors._kept.outputs.clear()
            for member in list(actors._pool.members.values()):
                if member.about is not None:
                    os.kill(member.about["pid"], signal.SIGKILL)

    faulty = FaultyExecutor(actors).fail_at(lambda shard: True, Act(disaster), times=None)
    sha256, fleet = train(faulty, population())
    assert sha256 == expected
    assert fleet.retried["missing"] >= 6 * 3, "all states are computed again from the first meta-step on"


class Counting:
    """Stands for the module ``ray`` in the executor, and counts the bytes that ``get`` returns and ``put`` takes."""

    def __init__(self, ray):
        self.ray, self.bytes = ray, 0

    def __getattr__(self, name):
        return getattr(self.ray, name)

    def get(self, reference, **options):
        found = self.ray.get(reference, **options)
        self.bytes += sum(part.size for part in found) if isinstance(found, list) else 0
        return found

    def put(self, parts):
        self.bytes += sum(part.size for part in parts)
        return self.ray.put(parts)


@pytest.mark.long
def test_the_bytes_through_the_driver_do_not_grow_with_the_states(cluster, monkeypatch):
    """Measured at the driver's only ways in and out of the object store."""
    from metadist.workers.ray import executor as module

    through = []
    for ballast in (10_000, 1_000_000):
        learner, counting = population(ballast), Counting(cluster)
        actors = executor(learner, TWO)
        monkeypatch.setattr(module, "ray", counting)
        _, fleet = train(actors, learner, 3)
        monkeypatch.undo()
        through.append(counting.bytes)
        states = [cluster.get(output.stored) for output in actors._kept.outputs.values()]
        assert sum(part.size for parts in states for part in parts) > 6 * 4 * ballast, "the states are this large"
        actors.close()
        assert fleet.measured.read().counts["bytes_received"] == counting.bytes > 0
    assert through[1] < 1.05 * through[0]
