"""How things are measured: every contestant as often, in changing order; ratios with intervals; rates that are
rates.
"""

from __future__ import annotations

import pytest
import torch

from metadist.benchmarks import timing


def test_contestants_take_turns_in_changing_order():
    calls = []
    measured = timing.interleaved({name: (lambda name=name: calls.append(name)) for name in "ab"}, rounds=20, block=2)
    assert calls[:4] == list("aabb"), "a block of warm-up each"
    turns = ["".join(calls[i : i + 6]) for i in range(4, len(calls), 6)]
    assert set(turns) == {"aaabbb", "bbbaaa"} and len(turns) == 20, "the call that begins a block is not timed"
    assert {name: len(values) for name, values in measured.items()} == {"a": 40, "b": 40}


def test_a_ratio_is_of_medians_and_drift_cancels():
    drifting = [1.0 + turn for turn in range(10) for _ in range(2)]
    row = timing.compare({"slow": [2 * v for v in drifting], "base": drifting}, "base", block=2)["slow"]
    assert row["ratio"] == 2.0 and row["ratio_ci95"] == [2.0, 2.0] and row["count"] == 20
    assert row["quartiles"][0] < row["median"] < row["quartiles"][1]


def test_one_measurement_has_no_spread():
    row = timing.compare({"a": [3.0]}, "a", block=1)["a"]
    assert row["quartiles"] == [3.0, 3.0]


def test_the_best_of_all_products_is_named():
    rate = timing.gemm_rate([(3, 4, 5, 6)], torch.float32, torch.device("cpu"), square=64, seconds=0.01)
    assert rate.rates.keys() == {"3×[4×5]·[5×6]", "[64×64]·[64×64]"}
    assert rate.best == rate.rates[rate.at] == max(rate.rates.values())
    assert rate.occurring == rate.rates["3×[4×5]·[5×6]"]


def test_copying_has_a_rate():
    assert timing.memcpy_rate(1 << 20, seconds=0.01) > 1e6


@pytest.mark.parametrize("fact", ["processor", "cores", "python", "torch"])
def test_the_machine_is_described(fact):
    assert timing.machine()[fact]
