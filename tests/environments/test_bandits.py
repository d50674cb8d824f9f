import math

import pytest
import torch

from metadist.core.random import TaskKey
from metadist.environments import Bandit, CorrelatedBandit

MANY = 20_000


def mean_of(environment):
    return environment.sample(TaskKey.of(0, "test", 0, range(MANY)))["mean"].double()


def near(values, mean, deviation):
    """Sample mean and deviation are within 4 standard errors (normal or flatter) of the distribution's."""
    assert abs(values.mean() - mean) < 4 * deviation / math.sqrt(values.numel())
    assert abs(values.std() - deviation) < 4 * deviation / math.sqrt(2 * values.numel())


def test_arms_are_uniform_and_independent():
    mean = mean_of(Bandit(arms=5))
    assert mean.shape == (MANY, 5) and mean.min() >= 0 and mean.max() < 1
    for arm in range(5):
        near(mean[:, arm], 0.5, 1 / math.sqrt(12))
    assert (torch.corrcoef(mean.T) - torch.eye(5)).abs().max() < 4 / math.sqrt(MANY)


def test_gaussian_arms_and_rewards():
    environment = Bandit(arms=4, reward="gaussian", prior_mean=2.0, prior_deviation=3.0)
    near(mean_of(environment), 2.0, 3.0)
    keys = TaskKey.of(0, "train", 0, range(MANY))
    tasks = environment.sample(keys)
    state, _ = environment.reset(tasks, torch.empty(MANY, 0))
    step = environment.step(
        tasks, state, torch.full((MANY,), 2), keys.stream("environment").uniform(environment.step_noise)
    )
    near(step.reward.double() - tasks["mean"][:, 2], 0.0, 1.0)


def test_all_policies_share_their_luck():
    """A pull pays if the arm's mean is above the step's uniform number."""
    environment = Bandit(arms=3)
    keys = TaskKey.of(0, "train", 0, range(500))
    tasks, noise = environment.sample(keys), keys.stream("environment").uniform(1)
    state, observation = environment.reset(tasks, noise[:, :0])
    assert torch.equal(observation, torch.zeros(500, 1))
    for arm in range(3):
        step = environment.step(tasks, state, torch.full((500,), arm), noise)
        assert torch.equal(step.reward == 1, noise[:, 0] < tasks["mean"][:, arm])
        assert set(step.reward.unique().tolist()) == {0.0, 1.0} and bool(step.terminated.all())


@pytest.mark.parametrize(("kind", "share"), [("easy", 0.1), ("medium", 0.25), ("hard", 0.4)])
def test_one_of_two_correlated_arms_is_better(kind, share):
    mean = mean_of(CorrelatedBandit(arms_are=kind))
    assert torch.allclose(mean.sum(1), torch.ones(MANY, dtype=torch.float64), atol=1e-6)
    assert torch.allclose(mean.amin(1), torch.tensor(share, dtype=torch.float64), atol=1e-6)
    assert abs((mean[:, 0] < 0.5).double().mean() - 0.5) < 2 / math.sqrt(MANY)


def test_uniform_and_independent_arms():
    correlated, independent = mean_of(CorrelatedBandit()), mean_of(CorrelatedBandit(arms_are="independent"))
    assert torch.allclose(correlated.sum(1), torch.ones(MANY, dtype=torch.float64), atol=1e-6)
    near(correlated[:, 0], 0.5, 1 / math.sqrt(12))
    near(independent, 0.5, 1 / math.sqrt(12))
    assert abs(torch.corrcoef(independent.T)[0, 1]) < 4 / math.sqrt(MANY)
