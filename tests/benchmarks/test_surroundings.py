"""The benchmarks of what surrounds the mathematics: the same work for all contestants."""

from __future__ import annotations

import pytest

from metadist.benchmarks import BENCHMARKS, bench
from metadist.cli.bench import app
from metadist.cli.display import show_benchmark
from metadist.config.document import read_document
from metadist.core.errors import ConfigError


@pytest.mark.lane("ray")
@pytest.mark.long
def test_memory_of_the_driver_is_flat() -> None:
    (case,) = bench("driver-memory", document=read_document("sinusoid_maml"), steps=2000)["cases"].values()
    readings = case["contestants"]["driver"]["readings"]
    assert readings[-1] - readings[1] < 16, readings


def test_an_unknown_benchmark_is_named() -> None:
    with pytest.raises(ConfigError, match="'transprot' is not one of"):
        bench("transprot")


def test_every_benchmark_has_a_subcommand() -> None:
    assert {c.name or c.callback.__name__ for c in app.registered_commands} == BENCHMARKS.keys()


def test_reports_are_shown_whole(capsys) -> None:
    rows = {
        "a [b]": {"median": 12345.678, "quartiles": [1.0, 2.5], "note": "[1×2]·[2×3]"},
        "c": {"median": 0.5, "more": None},
    }
    case = {
        "unit": "tasks/s",
        "contestants": rows,
        "floor": {"ms": 2.0, "at": {"size": [3, 4]}},
        "same_parameters": True,
    }
    show_benchmark(
        {
            "benchmark": "x",
            "settings": {"steps": 3},
            "cases": {"one [1]": case},
            "versions": {"torch": "2"},
            "machine": {"cores": 2},
        }
    )
    shown = capsys.readouterr().out
    for part in (
        "x: steps=3",
        "one [1] [tasks/s]",
        "a [b]",
        "12346",
        "1 … 2.5",
        "[1×2]·[2×3]",
        "ms=2, at=(size=3 … 4)",
        "True",
        "torch=2",
        "cores=2",
    ):
        assert part in shown, part
