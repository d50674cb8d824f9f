"""Test the rules that hold for all native meta-environments."""

import pytest

from metadist.core.errors import ConfigError
from metadist.environments import ENVIRONMENTS, Bandit, CorrelatedBandit, Gridworld, Navigation, TabularMDP
from metadist.environments.simulated import SimulatedEnvironment
from metadist.testing import check_environment

ALL = [
    *(cls() for cls in ENVIRONMENTS.values() if not issubclass(cls, SimulatedEnvironment)),
    Bandit(arms=3, reward="gaussian", prior_mean=1.0, prior_deviation=0.5),
    *(CorrelatedBandit(arms_are=kind) for kind in ("easy", "independent")),
    TabularMDP(states=3, actions_each=2, horizon=4),
    Gridworld(size=6, held_out_goals=5),
    Navigation(reward="squared"),
]


@pytest.mark.parametrize("environment", ALL, ids=repr)
def test_every_environment_and_its_variants(environment):
    """A pure function of key and noise, the same in any batch, with tasks of their own for every key, played in
    whole trials.
    """
    check_environment(environment, another_process=False)
    assert environment.protocol("test")


@pytest.mark.parametrize(
    ("cls", "wrong", "message"),
    [
        (Bandit, {"arms": 1}, r"environment\.arms: 1 is below 2"),
        (Bandit, {"reward": "poisson"}, r"environment\.reward: 'poisson' is not one of bernoulli, gaussian"),
        (Bandit, {"prior_deviation": 0.0}, r"environment\.prior_deviation: 0\.0"),
        (CorrelatedBandit, {"arms_are": "esay"}, r"environment\.arms_are: 'esay'.*did you mean 'easy'"),
        (CorrelatedBandit, {"episodes": 0}, r"environment\.episodes: 0 is below 1"),
        (TabularMDP, {"states": 1}, r"environment\.states: 1 is below 2"),
        (Gridworld, {"size": 2}, r"environment\.size: 2 is below 3"),
        (Gridworld, {"held_out_goals": 11}, r"environment\.held_out_goals: 11 .* none of 21 goals"),
        (Navigation, {"speed": -1.0}, r"environment\.speed: -1\.0"),
        (Navigation, {"horizon": 0}, r"environment\.horizon: 0 is below 1"),
    ],
)
def test_impossible_settings_are_named(cls, wrong, message):
    with pytest.raises(ConfigError, match=message):
        cls(**wrong)
