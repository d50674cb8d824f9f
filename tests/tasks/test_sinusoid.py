import hashlib
import math

import pytest
import torch

from metadist.core.errors import ConfigError
from metadist.core.random import TaskKey
from metadist.tasks.sinusoid import Sinusoid


def test_tasks_are_points_of_their_curves():
    family = Sinusoid(k_shot=7, query_shots=12)
    keys = TaskKey.of(0, "train", 3, range(2000))
    task = family.sample(keys, "train")
    assert task.support.x.shape == task.support.y.shape == (2000, 7, 1)
    assert task.query.x.shape == task.query.y.shape == (2000, 12, 1)
    assert task.support.y.dtype == torch.float32
    amplitude, phase = family.amplitude_and_phase(keys)
    for examples in (task.support, task.query):
        expected = amplitude[:, None, None] * torch.sin(examples.x - phase[:, None, None])
        assert (examples.y - expected).abs().max() < 1e-5
        assert examples.x.min() >= -5 and examples.x.max() < 5 and abs(examples.x.mean()) < 0.1
    assert 0.1 <= amplitude.min() < 0.15 and 4.95 < amplitude.max() < 5 and abs(amplitude.mean() - 2.55) < 0.1
    assert phase.min() < 0.02 and math.pi - 0.02 < phase.max() < math.pi
    grid = torch.linspace(-5, 5, 50)
    assert family.curve(keys, grid).shape == (2000, 50)


def test_a_task_is_the_same_in_any_shard():
    family = Sinusoid()
    whole = family.sample(TaskKey.of(1, "train", 9, range(40)), "train")
    for tasks in (range(5, 12), [39], [20, 3]):
        part = family.sample(TaskKey.of(1, "train", 9, tasks), "train")
        for a, b in zip(
            (part.support.x, part.support.y, part.query.y), (whole.support.x, whole.support.y, whole.query.y)
        ):
            assert torch.equal(a, b[list(tasks)])
    single = family.sample_task(TaskKey.of(1, "train", 9, range(40)).each()[17], "train")
    assert torch.equal(single.query.y, whole.query.y[17])


def test_tasks_are_the_same_as_ever():
    """Tasks are public: these values must never change."""
    keys = TaskKey.of(7, "test", 11, range(3, 20))
    task = Sinusoid(k_shot=5, query_shots=7).sample(keys, "test")
    digest = hashlib.sha256()
    for t in (*Sinusoid().amplitude_and_phase(keys), task.support.x, task.query.x):
        digest.update(t.numpy().tobytes())
    assert digest.hexdigest()[:16] == "a9aaaf23e7f77a9c"
    for examples in (task.support, task.query):
        assert examples.x.is_contiguous() and examples.y.is_contiguous()
        assert torch.equal(examples.y.squeeze(-1), Sinusoid().curve(keys, examples.x.squeeze(-1)))


def test_impossible_settings_are_named():
    with pytest.raises(ConfigError, match=r"tasks\.k_shot = 0"):
        Sinusoid(k_shot=0)
    with pytest.raises(ConfigError, match=r"tasks\.amplitude = \[5.0, 1.0\]"):
        Sinusoid(amplitude=(5.0, 1.0))
