"""Rounds that need outputs of earlier rounds, in this process: lost outputs are computed again, and nothing changes."""

from __future__ import annotations

import random
from collections import Counter
from dataclasses import replace

import pulls
import pytest
import torch
from faults import everywhere

from metadist.core.computation import Gradient, Rollout
from metadist.core.errors import WorkerError
from metadist.core.round import EvaluationRequest, Failed, Finished, MetaStepKey, Shard, run_rounds
from metadist.core.state import Contribution, Records
from metadist.training.scheduler import MAX_FAILURES, Scheduler, fault_of
from metadist.workers.local import LocalExecutor
from metadist.workers.worker import TaskError, Worker, aligned

SEED, STEPS = pulls.SEED, 4


def train(learner, fault=None, kind=LocalExecutor, steps=STEPS):
    executor = kind(learner)
    fleet = Scheduler(everywhere(fault)(executor) if fault else executor, learner)
    state = learner.initial(SEED)
    for step in range(steps):
        state, _ = run_rounds(learner.meta_step(MetaStepKey("run", step, SEED), state), fleet.sum)
    executor.close()
    return state, fleet


EXPECTED = train(pulls.learner())[0].sha256()


def forgetful(chance, likelihood=0.3, rounds=range(1, 1000)):
    """Drops kept outputs at random, whenever a shard of ``rounds`` is given out."""

    def forget(executor, shard):
        outputs = executor._kept.outputs
        for key in list(outputs):
            if shard.round in rounds and chance.random() < likelihood:
                del outputs[key]

    return forget


def test_a_trial_counts_once():
    _, fleet = train(pulls.learner())
    assert fleet.tasks_done == 12 * STEPS
    assert fleet.retried == Counter()


@pytest.mark.parametrize("seed", range(3))
def test_lost_outputs_are_rolled_out_anew_from_the_parameters_of_their_round(seed):
    """θ has moved on by then: under the new one the trials, and the result, would be others."""
    state, fleet = train(pulls.learner(), forgetful(random.Random(seed), 0.1))
    assert fleet.retried["missing"] > 5
    assert state.sha256() == EXPECTED
    assert fleet.tasks_done == 12 * STEPS


def test_trials_of_another_theta_would_give_another_result():
    """Else the test above could not fail."""
    learner = pulls.learner()

    class Mistaken(LocalExecutor):
        def publish(self, meta_step, round, state):
            size = super().publish(meta_step, round, state)
            self._kept.thetas = dict.fromkeys(self._kept.thetas, self._kept.thetas[meta_step, round])
            return size

    state, fleet = train(learner, forgetful(random.Random(0), 0.1), Mistaken)
    assert fleet.retried["missing"] > 5
    assert state.sha256() != EXPECTED


@pytest.mark.lane("numerics")
@pytest.mark.parametrize("seed", range(3))
def test_a_lost_output_whose_own_needs_are_lost_too(seed):
    learner = pulls.learner(kind=pulls.Relay)
    expected, _ = train(learner)
    assert expected.sha256() != EXPECTED
    state, fleet = train(learner, forgetful(random.Random(seed), 0.1))
    assert fleet.retried["missing"] > 5
    assert state.sha256() == expected.sha256()
    assert fleet.tasks_done == 12 * STEPS


def test_an_output_that_is_always_lost_ends_the_run():
    with pytest.raises(
        WorkerError,
        match=rf"meta-step 0, round 1, shard . .*seed {SEED}.* lacked outputs that it needs {MAX_FAILURES + 1} times",
    ):
        train(pulls.learner(), forgetful(random.Random(0), 1.0, rounds=[0, 1]))


def test_outputs_of_earlier_meta_steps_are_dropped():
    seen = []

    def look(executor, shard):
        seen.append({key[0] for key in executor._kept.outputs} - {shard.meta_step})
        assert len(executor._kept.thetas) <= 2, "that of the rollouts, and the newest"

    train(pulls.learner(), look)
    assert not any(seen)


def rolled(learner):
    state = learner.initial(SEED)
    round = next(learner.meta_step(MetaStepKey("run", 0, SEED), state))
    return state, round, [learner.compute(shard, state.slots) for shard in round.shards]


