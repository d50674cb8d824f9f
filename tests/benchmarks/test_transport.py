"""The transport benchmark: its actor returns what it was sent; nothing is timed here."""

from __future__ import annotations

import pytest
import torch

from metadist.benchmarks import bench
from metadist.benchmarks.transport import TENSORS, Echo
from metadist.core.computation import Evaluate, Gradient
from metadist.core.errors import ConfigError
from metadist.core.round import Shard
from metadist.core.state import Contribution


@pytest.mark.lane("ray")
@pytest.mark.long
def test_every_direction_is_measured_against_a_memcpy() -> None:
    report = bench("transport", sizes=[0.5, 6], wire="bfloat16", rounds=2)  # inline, and through the object store
    assert list(report["cases"]) == ["0.5 MB of parameters", "6 MB of parameters"]
    for case in report["cases"].values():
        assert case["contestants"]["memcpy"]["ratio"] == 1
        for direction in ("theta out", "contribution back"):
            assert case["contestants"][direction]["median"] > 0
            assert case[direction]["MB/s"] > 0
            assert "2 × memcpy" in case[direction]["floor"]


def test_the_echo_has_as_many_parameters_as_asked_for() -> None:
    echo = Echo.of(1001)
    state = echo.initial(0)
    assert state.slots["model"].numel() == echo.slots["model"].layout.numel == 1001
    assert len(echo.slots["model"].layout.names) == TENSORS
    result = echo.compute(Shard("r", 0, 0, 0, Gradient(), 0, 2, seed=0), state.slots)
    assert isinstance(result, Contribution)
    assert result.slots["model"].equal(state.slots["model"])
    assert echo.compute(Shard("r", 0, 0, 0, Evaluate(), 0, 2, seed=0), state.slots).rows == 2
    assert torch.equal(echo.initial(0).slots["model"], state.slots["model"])


@pytest.mark.parametrize(
    ("options", "reason"),
    [({"sizes": []}, "--sizes"), ({"sizes": [0]}, "--sizes"), ({"sizes": [1], "wire": "int8"}, "--wire")],
)
def test_senseless_options_are_one_line(options, reason) -> None:
    with pytest.raises(ConfigError, match=reason):
        bench("transport", **options)
