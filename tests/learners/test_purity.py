"""The dry run refuses what is no pure function of its key: tasks, models, losses, metrics, environments."""

from __future__ import annotations

import os
import random
import time
from dataclasses import dataclass

import numpy as np
import pytest
import torch
import trials
from torch import nn
from toys import Blobs, Curves, Ragged, learner

from metadist.algorithms import CNP, MAML, ProtoNet, Reptile
from metadist.algorithms.rl2 import RL2
from metadist.core.differences import difference
from metadist.core.errors import ConfigError
from metadist.core.task import Examples, Task
from metadist.environments import Bandit, Navigation
from metadist.learners.purity import SALTS, other_generators
from metadist.models import ConditionalNeuralProcess
from metadist.models.recurrent import GRU
from metadist.tasks import Sinusoid
from metadist.testing.toys import Chance


def mlp(inputs=2, outputs=2):
    return nn.Sequential(nn.Flatten(), nn.Linear(inputs, 4), nn.Tanh(), nn.Linear(4, outputs))


def refused(subject, *expected):
    with pytest.raises(ConfigError) as found:
        subject.dry_run(0)
    for text in expected:
        assert text in str(found.value), found.value
    assert "\n" not in str(found.value)


# Tasks ----------------------------------------------------------------------------------------------------------------

GENERATOR = torch.Generator().manual_seed(0)
SOURCES = {
    "torch.randn": (lambda: float(torch.randn(())), "from the global generator of torch;"),
    "np.random": (lambda: np.random.uniform(), "from the global generator of numpy.random;"),
    "random": (lambda: random.random(), "from the global generator of random;"),
    "two": (lambda: random.random() + np.random.uniform(), "of numpy.random and of random;"),
    "default_rng": (lambda: np.random.default_rng().uniform(), "a generator without a seed"),
    "kept generator": (lambda: float(torch.rand((), generator=GENERATOR)), "kept between calls"),
    "time": (lambda: time.time_ns() % 1000 / 1000, "from time, os.urandom"),
    "os.urandom": (lambda: os.urandom(1)[0] / 256, "from time, os.urandom"),
}


@dataclass(frozen=True)
class Noisy(Curves):
    """The curves of one split have noise on their targets that is not their key's."""

    source: str = "random"
    split: str = "train"

    def sample_task(self, key, split):
        task = super().sample(key, split)
        noise = SOURCES[self.source][0]() if split == self.split else 0.0
        return Task(task.support, Examples(task.query.x, task.query.y + noise))

    def sample(self, keys, split):
        return super(Curves, self).sample(keys, split)


@pytest.mark.parametrize("source", SOURCES)
def test_tasks_that_draw_from_elsewhere(source):
    subject = learner(MAML(), mlp, Noisy(source=source))
    refused(subject, "tasks: 'Noisy' gives other train tasks", "query.y[", SOURCES[source][1], "key.generator()")


@pytest.mark.parametrize("split", ["validation", "test"])
def test_every_split_is_sampled_twice(split):
    refused(learner(MAML(), mlp, Noisy(split=split)), f"'Noisy' gives other {split} tasks")


@dataclass(frozen=True)
class ByKey(Curves):
    """The same noise from the task's own generator is no fault."""

    def sample_task(self, key, split):
        task = super().sample(key, split)
        noise = np.random.default_rng(key.generator().initial_seed()).uniform()
        return Task(task.support, Examples(task.query.x, task.query.y + noise))

    def sample(self, keys, split):
        return super(Curves, self).sample(keys, split)


class Counted(Curves):
    """A counter on the family numbers its calls."""

    calls = [0]

    def sample(self, keys, split):
        self.calls[0] += 1
        task = super().sample(keys, split)
        return Task(task.support, Examples(task.query.x, task.query.y + self.calls[0]))


def test_a_counter_on_the_family():
    refused(learner(MAML(), mlp, Counted()), "'Counted' gives other train tasks", "kept between calls")


