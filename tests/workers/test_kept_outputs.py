"""Where an executor keeps outputs: what a round drops, what a lost output leaves, and which θ an output belongs to."""

from __future__ import annotations

from dataclasses import replace

from metadist.core.computation import Advance, Gradient, LoadStates, Rollout
from metadist.core.round import Shard
from metadist.workers.kept_outputs import KeptOutputs

ROLLOUT = Shard("run", 3, 0, 2, Rollout(), 4, 2, 7, keeps=True)
GRADIENT = replace(ROLLOUT, round=1, index=0, computation=Gradient(), keeps=False, needs=(ROLLOUT.key,))


def rolled():
    """The state after the rollouts of a meta-step."""
    kept: KeptOutputs[str, str] = KeptOutputs()
    kept.publish(3, 0, "θ0")
    call = kept.call(ROLLOUT, 1)
    assert kept.keep_answer(call, "trials")
    kept.publish(3, 1, "θ1")
    return kept, call


def test_a_round_drops_the_parameters_that_no_output_comes_from():
    kept, call = rolled()
    kept.publish(3, 2, "θ2")
    assert kept.thetas == {(3, 0): (call.version, "θ0"), (3, 2): (3, "θ2")}
    assert kept.lacking(GRADIENT) == ()
    assert [(o.token, o.stored) for o in kept.needed(GRADIENT)] == [(call.token, "trials")]


def test_round_0_drops_everything():
    kept, _ = rolled()
    kept.publish(4, 0, "θ3")
    assert list(kept.thetas) == [(4, 0)]
    assert kept.lacking(GRADIENT) == (ROLLOUT.key,)


def test_parameters_are_held_for_outputs_that_lie_elsewhere():
    kept: KeptOutputs[str, str] = KeptOutputs()
    kept.publish(3, 0, "θ0")
    kept.hold(ROLLOUT)
    kept.publish(3, 1, "θ1")
    assert list(kept.thetas) == [(3, 0), (3, 1)]


def test_an_answer_under_other_parameters_is_not_kept():
    kept: KeptOutputs[str, str] = KeptOutputs()
    kept.publish(3, 0, "θ0")
    late = kept.call(ROLLOUT, 1)
    kept.publish(3, 0, "another θ0")
    assert not kept.keep_answer(late, "trials")
    assert kept.outputs == {}


def test_calls_name_what_they_need_and_have_tokens_of_their_own():
    kept, rollout = rolled()
    first, second = kept.call(GRADIENT, 1), kept.call(GRADIENT, 2)
    assert first.needs == second.needs == ((ROLLOUT, rollout.token),)
    assert len({rollout.token, first.token, second.token}) == 3
    assert first.version == second.version == kept.thetas[3, 1][0]


def test_a_lost_output_is_forgotten_once():
    kept, _ = rolled()
    call = kept.call(GRADIENT, 1)
    assert kept.forget(call, (ROLLOUT.key, (9, 9, 9))) == (ROLLOUT.key,)
    assert kept.forget(call, (ROLLOUT.key,)) == ()
    kept.keep(ROLLOUT, "trials, computed again")
    assert kept.forget(call, (ROLLOUT.key,)) == (), "the call lacked the output of an earlier attempt"
    assert kept.lacking(GRADIENT) == ()


def advanced(meta_step, kept, index=0):
    """Keep a state of ``meta_step``, and return the call that made it."""
    needs = ((meta_step - 1, 0, index),) if meta_step > 4 else ()
    shard = Shard("run", meta_step, 0, index, Advance(), 0, 2, 7, key_step=meta_step, keeps=True, needs=needs)
    call = kept.call(shard, 1)
    assert kept.keep_answer(call, f"state after {meta_step}")
    return call


def test_states_wait_for_the_next_meta_step_and_their_parameters_until_the_states_can_be_loaded():
    kept: KeptOutputs[str, str] = KeptOutputs()
    for meta_step in (4, 5, 6):
        kept.publish(meta_step, 0, f"θ{meta_step}")
        assert sorted({key[0] for key in kept.outputs}) == [meta_step - 1] * (meta_step > 4), "those of the step before"
        call = advanced(meta_step, kept)
        assert call.since == max(4, meta_step - 1), "a worker may drop what is older"
    kept.publish(7, 0, "θ of a validation")
    assert list(kept.thetas) == [(4, 0), (5, 0), (6, 0), (7, 0)]
    assert list(kept.outputs) == [(6, 0, 0)]
    kept.release(6)
    kept.publish(7, 0, "θ7")
    assert list(kept.thetas) == [(6, 0), (7, 0)]


def test_a_shard_that_loads_states_needs_no_parameters():
    kept: KeptOutputs[str, str] = KeptOutputs()
    kept.publish(7, 0, "θ7")
    call = kept.call(Shard("run", 6, 0, 0, LoadStates("folder"), 0, 2, 7, keeps=True), 1)
    assert call.version == 0
    assert kept.keep_answer(call, "the state")
    assert list(kept.outputs) == [(6, 0, 0)]
