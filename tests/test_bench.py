"""The benchmarks measure what they say: the same work for all contestants, ratios with intervals."""

from __future__ import annotations

import pytest

from metadist import config as configuration
from metadist.bench import bench
from metadist.core.errors import ConfigError


def test_executors_compute_the_same() -> None:
    report = bench("executors", configuration.read_document("sinusoid_maml"), steps=10)
    assert report["same_parameters"]
    ray = report["contestants"]["ray, 1 actor"]
    assert ray["count"] == 10
    assert ray["ratio_ci95"][0] <= ray["ratio"] <= ray["ratio_ci95"][1]


@pytest.mark.long
def test_memory_of_the_driver_is_flat() -> None:
    report = bench("memory", configuration.read_document("sinusoid_maml"), steps=2000)
    readings = report["contestants"]["driver"]["readings"]
    assert readings[-1] - readings[1] < 16, readings


def test_an_unknown_benchmark_is_named() -> None:
    with pytest.raises(ConfigError, match="'transprot' is not one of executors"):
        bench("transprot", {}, steps=10)