@dataclass(frozen=True)
class OverShard(Curves):
    """Normalised over the shard, in one split."""

    split: str = "train"

    def sample(self, keys, split):
        task = super().sample(keys, split)
        if split != self.split:
            return task
        x = (task.query.x - task.query.x.mean()) / task.query.x.std()
        return Task(task.support, Examples(x, task.query.y))


class Alternating(Curves):
    """A task's place in its shard, not its index, decides on its sign."""

    def sample(self, keys, split):
        task = super().sample(keys, split)
        sign = 1.0 - 2.0 * (torch.arange(len(keys.tasks)) % 2).view(-1, 1, 1)
        return Task(task.support, Examples(task.query.x, task.query.y * sign))


@pytest.mark.parametrize("family", [OverShard(), OverShard(split="test"), Alternating()], ids=repr)
def test_tasks_that_depend_on_their_shard(family):
    name, split = type(family).__name__, getattr(family, "split", "train")
    refused(learner(MAML(), mlp, family), f"'{name}' gives another {split} task ", "in another shard", "query.")


class Rounded(Curves):
    """A vectorised float32 sine rounds by a task's place in the shard: no fault, since a task never changes shards."""

    def sample(self, keys, split):
        task = super().sample(keys, split)
        return Task(task.support, Examples(task.query.x, task.query.y * (1 + 1e-7 * len(keys.tasks))))


@pytest.mark.parametrize("family", [ByKey(), Rounded(), Ragged(), Sinusoid()], ids=lambda f: type(f).__name__)
def test_sound_tasks_pass(family):
    subject = learner(MAML(), lambda: mlp(*family.input_shape, family.outputs), family)
    random.seed(5), np.random.seed(5), torch.manual_seed(5)
    subject.dry_run(0)
    drawn = random.random(), np.random.uniform(), float(torch.rand(()))
    random.seed(5), np.random.seed(5), torch.manual_seed(5)
    assert drawn == (random.random(), np.random.uniform(), float(torch.rand(()))), "generators are as they were"


# Models, losses, metrics ----------------------------------------------------------------------------------------------


class Depth(nn.Module):
    """Stochastic depth by Python's generator, which vmap does not see."""

    def __init__(self, draw, training_only=True):
        super().__init__()
        self.net, self.head, self.draw, self.training_only = mlp(outputs=4), nn.Linear(4, 2), draw, training_only

    def forward(self, x):
        scale = 1.0 + self.draw() if self.training or not self.training_only else 1.0
        return self.head(torch.tanh(self.net(x)) * scale)


@pytest.mark.parametrize("algorithm", [MAML(), Reptile()], ids=repr)
@pytest.mark.parametrize(
    ("draw", "source"),
    [
        (lambda: float(random.random() < 0.06), "the global generator of random"),
        (lambda: float(np.random.uniform() < 0.06), "the global generator of numpy.random"),
        (lambda: np.random.uniform(), "'Depth' gives two results"),
        (lambda: time.perf_counter(), "from time"),
    ],
)
def test_models_that_draw_from_elsewhere(algorithm, draw, source):
    random.seed(0), np.random.seed(0)  # the rare branch is not taken in the first calls
    refused(learner(algorithm, lambda: Depth(draw), Curves()), "'Depth'", source)


def test_models_that_draw_in_evaluation_alone():
    class Test(Depth):
        def forward(self, x):
            return super().forward(x) * (1.0 if self.training else 1.0 + random.random())

    refused(learner(MAML(), lambda: Test(lambda: 0.0), Curves()), "evaluation of 'Test'", "validation task", "random")


class Bootstrapped(Curves):
    """A metric over a random half of the examples."""

    def metric(self, prediction, target):
        error = (prediction - target).square().mean(1)
        return error * float(np.random.uniform())


class SmoothedLoss(Curves):
    def loss(self, prediction, target):
        return (prediction - target - 0.1 * random.random()).square().mean(1)


def test_metrics_and_losses_that_draw_from_elsewhere():
    refused(learner(MAML(), mlp, Bootstrapped()), "the mse[", "numpy.random")
    refused(learner(MAML(), mlp, SmoothedLoss()), "slot 'model'", "random")


