"""Every schedule of every algorithm acts in all functions: in rollouts, update rounds and evaluations."""

from __future__ import annotations

import dataclasses

import pytest
from trials import Chance, learner, train

from metadist.algorithms import ALGORITHMS
from metadist.core.differences import difference
from metadist.core.errors import ConfigError
from metadist.core.round import EvaluationRequest, MetaStepKey
from metadist.models.reactive import Reactive
from metadist.rl.algorithm import PolicySearch, TrialAlgorithm
from metadist.testing.running import compute_round, meta_step

SMALL = {"epochs": 1, "minibatches": 1, "rollouts_per_task": 3, "cg_steps": 2, "backtracks": 2}
START, END = 0.0, 0.9
TRIAL_ALGORITHMS = {name: cls for name, cls in ALGORITHMS.items() if issubclass(cls, TrialAlgorithm)}


def schedules(cls):
    """Return the settings of ``cls`` that have a final value and a number of meta-steps to it."""
    names = {f.name for f in dataclasses.fields(cls)}
    return [n.removeprefix("final_") for n in sorted(names) if n.startswith("final_")]


CASES = [
    (name, schedule, optimizer)
    for name, cls in TRIAL_ALGORITHMS.items()
    for schedule in schedules(cls)
    for optimizer in ("ppo", "trpo")
]


def subject(name, optimizer="ppo", **settings):
    cls = TRIAL_ALGORITHMS[name]
    small = {f.name: SMALL[f.name] for f in dataclasses.fields(cls) if f.name in SMALL}
    environment = Chance(continuous=True, end=0.2, horizon=5)
    return learner(cls(optimizer=optimizer, **small, **settings), Reactive(hidden=(4,)), environment, batch=4, shard=2)


def test_all_schedules_are_cases():
    assert {c[:2] for c in CASES} == {(n, s) for n in ("rl2", "maml_rl") for s in ("entropy", "gae_lambda")}


@pytest.mark.lane("numerics")
@pytest.mark.parametrize(("name", "schedule", "optimizer"), CASES, ids=map("-".join, CASES))
def test_a_schedule_changes_the_parameters_after_its_first_meta_step(name, schedule, optimizer):
    line = {schedule: START, f"final_{schedule}": END, f"{schedule}_steps": 1}
    scheduled, constant = subject(name, optimizer, **line), subject(name, optimizer, **{schedule: START})
    first, _ = train(scheduled, 1)
    assert first.sha256() == train(constant, 1)[0].sha256()
    moved = subject(name, optimizer, **{schedule: END})
    # Meta-step 1 is that of the final value in all its rounds, the rollout's statistics too.
    second, constant, end = (meta_step(s, first, 1).state.sha256() for s in (scheduled, constant, moved))
    assert second == end != constant


@pytest.mark.parametrize("number", [0, 1])
def test_evaluations_adapt_with_lambda_of_their_meta_step(number):
    line = {"gae_lambda": START, "final_gae_lambda": END, "gae_lambda_steps": 1}
    scheduled, start, end = (subject("maml_rl", **s) for s in (line, {"gae_lambda": START}, {"gae_lambda": END}))
    state = start.initial(0)
    scheduled, start, end = (judged(s, state, number) for s in (scheduled, start, end))
    assert difference(start, end)
    assert not difference(scheduled, end if number else start)


def judged(subject, state, number):
    request = EvaluationRequest(MetaStepKey("run", number, 0), "test", 4, None)
    return compute_round(subject, subject.evaluation(request, state), {}, {}).columns


@pytest.mark.parametrize(("name", "schedule"), sorted({c[:2] for c in CASES}))
def test_a_final_value_without_steps_is_refused(name, schedule):
    with pytest.raises(
        ConfigError, match=rf"algorithm\.final_{schedule}: 0\.5 has no effect without .*{schedule}_steps"
    ):
        TRIAL_ALGORITHMS[name](**{f"final_{schedule}": 0.5})


def test_own_algorithms_are_asked_for_their_settings_once_for_each_shard():
    """``at`` of an own algorithm gives the object whose functions are called."""

    @dataclasses.dataclass(frozen=True)
    class Recording(TRIAL_ALGORITHMS["rl2"]):
        meta_step: int = -1

        def at(self, meta_step):
            return dataclasses.replace(super().at(meta_step), meta_step=meta_step)

        def rollout(self, theta, context):
            assert self.meta_step == context.meta_step
            return super().rollout(theta, context)

        def evaluate(self, theta, context, inner_steps):
            assert self.meta_step == context.meta_step
            return super().evaluate(theta, context, inner_steps)

        def settings_of(self, statistics):
            assert self.meta_step >= 0
            return super().settings_of(statistics)

    assert issubclass(Recording, PolicySearch)
    found = learner(Recording(minibatches=1), Reactive(hidden=(4,)), Chance(), batch=4, shard=2)
    state, _ = train(found, 2)
    judged(found, state, 2)
