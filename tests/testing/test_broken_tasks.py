"""Task families and environments that lack one property each are caught, by a message with the remedy."""

from __future__ import annotations

import os
import random
import threading
from dataclasses import dataclass

import numpy as np
import pytest
import torch

from metadist import Sinusoid
from metadist.core.errors import ConfigError
from metadist.core.task import Classification, Examples, Task, TaskFamily
from metadist.environments import Bandit, Navigation
from metadist.rl.environment import Continuous, MetaEnvironment, Step
from metadist.testing import (
    ImpureError,
    InexactError,
    PropertyError,
    RoundTripError,
    RowError,
    SameTasksError,
    ShapeError,
    UnusableError,
    check_environment,
    check_tasks,
)
from metadist.testing.quadratics import Quadratics
from metadist.testing.toys import Blobs, Chance, Curves


def caught(check, subject, error, *expected):
    """``check`` refuses ``subject`` by this error, whose message has the object's name, the values and a remedy."""
    with pytest.raises(PropertyError) as found:
        check(subject, another_process=False)
    assert type(found.value) is error, found.value
    message = str(found.value)
    assert message.startswith(type(subject).__name__)
    assert "remedy: " in message
    for text in expected:
        assert text in message, message


def shifted(task, x=0.0, y=0.0):
    return Task(task.support, Examples(task.query.x + x, task.query.y + y))


@pytest.mark.parametrize("family", [Sinusoid(), Curves(), Blobs(), Quadratics()], ids=repr)
def test_sound_families_pass(family):
    check_tasks(family, another_process=False)


class GlobalTorch(Curves):
    def sample(self, keys, split):
        return shifted(super().sample(keys, split), x=torch.randn(()))


class GlobalNumPy(Curves):
    def sample(self, keys, split):
        return shifted(super().sample(keys, split), y=float(np.random.uniform()))


class GlobalRandom(Curves):
    def sample_task(self, key, split):
        return shifted(super().sample(key, split), y=random.random())

    def sample(self, keys, split):
        return TaskFamily.sample(self, keys, split)


class Counter(Curves):
    calls = [0]

    def sample(self, keys, split):
        self.calls[0] += 1
        return shifted(super().sample(keys, split), y=float(self.calls[0]))


class Centred(Curves):
    """Normalised by the statistics of the shard."""

    def sample(self, keys, split):
        task = super().sample(keys, split)
        return shifted(task, y=-task.query.y.mean())


class Deaf(Curves):
    """Another run's tasks are the same."""

    def sample(self, keys, split):
        return super().sample(type(keys)(0, split, keys.meta_step, keys.tasks), split)


class OneTask(Curves):
    def sample(self, keys, split):
        return super().sample(type(keys)(keys.seed, split, keys.meta_step, torch.zeros_like(keys.tasks)), split)


class Monotonous(Curves):
    """Every meta-step trains on the same tasks."""

    def sample(self, keys, split):
        return super().sample(type(keys)(keys.seed, split, 0, keys.tasks), split)


class OutOfRange(Blobs):
    def sample(self, keys, split):
        return shifted(super().sample(keys, split), y=1)


class Infinite(Curves):
    def sample(self, keys, split):
        return shifted(super().sample(keys, split), y=float("inf"))


class OneAlone(Curves):
    def sample(self, keys, split):
        task = super().sample(keys, split)
        return Task(Examples(task.support.x[0], task.support.y[0]), task.query)


class WrongInput(Curves):
    def sample(self, keys, split):
        task = super().sample(keys, split)
        return Task(task.support, Examples(task.query.x.repeat(1, 1, 2), task.query.y))


class Wider(Curves):
    def sample(self, keys, split):
        task = super().sample(keys, split)
        return Task(*(Examples(e.x, e.y.repeat(1, 1, 2)) for e in (task.support, task.query)))


class Counted(Curves):
    def sizes(self, split):
        return (6, 6)


class NoTask(Curves):
    def sample(self, keys, split):
        return super().sample(keys, split).support


class Failing(Curves):
    def sample(self, keys, split):
        raise KeyError("no such file")


class Refusing(Curves):
    def sample(self, keys, split):
        raise ConfigError("tasks.path: 'x' is no folder")


class OtherTask(Curves):
    """``sample_task`` gives other tasks than ``sample``."""

    def sample_task(self, key, split):
        return shifted(super().sample_task(key, split), y=1.0)