class Dropped(nn.Module):
    def __init__(self):
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(2, 16), nn.Dropout(0.5), nn.Linear(16, 2))

    def forward(self, x):
        return self.layers(x)


@pytest.mark.parametrize(
    "subject",
    [
        lambda: learner(MAML(inner_steps=2), Dropped, Curves()),
        lambda: learner(ProtoNet(), lambda: nn.Linear(4, 3), Blobs()),
        lambda: learner(CNP(), lambda: ConditionalNeuralProcess(8, 8).build((2,), 2), Curves()),
    ],
)
def test_keyed_dropout_and_metric_methods_pass(subject):
    subject().dry_run(0)


# Environments ---------------------------------------------------------------------------------------------------------


class Lucky(Chance):
    """Rewards by Python's generator."""

    def step(self, tasks, state, action, noise):
        found = super().step(tasks, state, action, noise)
        return type(found)(found.state, found.observation, found.reward + random.random(), found.terminated)


class RunningMean(Chance):
    """An observation filter that remembers all episodes."""

    seen = [0.0, 0]

    def step(self, tasks, state, action, noise):
        found = super().step(tasks, state, action, noise)
        self.seen[:] = self.seen[0] + float(found.observation.sum()), self.seen[1] + 1
        mean = self.seen[0] / self.seen[1]
        return type(found)(found.state, found.observation - mean, found.reward, found.terminated)


class RandomGoals(Chance):
    def sample(self, keys):
        return {"number": torch.rand(len(keys.tasks))}


class Tournament(Chance):
    """Rewards are relative to those of the batch."""

    def step(self, tasks, state, action, noise):
        found = super().step(tasks, state, action, noise)
        return type(found)(found.state, found.observation, found.reward - found.reward.mean(), found.terminated)


def trial_learner(environment, model=GRU(hidden=5)):
    return trials.learner(RL2(minibatches=1), model, environment)


@pytest.mark.parametrize(
    ("environment", "expected"),
    [
        (Lucky(), ("'Lucky' gives another trial", "reward[", "the global generator of random")),
        (RunningMean(), ("'RunningMean' gives another trial", "observation[", "kept between calls")),
        (RandomGoals(), ("'RandomGoals' gives another trial", "the global generator of torch")),
        (Tournament(), ("'Tournament' gives another episode in another batch", "the reward of step 1")),
    ],
    ids=lambda value: type(value).__name__,
)
def test_environments_that_remember_draw_or_compare(environment, expected):
    refused(trial_learner(environment), "environment: ", *expected)


@pytest.mark.parametrize("environment", [Chance(), Chance(continuous=True), Bandit(), Navigation()], ids=repr)
def test_sound_environments_pass(environment):
    trial_learner(environment).dry_run(0)


@dataclass(frozen=True)
class NoisyGRU(GRU):
    def build_policy(self, observation_size, action_size, continuous):
        policy = super().build_policy(observation_size, action_size, continuous)
        policy.register_forward_hook(lambda module, inputs, output: tuple(o * (1 + random.random()) for o in output))
        return policy


def test_policies_that_draw_from_elsewhere():
    refused(trial_learner(Chance(), NoisyGRU(hidden=5)), "the global generator of random")


def test_seeds_take_branches_that_are_taken_at_random():
    drawn = []
    for salt in SALTS:
        with other_generators(salt):
            drawn.append([random.random(), float(np.random.uniform()), float(torch.rand(()))])
    low, high = drawn
    assert max(low) < 0.05 and min(high) > 0.95


# Comparing ------------------------------------------------------------------------------------------------------------


def test_a_difference_within_rounding_is_none_and_nan_is_nan():
    a = torch.tensor([100.0, 1.0, float("nan")])
    assert difference({"a": a}, {"a": a.clone()}) is None
    assert difference({"a": a}, {"a": a + 1e-4}, 1e-5) is None
    assert difference({"a": a}, {"a": a + 1e-2}, 1e-5) is not None
    assert difference({"a": a}, {"a": a.nan_to_num()}, 1e-5) is not None
    assert difference({"a": torch.tensor([1])}, {"a": torch.tensor([2])}, 1.0) is not None
