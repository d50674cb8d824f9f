"""What every meta-environment, policy and algorithm of meta-reinforcement learning must keep, in every combination
that fits.

A new one is tested by its line in the dict. Every pair meets in the default run, every triple in the long one.
"""

from __future__ import annotations

import dataclasses
import itertools
from functools import cache

import pytest
import torch
from test_conformance import covering

from metadist.algorithms import ALGORITHMS
from metadist.algorithms.maml_rl import MAMLRL
from metadist.core.errors import ConfigError
from metadist.core.model import Model
from metadist.core.outer import OuterLoop
from metadist.core.round import MetaStepKey, WithOutput, run_rounds
from metadist.core.state import Contribution, Records, TreeSum
from metadist.environments import ENVIRONMENTS
from metadist.learners.trials import TrialLearner
from metadist.models import MODELS
from metadist.rl.algorithm import TrialAlgorithm
from metadist.rl.environment import Continuous, MetaEnvironment
from metadist.rl.trial import VALID, Trials

#: given to every config that has such a field, to make it small
SETTINGS = {"hidden": 8, "width": 8, "horizon": 4, "rollouts_per_task": 3, "minibatches": 1, "epochs": 2, "window": 4}
OUTER = OuterLoop(meta_batch_size=6, shard_size=4, lr=1e-2)


def built(cls):
    given = {f.name: SETTINGS[f.name] for f in dataclasses.fields(cls) if f.name in SETTINGS}
    if isinstance(next((f.default for f in dataclasses.fields(cls) if f.name == "hidden"), 0), tuple):
        given["hidden"] = (8,)
    return cls(**given)


@cache
def learner(algorithm, environment, model) -> TrialLearner:
    world, method, config = built(ENVIRONMENTS[environment]), built(ALGORITHMS[algorithm]), built(MODELS[model])
    policy = Model(
        lambda: config.build_policy(world.observation_size, world.actions.size, isinstance(world.actions, Continuous))
    )
    return TrialLearner(method, policy, world, OUTER)


#: simulators need packages, and have tests of their own
NATIVE = ("bandit", "correlated_bandit", "gridworld", "navigation", "tabular_mdp")
TRIAL_ALGORITHMS = [name for name, cls in ALGORITHMS.items() if issubclass(cls, TrialAlgorithm)]
POLICIES = [name for name, cls in MODELS.items() if hasattr(cls, "build_policy")]


def refusal(*triple) -> str | None:
    try:
        learner(*triple)
    except ConfigError as error:
        return str(error)
    return None


TRIPLES = list(itertools.product(TRIAL_ALGORITHMS, NATIVE, POLICIES))
REFUSED = {triple: reason for triple in TRIPLES if (reason := refusal(*triple))}
FITTING = [triple for triple in TRIPLES if triple not in REFUSED]
SHORT = covering(FITTING)


def test_everything_is_in_some_combination():
    assert set(NATIVE) <= set(ENVIRONMENTS)
    assert all(issubclass(cls, MetaEnvironment) for cls in ENVIRONMENTS.values())
    for place, names in enumerate((TRIAL_ALGORITHMS, NATIVE, POLICIES)):
        assert {triple[place] for triple in FITTING} == set(names)


@pytest.mark.parametrize(("triple", "reason"), REFUSED.items(), ids=map("-".join, REFUSED))
def test_what_does_not_fit_says_why_in_one_line(triple, reason):
    assert "does not suit" in reason
    assert "\n" not in reason


@pytest.fixture(
    params=[pytest.param(t, id="-".join(t), marks=() if t in SHORT else pytest.mark.long) for t in FITTING],
    scope="module",
)
def subject(request):
    return learner(*request.param)


def meta_steps(subject, count=2, seed=0):
    """(state, reports, all results by shard) after ``count`` meta-steps in this process."""
    state, reports, results = subject.initial(seed), [], {}
    for step in range(count):
        kept = {}

        def run(round, kept=kept):
            total = TreeSum(len(round.shards), Contribution.__add__)
            for shard in round.shards:
                result = subject.compute(shard, round.parameters.slots, [kept[key] for key in shard.needs])
                if isinstance(result, WithOutput):
                    kept[shard.key], result = result.output, result.result
                results[shard] = result
                total.add(shard.index, result)
            return total.result()

        state, report = run_rounds(subject.meta_step(MetaStepKey("run", step, seed), state), run)
        reports.append(report)
    return state, reports, results


def test_learning_is_a_pure_function_of_the_seed(subject):
    first, second, other = meta_steps(subject), meta_steps(subject), meta_steps(subject, seed=1)
    assert first[0].sha256() == second[0].sha256() != other[0].sha256()
    assert first[0].sha256() != subject.initial(0).sha256()
    assert first[1] == second[1]
    for report in first[1]:
        assert all(torch.isfinite(torch.tensor(v)) for v in report.values()), report


def test_a_trial_does_not_depend_on_the_shard_that_it_is_in(subject):
    """What is drawn, at any rate; a matrix product's last bit may depend on the number of rows."""
    shards = subject.shards(MetaStepKey("run", 0, 0), "rollout", split="train", tasks=6)
    outputs = [subject.compute(dataclasses.replace(s, keeps=True), subject.initial(0).slots).output for s in shards]
    alone = subject.compute(
        dataclasses.replace(shards[0], start=5, count=1, keeps=True), subject.initial(0).slots
    ).output
    for name, column in Records.concatenate(outputs).columns.items():
        if column.shape[0] == 6 and column.shape[1:] == alone.columns[name].shape[1:]:
            torch.testing.assert_close(column[5:], alone.columns[name], rtol=1e-4, atol=1e-5, msg=name)


def test_rollouts_are_whole_trials(subject):
    """Flags end where they should, and the policy's own log-probabilities are those that learning starts from."""
    if isinstance(subject.algorithm, MAMLRL):
        pytest.skip("its trials are stages of a gradient descent")
    (shard, _) = subject.shards(MetaStepKey("run", 0, 0), "rollout", split="train", tasks=6)
    trials = Trials.of(subject.compute(dataclasses.replace(shard, keeps=True), subject.initial(0).slots).output)
    assert bool((trials.flag(8).sum(1) == 1).all())
    assert bool((trials.flag(4).sum(1) == subject.tasks.episodes).all())
    assert bool((trials.flag(VALID).sum(1) <= subject.tasks.steps).all())
    _, reports, _ = meta_steps(subject, count=1)
    assert abs(reports[0].get("first_kl", 0.0)) < 1e-6


def test_evaluation_has_a_row_for_every_trial(subject):
    round = subject.evaluation("run", 0, 0, subject.initial(0), split="test", tasks=6, inner_steps=None)
    records = Records.concatenate([subject.compute(shard, round.parameters.slots) for shard in round.shards])
    assert records.rows == 6
    assert records.columns["task"].tolist() == list(range(6))
    for name in ("greedy", "sampled"):
        assert records.columns[name].shape == (6, subject.algorithm.episodes(subject.tasks))
        assert bool(torch.isfinite(records.columns[name]).all())
