"""Every meta-environment, policy and algorithm of meta-reinforcement learning has the properties of
``metadist.testing``.

A new component is tested by its line in the table. Every pair meets in the default run, every triple in the long one.
"""

from __future__ import annotations

import dataclasses
import itertools
from functools import cache

import pytest
from test_conformance import covering

from metadist.algorithms import ALGORITHMS
from metadist.config.components import model_factory
from metadist.core.errors import ConfigError
from metadist.environments import ENVIRONMENTS
from metadist.learners.trials import TrialLearner
from metadist.models import MODELS, PolicyConfig
from metadist.rl.algorithm import TrialAlgorithm
from metadist.rl.environment import MetaEnvironment
from metadist.testing import TRIAL_PROPERTIES, check_model
from metadist.testing.running import meta_step
from metadist.testing.trials import build

#: given to every config that has such a field, to make it small
SETTINGS = {"hidden": 8, "width": 8, "horizon": 4, "rollouts_per_task": 3, "minibatches": 1, "epochs": 2, "window": 4}


def built(cls):
    given = {f.name: SETTINGS[f.name] for f in dataclasses.fields(cls) if f.name in SETTINGS}
    if isinstance(next((f.default for f in dataclasses.fields(cls) if f.name == "hidden"), 0), tuple):
        given["hidden"] = (8,)
    return cls(**given)


@cache
def learner(algorithm, environment, model) -> TrialLearner:
    world, method, config = built(ENVIRONMENTS[environment]), built(ALGORITHMS[algorithm]), built(MODELS[model])
    return build(method, world, model_factory(config, world, method))


#: simulators need packages, and have tests of their own; tests/environments checks each environment alone
NATIVE = ("bandit", "correlated_bandit", "gridworld", "navigation", "tabular_mdp")
TRIAL_ALGORITHMS = [name for name, cls in ALGORITHMS.items() if issubclass(cls, TrialAlgorithm)]
POLICIES = [name for name, cls in MODELS.items() if issubclass(cls, PolicyConfig)]


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


@pytest.fixture(
    params=[pytest.param(t, id="-".join(t), marks=() if t in SHORT else pytest.mark.long) for t in FITTING],
    scope="module",
)
def subject(request):
    return learner(*request.param)


def test_everything_is_in_some_combination():
    assert set(NATIVE) <= set(ENVIRONMENTS)
    assert all(issubclass(cls, MetaEnvironment) for cls in ENVIRONMENTS.values())
    for place, names in enumerate((TRIAL_ALGORITHMS, NATIVE, POLICIES)):
        assert {triple[place] for triple in FITTING} == set(names)


@pytest.mark.parametrize(("triple", "reason"), REFUSED.items(), ids=map("-".join, REFUSED))
def test_what_does_not_fit_says_why_in_one_line(triple, reason):
    assert "does not suit" in reason
    assert "\n" not in reason


@pytest.mark.lane("numerics")
@pytest.mark.parametrize("property", TRIAL_PROPERTIES)
def test_every_combination(subject, property):
    TRIAL_PROPERTIES[property](subject)


@pytest.mark.lane("numerics")
def test_learning_starts_from_the_policy_that_rolled_out(subject):
    """The policy's own log-probabilities are those that the first update compares with."""
    assert abs(meta_step(subject, subject.initial(0), 0).report.get("first_kl", 0.0)) < 1e-6


@pytest.mark.parametrize("name", POLICIES)
def test_every_policy(name):
    check_model(built(MODELS[name]))