def test_what_other_functions_than_gradients_sum_has_no_slots_and_is_finite():
    learner = pulls.learner()
    state, round, results = rolled(learner)
    shard, result = round.shards[0], results[0].result
    assert fault_of(result, shard, learner, True) is None
    slots = {"model": torch.zeros_like(state.slots["model"])}
    assert fault_of(replace(result, slots=slots), shard, learner, True) == "slots ['model'], expected []"
    metrics = {**result.metrics, "advantage": float("nan")}
    assert fault_of(replace(result, metrics=metrics), shard, learner, True) == "'advantage' is nan"
    assert "weight inf" in str(fault_of(replace(result, weight=float("inf")), shard, learner, True))
    gradient = replace(shard, round=1, computation=Gradient(), needs=(shard.key,), keeps=False)
    assert fault_of(Contribution({}, 8.0, 2, {}), gradient, learner, True) == "slots [], expected ['model']"
    assert fault_of(Contribution(slots, 8.0, 2, {"kl": float("nan")}), gradient, learner, True) is None


def test_a_result_is_not_counted_twice_though_its_shard_went_out_again():
    """The output of a shard is lost after its result was summed: what the second attempt brings is its output alone."""

    class Twice(LocalExecutor):
        def wait(self, timeout):
            events = super().wait(timeout)
            return events * 2 if events and isinstance(events[0], Finished) else events

    state, fleet = train(pulls.learner(), forgetful(random.Random(1), 0.1), Twice)
    assert state.sha256() == EXPECTED
    assert fleet.measured.read().counts["duplicates"] > 10


# ---- what a worker does with them


def worker(learner):
    return Worker(learner, name="w", device="cpu", gpus=0, threads=1)


def test_a_task_that_breaks_its_environment_is_named(tmp_path):
    (tmp_path / "deed").write_text("raise 5")
    learner = pulls.learner(tmp_path)
    state = learner.initial(SEED)
    shard = next(learner.meta_step(MetaStepKey("run", 0, SEED), state)).shards[2]
    with pytest.raises(TaskError, match="the arm of task 5 is stuck") as caught:
        worker(learner).compute(shard, state.slots)
    assert caught.value.tasks == (5,)


def test_a_task_whose_gradient_raises_is_named_by_its_own_trials():
    learner = pulls.learner(algorithm=pulls.Clumsy(epochs=2, minibatches=2, of=5))
    state, round, results = rolled(learner)
    shard = replace(round.shards[2], round=1, keeps=False, needs=(round.shards[2].key,))
    shard = replace(shard, computation=Gradient((("deviation", 1.0), ("mean", 0.0))))
    with pytest.raises(TaskError, match="no way back") as caught:
        worker(learner).compute(shard, state.slots, [results[2].output])
    assert caught.value.tasks == (5,)


def test_a_shard_that_keeps_must_have_an_output():
    learner = pulls.learner()
    state = learner.initial(SEED)
    shard = Shard("run", 0, 0, 0, Rollout(), 0, 2, SEED)
    with pytest.raises(TaskError, match="function 'rollout' has an output; the shard says otherwise"):
        worker(learner).compute(shard, state.slots)
    with pytest.raises(TaskError, match="function 'evaluate' has no output; the shard says otherwise"):
        judged = learner.evaluation(EvaluationRequest(MetaStepKey("run", 0, SEED), "validation", 2), state).shards[0]
        worker(learner).compute(replace(judged, keeps=True), state.slots)


def test_kept_columns_are_as_a_receiver_would_have_them():
    table = torch.arange(40.0).view(4, 10)
    kept = aligned(Records({"strided": table.t()[1:], "late": table.view(-1)[1:], "good": table}), torch.device("cpu"))
    for column in kept.columns.values():
        assert column.is_contiguous()
        assert column.data_ptr() % 64 == 0
    assert torch.equal(kept.columns["strided"], table.t()[1:])
    assert kept.columns["good"] is table


def test_a_failure_names_what_is_missing():
    learner = pulls.learner()
    executor = LocalExecutor(learner)
    executor.publish(0, 0, learner.initial(SEED))
    shard = Shard("run", 0, 1, 0, Gradient(), 0, 2, SEED, needs=((0, 0, 0), (0, 0, 3)))
    executor.submit(shard, 1)
    [event] = executor.wait(0.1)
    assert isinstance(event, Failed)
    assert (event.kind, event.missing) == ("missing", shard.needs)
    executor.close()
