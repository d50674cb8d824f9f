"""The memory benchmark: figures that fit each other.

Peaks are of processes of their own; nothing here depends on a time.
"""

from __future__ import annotations

import pytest

from metadist.benchmarks import bench, memory
from metadist.core.errors import ConfigError


@pytest.mark.lane("services")
@pytest.mark.long
@pytest.mark.data
@pytest.mark.parametrize("model", ["conv4", "transformer"])
def test_the_report(model, data):
    report = bench("memory", model=model, inner_steps=[1, 6], tasks=4, rounds=1)
    case = report["cases"][model]
    rows = case["contestants"]
    assert list(rows) == [
        "1 inner step, unrolled",
        "1 inner step, mixed",
        "6 inner steps, unrolled",
        "6 inner steps, mixed",
    ]
    for row in rows.values():
        assert row["peak"] == pytest.approx(row["predicted"], rel=0.25, abs=3)
        assert row["seconds"] > 0
    unrolled, mixed = (rows[f"6 inner steps, {way}"] for way in ("unrolled", "mixed"))
    assert mixed["peak"] < 0.7 * unrolled["peak"]
    assert mixed["peak"] <= 1.5 * rows["1 inner step, mixed"]["peak"] + mixed["stored_states"]
    assert case["target_peak"]["met"]
    assert mixed["stored_states"] == pytest.approx(6 * rows["1 inner step, mixed"]["stored_states"])


def test_other_gradients_are_not_measured(monkeypatch, data):
    monkeypatch.setattr(memory, "TOLERANCE", 0.0)
    with pytest.raises(memory.DisagreementError, match="mixed differs from unrolled"):
        bench("memory", inner_steps=[3], tasks=1)


@pytest.mark.parametrize(
    ("options", "message"), [({"model": "mlp"}, "--model"), ({"inner_steps": [0, 5]}, r"--inner-steps \[0, 5\]")]
)
def test_senseless_options_are_named(options, message):
    with pytest.raises(ConfigError, match=message):
        bench("memory", **options)
