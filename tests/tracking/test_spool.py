from __future__ import annotations

import json
import math
import random
import subprocess
import sys
import tracemalloc
from pathlib import Path

import pytest

from metadist.core.errors import MetadistError
from metadist.tracking.spool import Spool, Steps, legal_key, read_lines


def records(folder: Path) -> list[dict]:
    return [json.loads(line) for line in (folder / "spool.jsonl").read_text().splitlines()]


def test_steps_are_an_exact_set_in_any_order():
    generator = random.Random(0)
    for spread in (30, 300):
        steps, truth = Steps(), set()
        for _ in range(200):
            step = generator.randrange(-5, spread)
            assert (step in steps) == (step in truth)
            assert steps.add(step) == (step not in truth)
            truth.add(step)
        assert len(steps) == len(truth)


def test_evenly_spaced_steps_take_constant_memory(tmp_path):
    spool = Spool(tmp_path)

    def log(first: int, last: int) -> None:
        for step in range(first, last, 10):
            spool.metrics(step, {f"meta/{name}": 0.5 for name in "abcdefgh"})

    log(0, 20_000)
    tracemalloc.start()
    log(20_000, 40_000)
    grown = tracemalloc.get_traced_memory()[0]
    tracemalloc.stop()
    assert grown < 4_000, f"16,000 more points hold {grown} bytes"


def test_the_first_value_of_a_key_and_step_wins_across_attempts(tmp_path):
    first = Spool(tmp_path)
    for step in (10, 20, 30):
        first.metrics(step, {"loss": step, "accuracy": 0.5})
    first.metrics(20, {"loss": -1.0})
    first.close()

    second = Spool(tmp_path)
    for step in (20, 30, 40):
        second.metrics(step, {"loss": step + 0.25, "accuracy": 0.75})
    second.metrics(25, {"loss": 25.0})  # late, out of order, but new
    second.close()
    found = [(r["key"], r["step"], r["value"]) for r in records(tmp_path)]
    assert sorted(found) == sorted(
        [("loss", s, s) for s in (10, 20, 30)]
        + [("loss", 40, 40.25), ("loss", 25, 25.0)]
        + [("accuracy", s, 0.5) for s in (10, 20, 30)]
        + [("accuracy", 40, 0.75)]
    )
    assert [r["seq"] for r in records(tmp_path)] == list(range(len(found)))


@pytest.mark.parametrize("cut", [1, 20, 60])
def test_a_torn_last_line_is_cut_off_and_recorded_again(tmp_path, cut):
    spool = Spool(tmp_path)
    spool.metrics(1, {"loss": 1.0})
    spool.metrics(2, {"loss": 2.0})
    spool.close()
    whole = spool.path.read_bytes()
    spool.path.write_bytes(whole[:-cut])
    assert len(list(read_lines(spool.path, 0))) == 1, "a deliverer must not see half a line"

    again = Spool(tmp_path)
    again.metrics(1, {"loss": 1.5})
    again.metrics(2, {"loss": 2.5})
    again.close()
    assert [(r["step"], r["value"]) for r in records(tmp_path)] == [(1, 1.0), (2, 2.5)]


def test_a_damaged_line_is_passed_over(tmp_path):
    spool = Spool(tmp_path)
    spool.metrics(1, {"loss": 1.0})
    spool.close()
    with open(spool.path, "ab") as file:
        file.write(b"\0" * 40 + b"\n")
    again = Spool(tmp_path)
    assert again.damaged == 1
    assert again.records == 2
    again.close()


def test_non_finite_values(tmp_path):
    spool = Spool(tmp_path)
    spool.metrics(3, {"loss": math.inf, "kl": -math.inf, "entropy": math.nan})
    spool.close()
    found = {r["key"]: r["value"] for r in records(tmp_path)}
    assert found == {"loss": "NaN", "loss_nonfinite": 1.0, "kl": "NaN", "kl_nonfinite": -1.0, "entropy": "NaN"}


@pytest.mark.parametrize(
    ("key", "legal"),
    [
        ("eval/accuracy", "eval/accuracy"),
        ("recall@5", "recall_5"),
        ("/a//b/", "a/b"),
        ("../up", "_../up"),
        ("", "_."),
        ("ä ö", "ä ö"),
        ("x" * 300, "x" * 250),
    ],
)
def test_keys_become_legal_for_mlflow(key, legal):
    validate = pytest.importorskip("mlflow.utils.validation")
    assert legal_key(key) == legal
    validate._validate_metric_name(legal)


def test_params_and_tags_are_recorded_when_they_change_only(tmp_path):
    for value in ("a", "a", "b"):
        spool = Spool(tmp_path)
        spool.set_params({"lr": 0.1, "name": value, "long": "x" * 9000})
        spool.set_tags({"git": value})
        spool.close()
    found = [(r["kind"], r["key"], r["value"]) for r in records(tmp_path)]
    assert found == [
        ("param", "lr", "0.1"),
        ("param", "name", "a"),
        ("param", "long", "x" * 5999 + "…"),
        ("tag", "git", "a"),
        ("param", "name", "b"),
        ("tag", "git", "b"),
    ]


def test_artifacts_are_copied_and_missing_ones_only_warned_of(tmp_path, caplog):
    spool = Spool(tmp_path / "spool")
    plot = tmp_path / "curve.png"
    plot.write_bytes(b"first")
    spool.artifact(plot, "plots")
    plot.write_bytes(b"later")
    assert (tmp_path / "spool/files/plots/curve.png").read_bytes() == b"first"
    spool.artifact(tmp_path / "missing.png")
    assert "missing.png" in caplog.text
    with pytest.raises(ValueError, match="is outside the run"):
        spool.artifact(plot, "../elsewhere")
    spool.close()
    assert len(records(tmp_path / "spool")) == 1


def test_one_writer_at_a_time(tmp_path):
    spool = Spool(tmp_path)
    with pytest.raises(MetadistError, match="another process"):
        Spool(tmp_path, lock_timeout=0.1)
    spool.close()
    Spool(tmp_path).close()


FULL_DISK = """
import logging, resource, sys
from pathlib import Path
import metadist.tracking.spool as spools
logging.basicConfig(stream=sys.stdout)
spools.MAX_PENDING = 20_000
spool = spools.Spool(Path(sys.argv[1]))
hard = resource.getrlimit(resource.RLIMIT_FSIZE)[1]
resource.setrlimit(resource.RLIMIT_FSIZE, (5_000, hard))
for step in range(100):
    spool.metrics(step, {"loss": step})
spool.flush()
assert spool.lost == 0, spool.lost
if sys.argv[2] == "long":
    for step in range(100, 1_000):
        spool.metrics(step, {"loss": step})
    assert spool.lost > 0
resource.setrlimit(resource.RLIMIT_FSIZE, (hard, hard))
spool.metrics(1_000, {"loss": 1_000})
spool.close()
print(spool.lost)
"""


@pytest.mark.lane("services")
@pytest.mark.parametrize("outage", ["short", "long"])
def test_a_full_disk_is_warned_of_and_survived(tmp_path, outage):
    done = subprocess.run(
        [sys.executable, "-c", FULL_DISK, str(tmp_path), outage], capture_output=True, text=True, check=True
    )
    assert done.stdout.count("training continues") == 1
    lost = int(done.stdout.split()[-1])
    steps = [r["step"] for r in records(tmp_path)]
    assert len(steps) == len(set(steps)) == (101 if outage == "short" else 1_001) - lost
    assert steps[:100] == list(range(100))
    assert steps[-1] == 1_000
