import math

import torch

from metadist.core.random import TaskKey
from metadist.environments import TabularMDP


def test_rows_are_dirichlet_and_means_normal():
    environment = TabularMDP()
    tasks = environment.sample(TaskKey.of(0, "test", 0, range(400)))
    p = environment.transition(tasks)
    assert p.shape == (400, 10, 5, 10) and p.min() >= 0
    assert (p.sum(-1) - 1).abs().max() == 0
    # P(s′ | s, a) ~ Beta(1, 9), whose distribution function is 1 − (1 − x)⁹.
    values = p.flatten()
    for x in (0.01, 0.05, 0.1, 0.3):
        expected = 1 - (1 - x) ** 9
        below = (p < x).double().mean()
        assert abs(below - expected) < 5 * math.sqrt(expected * (1 - expected) / values.numel()) + 1e-4
    for s in range(10):  # the order of the sums favours no state
        assert abs(p[..., s].mean() - 0.1) < 4 * math.sqrt(0.09 / 11 / p[..., s].numel())
    reward = tasks["reward"].double()
    assert abs(reward.mean() - 1) < 4 / math.sqrt(reward.numel()) and abs(reward.std() - 1) < 4 / math.sqrt(
        2 * reward.numel()
    )


def test_steps_follow_the_table():
    """20,000 steps from one state with one action have the next states and rewards of the task's row."""
    environment, many = TabularMDP(states=4, actions_each=3), 20_000
    one = environment.sample(TaskKey.of(5, "train", 0, [7]))
    tasks = {name: value.expand(many, *value.shape[1:]) for name, value in one.items()}
    noise = TaskKey.of(5, "train", 0, range(many)).stream("environment").uniform(environment.step_noise)
    step = environment.step(tasks, torch.full((many,), 2), torch.full((many,), 1), noise)
    p = environment.transition(one)[0, 2, 1]
    seen = torch.bincount(step.state, minlength=4).double() / many
    assert ((seen - p).abs() < 4 * (p * (1 - p) / many).sqrt()).all()
    assert abs(step.reward.double().mean() - one["reward"][0, 2, 1]) < 4 / math.sqrt(many)
    assert abs(step.reward.double().std() - 1) < 4 / math.sqrt(2 * many)
    assert abs(torch.corrcoef(torch.stack((step.reward.double(), step.state.double())))[0, 1]) < 4 / math.sqrt(many)
    assert torch.equal(step.observation.argmax(1), step.state) and torch.equal(
        step.observation.sum(1), torch.ones(many)
    )


def test_every_episode_begins_in_state_0():
    environment = TabularMDP()
    tasks = environment.sample(TaskKey.of(0, "train", 0, range(3)))
    state, observation = environment.reset(tasks, torch.empty(3, 0))
    assert state.tolist() == [0, 0, 0] and torch.equal(observation, torch.eye(10)[[0, 0, 0]])
