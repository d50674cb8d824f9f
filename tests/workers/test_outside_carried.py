"""Remote workers that hold the states of particles: the same bits, whoever leaves, and states that stay with them."""

from __future__ import annotations

import long_trials
import particles
import pytest
from outsiders import HERE, OUTSIDE, Hand, hands, train, wait_for
from ports import free_port

from metadist.config.build import build
from metadist.core.computation import Advance, LoadStates, SaveStates
from metadist.core.round import Shard
from metadist.workers.calls import Call
from metadist.workers.joint import JointExecutor
from metadist.workers.remote import service
from metadist.workers.remote.codec import lease_messages, lease_of

pytestmark = pytest.mark.lane("services")

STEPS = "outer.meta_steps=6"


def experiment(*groups, overrides=(), document=particles.document):
    listen = [f"outside={{listen: '127.0.0.1:{free_port()}'}}"] if any(g.get("outside") for g in groups) else []
    found = document(STEPS, "outer.shard_size=1", *overrides, *listen)
    return build({**found, "workers": [dict(g) for g in groups]})


@pytest.fixture(scope="module")
def expected():
    return train(experiment(HERE))[0]


@pytest.mark.parametrize("groups", [(OUTSIDE,), (HERE, OUTSIDE)], ids=["remote", "remote and here"])
def test_the_bits_of_this_process(expected, groups):
    run = experiment(*groups)
    with hands(run, "learner", "learner"):
        sha256, scheduler = train(run)
    assert sha256 == expected
    assert set(scheduler.retried) <= {"missing"}, "at most for states that one side lacked"


@pytest.mark.parametrize("document", [particles.document, long_trials.document], ids=["particles", "long trials"])
def test_a_holder_leaves_and_its_states_are_computed_again(document):
    """Of long trials: a worker plays the next steps, another one learns from them."""
    alone, run = (experiment(group, document=document) for group in (HERE, {**OUTSIDE, "min": 2}))
    left = []
    with hands(run, "learner", "learner") as working:

        def leave(step, scheduler):
            if step == 3:
                working[0].stop()
                working[0].join()
                wait_for(lambda: len(scheduler.executor.workers()) == 1, scheduler)
                left.append(step)

        sha256, scheduler = train(run, each=leave)
    assert left
    assert sha256 == train(alone)[0]
    assert scheduler.retried["missing"] >= 1


def test_all_holders_leave(expected):
    run = experiment({**OUTSIDE, "min": 1})
    others = []
    with hands(run, "learner") as working:

        def leave(step, scheduler):
            if step == 3:
                working[0].stop()
                working[0].join()
                wait_for(lambda: not scheduler.executor.workers(), scheduler)
                others.append(Hand(run, name="other"))

        sha256, scheduler = train(run, each=leave)
        for other in others:
            other.stop()
            other.join()
    assert sha256 == expected
    assert scheduler.retried["missing"] >= 3 * 5 - 1, "every state is computed again from the first meta-step on"


def test_states_do_not_pass_through_the_driver(monkeypatch):
    """Measured where the driver reads the frames of its workers, for small states and for ones of a megabyte."""
    received = []
    take = service.Arriving.take
    monkeypatch.setattr(service.Arriving, "take", lambda self, data: (received.append(len(data)), take(self, data))[1])
    through = []
    for ballast in (0, 250_000):
        run = experiment({**OUTSIDE, "min": 1}, overrides=[f"algorithm.ballast={ballast}"])
        received.clear()
        with hands(run, "learner"):
            _, scheduler = train(run)
        assert not isinstance(scheduler.executor, JointExecutor)
        through.append(scheduler.measured.read().counts["bytes_received"])
    assert through[1] < 1.05 * through[0]


def test_leases_of_states_arrive_as_they_were_sent():
    for computation in (Advance(), SaveStates("s3://bucket/run/states/step-00000003"), LoadStates("/shared/states")):
        shard = Shard("run", 3, 0, 2, computation, 4, 2, 7, key_step=3, keeps=computation.carries, needs=((2, 0, 2),))
        call = Call(shard, 1, 5, 9, ((shard, 8),), since=2)
        lease = next(iter(lease_messages(call, None, (None,)))).lease
        assert lease_of(lease, []).call == call