BROKEN = [
    (
        GlobalTorch(),
        ImpureError,
        "the same key gives the same train tasks; found: query.x[0, 0, 0] is",
        "keys.stream(name)",
    ),
    (GlobalNumPy(), ImpureError, "query.y[0, 0, 0] is"),
    (GlobalRandom(), ImpureError, "query.y[0, 0, 0] is"),
    (Counter(), ImpureError, "in one result and"),
    (Centred(), InexactError, "train task 0 is the same in any shard", "statistics of the batch"),
    (Deaf(), SameTasksError, "6 train tasks are the same for another seed"),
    (OneTask(), SameTasksError, "tasks differ by index"),
    (Monotonous(), SameTasksError, "another meta-step"),
    (OutOfRange(), ShapeError, "int64 [T, N] in [0, 3); found: query.y is torch.int64 [6, 6] from 1 to 3"),
    (Infinite(), ShapeError, "query.y of train tasks has NaN or Inf"),
    (OneAlone(rows=5), ShapeError, "6 train tasks are stacked", "support.x is [5, 2]"),
    (WrongInput(), ShapeError, "query.x of train tasks has examples of shape [4]"),
    (Wider(), ShapeError, "targets of train tasks have 2 floating-point values", "[6, 6, 4]"),
    (Counted(), ShapeError, "sizes('train') is (6, 6) and the tasks have (6, 4) rows"),
    (NoTask(), ShapeError, "it returns Examples"),
    (Failing(), UnusableError, "it raises KeyError: 'no such file'"),
    (Refusing(), UnusableError, "metadist refuses it (ConfigError: tasks.path: 'x' is no folder)"),
    (OtherTask(), InexactError, "sample_task() and sample() give the same tasks"),
]


@pytest.mark.parametrize("broken", BROKEN, ids=lambda broken: type(broken[0]).__name__)
def test_broken_sampling_is_caught(broken):
    caught(check_tasks, *broken)


# Loss and metric ------------------------------------------------------------------------------------------------------


class WrongAxis(Curves):
    """Averages over examples where it should average over the target's two values."""

    query_rows: int = 2

    def metric(self, prediction, target):
        return (prediction - target).square().mean(0)


class OneNumber(Curves):
    def loss(self, prediction, target):
        return (prediction - target).square().mean()


class Relative(Curves):
    """Compares every example with the mean over all."""

    def metric(self, prediction, target):
        error = (prediction - target).square().mean(1)
        return error / error.mean()


class Branching(Curves):
    def loss(self, prediction, target):
        error = (prediction - target).square().mean(1)
        return error if error.mean() > 0 else error + 1


class Backwards(Curves):
    higher_is_better = True


class Lenient(Classification):
    """Accuracy that counts mistakes."""

    outputs, input_shape = 3, (4,)

    def sample(self, keys, split):
        return Blobs().sample(keys, split)

    def metric(self, prediction, target):
        return (prediction.argmax(-1) != target).to(prediction.dtype)


@pytest.mark.parametrize(
    ("family", "error", "expected"),
    [
        (WrongAxis(query_rows=2), RowError, "the metric of an example depends on that example alone"),
        (WrongAxis(query_rows=4), ShapeError, "for 4 examples it has shape [2]"),
        (OneNumber(), ShapeError, "its loss is one value per example; found: for 4 examples it has shape []"),
        (Relative(), RowError, "of the rows [3, 0, 1] alone it is"),
        (Branching(), UnusableError, "its loss can be computed, also under torch.func.vmap"),
        (
            Backwards(),
            RowError,
            "with higher_is_better=True its metric prefers right predictions; found: it is 0 for right",
        ),
        (Lenient(), RowError, "correct higher_is_better, or the metric"),
    ],
    ids=lambda value: type(value).__name__,
)
def test_broken_losses_and_metrics_are_caught(family, error, expected):
    caught(check_tasks, family, error, expected)


# Round trips ----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Altered(Curves):
    """A field has another value than the one given."""

    scale: float = 1.0

    def __post_init__(self):
        object.__setattr__(self, "scale", self.scale + 1)


@dataclass(frozen=True)
class Mistyped(Curves):
    scale: int = 0.5  # type: ignore[assignment]


class Heavy(Curves):
    def prepare(self, device):
        object.__setattr__(self, "data", torch.zeros(100_000))


class Unpicklable(Curves):
    def prepare(self, device):
        object.__setattr__(self, "lock", threading.Lock())


class Unwritable(Curves):
    def protocol(self, split):
        return {"rows": {1, 2}}


@pytest.mark.parametrize(
    ("family", "error", "expected"),
    [
        (Altered(), RoundTripError, "scale is 2.0 and then 3.0"),
        (Mistyped(), RoundTripError, "annotate every field with the type that it holds"),
        (Heavy(), ShapeError, "its pickle has"),
        (Unpicklable(), UnusableError, "load data in prepare(device), not in __init__"),
        (Unwritable(), UnusableError, "its protocol(split) is written to JSON"),
    ],
    ids=lambda value: type(value).__name__,
)
def test_what_does_not_come_back_is_caught(family, error, expected):
    caught(check_tasks, family, error, expected)


