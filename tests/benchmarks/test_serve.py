"""The benchmark of the adaptation service, in little."""

from __future__ import annotations

import pytest
import tiny

from metadist.benchmarks import bench
from metadist.core.errors import ConfigError

pytestmark = [pytest.mark.lane("services"), pytest.mark.long]


def test_report():
    report = bench(
        "serve", document=tiny.document(), clients=[1, 8], turns=2, seconds=0.3, threads=1, device="cpu", requests=200
    )
    *cases, memory = report["cases"].values()
    for case in cases:
        rows = case["contestants"]
        assert rows["one at a time"]["ratio"] == 1 and rows["batched"]["ratio"] > 0
        assert all(0 < row["p50_ms"] <= row["p99_ms"] and row["count"] > 10 for row in rows.values())
    assert len(memory["contestants"]) == 11 and all(row["MiB"] > 50 for row in memory["contestants"].values())


def test_only_supervised_tasks():
    from metadist.config.document import read_document

    with pytest.raises(ConfigError, match="supervised"):
        bench(
            "serve",
            document=read_document("bandit_rl2"),
            clients=[1],
            turns=1,
            seconds=0.1,
            threads=1,
            device="cpu",
            requests=0,
        )
