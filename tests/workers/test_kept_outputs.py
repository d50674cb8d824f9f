"""Where an executor keeps outputs: what a round drops, what a lost output leaves, and which θ an output belongs to."""

from __future__ import annotations

from dataclasses import replace

from metadist.core.computation import Gradient, Rollout
from metadist.core.round import Shard
from metadist.workers.kept_outputs import KeptOutputs

ROLLOUT = Shard("run", 3, 0, 2, Rollout(), 4, 2, 7, keeps=True)
GRADIENT = replace(ROLLOUT, round=1, index=0, computation=Gradient(), keeps=False, needs=(ROLLOUT.key,))


def rolled():
    """The state after the rollouts of a meta-step."""
    kept: KeptOutputs[str, str] = KeptOutputs()
    kept.publish(0, "θ0")
    call = kept.call(ROLLOUT, 1)
    assert kept.keep_answer(call, "trials")
    kept.publish(1, "θ1")
    return kept, call


def test_a_round_drops_the_parameters_that_no_output_comes_from():
    kept, call = rolled()
    kept.publish(2, "θ2")
    assert kept.thetas == {0: (call.version, "θ0"), 2: (3, "θ2")}
    assert kept.lacking(GRADIENT) == ()
    assert [(o.token, o.stored) for o in kept.needed(GRADIENT)] == [(call.token, "trials")]


def test_round_0_drops_everything():
    kept, _ = rolled()
    kept.publish(0, "θ3")
    assert list(kept.thetas) == [0]
    assert kept.lacking(GRADIENT) == (ROLLOUT.key,)


def test_parameters_are_held_for_outputs_that_lie_elsewhere():
    kept: KeptOutputs[str, str] = KeptOutputs()
    kept.publish(0, "θ0")
    kept.hold(0)
    kept.publish(1, "θ1")
    assert list(kept.thetas) == [0, 1]


def test_an_answer_under_other_parameters_is_not_kept():
    kept: KeptOutputs[str, str] = KeptOutputs()
    kept.publish(0, "θ0")
    late = kept.call(ROLLOUT, 1)
    kept.publish(0, "another θ0")
    assert not kept.keep_answer(late, "trials")
    assert kept.outputs == {}


def test_calls_name_what_they_need_and_have_tokens_of_their_own():
    kept, rollout = rolled()
    first, second = kept.call(GRADIENT, 1), kept.call(GRADIENT, 2)
    assert first.needs == second.needs == ((ROLLOUT, rollout.token),)
    assert len({rollout.token, first.token, second.token}) == 3
    assert first.version == second.version == kept.thetas[1][0]


def test_a_lost_output_is_forgotten_once():
    kept, _ = rolled()
    call = kept.call(GRADIENT, 1)
    assert kept.forget(call, (ROLLOUT.key, (9, 9, 9))) == (ROLLOUT.key,)
    assert kept.forget(call, (ROLLOUT.key,)) == ()
    kept.keep(ROLLOUT, "trials, computed again")
    assert kept.forget(call, (ROLLOUT.key,)) == (), "the call lacked the output of an earlier attempt"
    assert kept.lacking(GRADIENT) == ()