class Hashed(Curves):
    """``hash`` of a text differs between processes."""

    def sample(self, keys, split):
        return shifted(super().sample(keys, split), y=hash("salt") % 1000 / 1000)


@pytest.mark.lane("services")
def test_another_process_shows_what_depends_on_hashes():
    check_tasks(Hashed(), another_process=False)
    with pytest.raises(
        ImpureError, match=r"another process samples the same tasks; found: train query\.y has the SHA-256"
    ):
        check_tasks(Hashed())


@pytest.mark.lane("services")
def test_another_process_samples_the_same_tasks_and_may_print():
    check_tasks(Printing())


class Printing(Curves):
    def prepare(self, device):
        print("loading…")


@dataclass(frozen=True)
class Homebound(Curves):
    pid: int = 0

    def prepare(self, device):
        if os.getpid() != self.pid:
            raise OSError("this machine has no such data")


@pytest.mark.lane("services")
def test_an_error_in_the_other_process_is_told():
    with pytest.raises(
        UnusableError, match="another process can sample its tasks; found: it raises RuntimeError: in another"
    ):
        check_tasks(Homebound(pid=os.getpid()))


# Environments ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("environment", [Bandit(), Navigation(), Chance(), Chance(continuous=True)], ids=repr)
def test_sound_environments_pass(environment):
    check_environment(environment, another_process=False)


class Gusty(Chance):
    def step(self, tasks, state, action, noise):
        step = super().step(tasks, state, action, noise)
        return Step(step.state, step.observation, step.reward + torch.rand(()), step.terminated)


class InPlace(Chance):
    def step(self, tasks, state, action, noise):
        state += 1.0
        return super().step(tasks, state, action, noise)


class Competitive(Chance):
    """A trial's reward depends on the others of the batch."""

    def step(self, tasks, state, action, noise):
        step = super().step(tasks, state, action, noise)
        return Step(step.state, step.observation, step.reward - step.reward.mean(), step.terminated)


class Column(Chance):
    def step(self, tasks, state, action, noise):
        step = super().step(tasks, state, action, noise)
        return Step(step.state, step.observation, step.reward.unsqueeze(-1), step.terminated)


class Double(Chance):
    def reset(self, tasks, noise):
        return noise, noise.double()


class Ended(Chance):
    def step(self, tasks, state, action, noise):
        step = super().step(tasks, state, action, noise)
        return Step(step.state, step.observation, step.reward, step.terminated.float())


class Same(Chance):
    def sample(self, keys):
        return {"number": torch.ones(len(keys.tasks))}


class Unbounded(Chance):
    def step(self, tasks, state, action, noise):
        step = super().step(tasks, state, action, noise)
        return Step(step.state, step.observation, step.reward / 0.0, step.terminated)


class Tuple(Chance):
    def step(self, tasks, state, action, noise):
        return state, state, noise[:, 0], noise[:, 1] > 2


class Number(Chance):
    @property
    def actions(self):
        return 3


class Empty(Chance):
    episodes: int = 0


class Unfinished(MetaEnvironment):
    episodes, horizon = 1, 2
    observation_size = 1
    actions = Continuous(1)


@pytest.mark.parametrize(
    ("environment", "error", "expected"),
    [
        (Gusty(), ImpureError, "the same key and noise give the same train episode; found: the reward of step 1[0] is"),
        (
            InPlace(),
            ImpureError,
            "step() leaves the state that it is given unchanged; found: tensor 0 of the state[0, 0] is",
        ),
        (
            Competitive(),
            InexactError,
            "an episode is the same in any batch; found: among tasks 0…5 and among [0] the reward",
        ),
        (Column(), ShapeError, "the reward of step 1 is float32 [6]; found: it is float32 [6, 1]"),
        (Double(), ShapeError, "the first observation is float32 [6, 2]; found: it is float64 [6, 2]"),
        (Ended(), ShapeError, "the end of step 1 is bool [6]; found: it is float32 [6]"),
        (Same(), SameTasksError, "6 tasks are the same for another seed"),
        (Unbounded(), ShapeError, "the reward of step 1 is finite"),
        (Tuple(), ShapeError, "step() returns a Step; found: it returns tuple"),
        (Number(), ShapeError, "actions are Discrete(count) or Continuous(size); found: they are 3"),
        (Empty(episodes=0), ShapeError, "episodes is 0 and horizon 4"),
        (Unfinished(), UnusableError, "it can be sampled, reset and stepped; found: it raises NotImplementedError"),
    ],
    ids=lambda value: type(value).__name__,
)
def test_broken_environments_are_caught(environment, error, expected):
    caught(check_environment, environment, error, expected)
