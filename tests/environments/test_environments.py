"""Test the rules that hold for all native meta-environments."""

import pytest
import torch

from metadist.core.errors import ConfigError
from metadist.core.model import Model
from metadist.core.random import TaskKey
from metadist.environments import ENVIRONMENTS, Bandit, CorrelatedBandit, Gridworld, Navigation, TabularMDP
from metadist.environments.simulated import SimulatedEnvironment
from metadist.models.recurrent import GRU
from metadist.rl.environment import Discrete
from metadist.rl.policy import Policy
from metadist.rl.trial import EPISODE_END, VALID, rollout

ALL = [
    *(cls() for cls in ENVIRONMENTS.values() if not issubclass(cls, SimulatedEnvironment)),
    Bandit(arms=3, reward="gaussian", prior_mean=1.0, prior_deviation=0.5),
    *(CorrelatedBandit(arms_are=kind) for kind in ("easy", "independent")),
    TabularMDP(states=3, actions_each=2, horizon=4),
    Gridworld(size=6, held_out_goals=5),
    Navigation(reward="squared"),
]


def random_actions(environment, batch, t):
    generator = torch.Generator().manual_seed(t)
    actions = environment.actions
    if isinstance(actions, Discrete):
        return torch.randint(actions.count, (batch,), generator=generator)
    return torch.rand(batch, actions.size, generator=generator) * 3 - 1.5


def journey(environment, keys, rows, steps=12):
    """Return observations, rewards and ends of the trials ``rows`` of 50; actions depend on the row alone."""
    tasks = environment.sample(keys)
    noise = keys.stream("environment").uniform(steps, environment.step_noise)
    state, observation = environment.reset(tasks, noise[:, 0])
    seen = [observation]
    for t in range(steps):
        step = environment.step(tasks, state, random_actions(environment, 50, t)[rows], noise[:, t])
        state = step.state
        seen += [step.observation, step.reward.unsqueeze(1), step.terminated.unsqueeze(1)]
    return tasks, torch.cat([s.float() for s in seen], 1)


@pytest.mark.parametrize("environment", ALL, ids=repr)
def test_a_trial_is_the_same_in_any_batch(environment):
    whole_tasks, whole = journey(environment, TaskKey.of(3, "test", 5, range(50)), torch.arange(50))
    for rows in (range(17, 30), [49], [20, 3]):
        tasks, part = journey(environment, TaskKey.of(3, "test", 5, list(rows)), torch.tensor(list(rows)))
        for name, value in tasks.items():
            assert torch.equal(value, whole_tasks[name][list(rows)])
        assert torch.equal(part, whole[list(rows)])


@pytest.mark.parametrize("environment", ALL, ids=repr)
def test_splits_seeds_and_meta_steps_have_tasks_of_their_own(environment):
    first = environment.sample(TaskKey.of(0, "train", 0, range(100)))
    for seed, split, meta_step in ((1, "train", 0), (0, "validation", 0), (0, "test", 0), (0, "train", 1)):
        other = environment.sample(TaskKey.of(seed, split, meta_step, range(100)))
        for name in first:
            assert not torch.equal(first[name], other[name])


@pytest.mark.parametrize("environment", ALL, ids=repr)
def test_a_policy_can_play_it(environment):
    """The learners' rollout gives the right shapes, types and number of episodes."""
    keys, continuous = TaskKey.of(0, "train", 0, range(20)), not isinstance(environment.actions, Discrete)
    model = Model(
        lambda: GRU(hidden=8).build_policy(environment.observation_size, environment.actions.size, continuous)
    )
    learned, _, _ = model.initial(0)
    trials = rollout(environment, Policy(model.bind({}, None, False), learned, environment.actions), keys)
    assert trials.observation.shape == (20, trials.reward.shape[1], environment.observation_size)
    assert trials.observation.dtype == trials.reward.dtype == torch.float32
    assert (trials.flag(EPISODE_END) & trials.flag(VALID)).sum(1).eq(environment.episodes).all()
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
