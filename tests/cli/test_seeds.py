"""Several seeds: child runs under one parent that gets mean and SD, once all of them are there."""

from __future__ import annotations

import contextlib
import itertools
import sqlite3
import statistics
from contextlib import nullcontext

import pytest
import tiny
from tiny import train

from metadist.core.errors import ConfigError
from metadist.experiment.request import RunRequest
from metadist.experiment.seeds import train_seeds
from metadist.training.observers import Observer


def go(document, seeds, run_dir, resume=False, stop=lambda: False):
    return train_seeds(
        document, seeds, RunRequest(run_dir=run_dir, resume=resume, stop=stop), lambda _: nullcontext(Observer())
    )


def query(tmp_path, sql):
    [database] = (tmp_path / "runs").glob("*.db")
    with contextlib.closing(sqlite3.connect(f"file:{database}?mode=ro", uri=True, timeout=30)) as connection:
        return connection.execute(sql).fetchall()


@pytest.fixture
def runs(tmp_path, monkeypatch):
    monkeypatch.setenv("METADIST_RUNS", str(tmp_path / "runs"))
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    return tmp_path


@pytest.mark.lane("services")
def test_a_half_finished_group_goes_on_to_the_mean_of_all_seeds(runs, empty_store):
    empty_store(runs / "runs/mlflow.db")
    document = tiny.document("tracking.uri=auto")
    asked = itertools.count()
    half = go(document, [5, 6], None, stop=lambda: next(asked) >= 9)  # in the middle of the second seed
    assert half.interrupted
    assert [r.outcome.stopped for r in half.results] == [None, "interrupted"]
    groups = query(runs, "SELECT key, value FROM metrics WHERE key LIKE '%/sd' OR key LIKE '%/mean'")
    assert groups == [], "a point once recorded stays, so no mean before the end"

    done = go(document, [5, 6], None, resume=True)
    assert not done.interrupted
    assert done.group_id == half.group_id
    assert done.run_dir == half.run_dir, "without a folder the newest group of that name"
    # The tasks of the first seed judge all of them.
    scores = [
        train(tiny.experiment(f"seed={s}", "evaluate.seed=5"), run_dir=str(runs / f"alone-{s}"), plots=False)
        .evaluations[0]
        .score
        for s in (5, 6)
    ]
    assert [r.evaluations[0].score for r in done.results] == scores
    mean, deviation = statistics.mean(scores), statistics.stdev(scores)
    assert done.summary["eval/test/mse/mean"] == pytest.approx(mean)
    assert done.summary["eval/test/mse/sd"] == pytest.approx(deviation)

    recorded = query(
        runs, "SELECT run_uuid, key, value FROM metrics WHERE key IN ('eval/test/mse/mean', 'eval/test/mse/sd')"
    )
    assert len(recorded) == 2
    assert {key: value for _, key, value in recorded} == pytest.approx(
        {"eval/test/mse/mean": mean, "eval/test/mse/sd": deviation}
    )
    [parent] = {run for run, _, _ in recorded}
    children = query(runs, "SELECT run_uuid FROM tags WHERE key = 'mlflow.parentRunId' AND value = '" + parent + "'")
    assert len(children) == 2
    assert {s for (s,) in query(runs, "SELECT status FROM runs")} == {"FINISHED"}
    assert len(query(runs, "SELECT run_uuid FROM runs")) == 3


def test_other_seeds_than_the_groups_are_refused(runs):
    go(tiny.document("outer.meta_steps=1"), [1, 2], str(runs / "group"))
    with pytest.raises(ConfigError, match=r"has the seeds \[1, 2\], not \[1, 2, 3\]"):
        go(tiny.document("outer.meta_steps=1"), [1, 2, 3], str(runs / "group"), resume=True)


@pytest.mark.lane("numerics")
def test_the_command(cli, config, tmp_path):
    result = cli("train", config(), "--seeds", "0,1", "--run-dir", tmp_path / "group", "--json")
    assert result.exit_code == 0, result.output
    about = tiny.last_json(result.stdout)
    assert [s["seed"] for s in about["seeds"]] == [0, 1]
    assert {p.name for p in (tmp_path / "group").iterdir()} >= {"group.json", "seed-0", "seed-1"}
    assert about["seeds"][0]["params_sha256"] != about["seeds"][1]["params_sha256"]
    assert "mean ± SD" in result.stdout
    again = tiny.last_json(
        cli("train", config(), "--seeds", "1,0", "--run-dir", tmp_path / "group", "--resume", "--json").stdout
    )
    assert {s["params_sha256"] for s in again["seeds"]} == {s["params_sha256"] for s in about["seeds"]}
    one = tiny.last_json(cli("train", config(), "--seeds", "4", "--json").stdout)
    assert "eval/test/mse/sd" not in one["summary"], "one seed has no deviation"
