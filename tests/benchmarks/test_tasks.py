"""The samplers' benchmark: equal tasks first, and figures that fit each other. Nothing here depends on a time."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from toys import Curves

from metadist.benchmarks import bench
from metadist.benchmarks.tasks import (
    AT_ONCE,
    PLAIN,
    TASKWISE,
    DifferentTasksError,
    contestants,
    image_folder,
    prove_same,
)
from metadist.core.errors import ConfigError
from metadist.core.random import TaskKey
from metadist.tasks import Sinusoid


def keys(size=3):
    return TaskKey.of(0, "train", 5, range(size))


@pytest.fixture
def pictures(tmp_path, monkeypatch):
    monkeypatch.setenv("METADIST_CACHE", str(tmp_path / "cache"))
    return image_folder(tmp_path / "images", classes=10, images=4, size=6)


def test_all_samplers_make_the_same_tasks(pictures):
    few = replace(pictures, query_shots=2)
    for family, names in (
        (Sinusoid(), {AT_ONCE, TASKWISE, PLAIN}),
        (few, {AT_ONCE, TASKWISE, PLAIN}),
        (Curves(), {AT_ONCE, TASKWISE}),
    ):
        samplers = contestants(family, keys())
        assert samplers.keys() == names
        assert prove_same(samplers).query.x.equal(family.sample(keys(), "train").query.x)


def test_other_tasks_are_not_timed():
    samplers = contestants(Sinusoid(), keys())
    with pytest.raises(DifferentTasksError, match="'plain loop' makes other support.x than 'a shard at once'"):
        prove_same({**samplers, PLAIN: lambda: Sinusoid().sample(keys(4), "train")})


@pytest.mark.lane("numerics")
def test_the_report():
    threads = torch.get_num_threads()
    try:
        report = bench("tasks", config="sinusoid_maml", tasks=10, shard_sizes=[1, 4])
    finally:
        torch.set_num_threads(threads)
    assert report["cases"].keys() == {"sinusoid_maml, shards of 1", "sinusoid_maml, shards of 4"}
    for size, case in zip((1, 4), report["cases"].values()):
        assert case["same_bits"] and case["floor"]["bytes"] == size * 20 * 2 * 4
        for name, row in case["contestants"].items():
            assert row["count"] >= 10 / size
            assert row["examples_per_s"] == pytest.approx(20 * row["median"])
            assert row["of_the_floor"] == pytest.approx(row["median"] / case["floor"]["tasks_per_s"])
            assert case["milliseconds_per_shard"][name] == pytest.approx(1e3 * size / row["median"])


def test_senseless_sizes_are_named():
    with pytest.raises(ConfigError, match=r"--shard-sizes \[0\]"):
        bench("tasks", config="sinusoid_maml", shard_sizes=[0])
