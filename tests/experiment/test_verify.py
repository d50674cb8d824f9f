"""``metadist verify``: equal for any number of workers and kills, and unequal where something is wrong."""

from __future__ import annotations

import families
import particles
import pytest
import tiny
import yaml
from typer.testing import CliRunner

SHORT = ["evaluate.every=100", "outer.meta_steps=12"]


def verify(config, *arguments):
    from metadist.cli.app import app

    return CliRunner().invoke(app, ["verify", str(config), *arguments, "--json"])


def test_the_same_parameters_for_any_number_of_workers_and_whichever_are_killed(cluster, tmp_path):
    result = verify(tiny.write(tmp_path, *SHORT), "--workers", "0,1,2", "--kill", "1")
    assert result.exit_code == 0, result.output
    report = tiny.last_json(result.stdout)
    assert report["ok"]
    assert report["same"]
    assert len({row["params_sha256"] for row in report["rows"]}) == 1
    by_workers = {row["workers"]: row for row in report["rows"]}
    assert by_workers["0"]["killed"] == []
    for workers in ("1", "2"):
        assert len(by_workers[workers]["killed"]) == 1
        assert by_workers[workers]["retried"] >= 1
    assert "identical parameters" in result.stdout
    assert "raylet" not in result.stdout  # Ray's own reports of the dead


@pytest.mark.long
def test_different_parameters_exit_with_1(cluster, tmp_path):
    config = tiny.write(tmp_path, *SHORT, f"tasks={{name: '{families.__name__}:ByProcess'}}", "outer.meta_steps=2")
    result = verify(config, "--workers", "0,1")
    assert result.exit_code == 1, result.output
    report = tiny.last_json(result.stdout)
    assert not report["ok"]
    assert not report["same"]
    assert "DIFFERENT parameters" in result.stdout


@pytest.mark.long
def test_trials_give_the_same_parameters_whoever_rolls_out_and_is_killed(cluster, tmp_path):
    short = [
        "outer.meta_steps=4",
        "outer.meta_batch_size=40",
        "outer.shard_size=10",
        "evaluate={every: 4, tasks: 20, test_tasks: 20}",
    ]
    result = verify("bandit_rl2", *short, "--workers", "0,learners=1/environments=2", "--kill", "2")
    assert result.exit_code == 0, result.output
    rows = tiny.last_json(result.stdout)["rows"]
    assert [row["workers"] for row in rows] == ["0", "learners=1,environments=2"]
    assert [row["killed"][0].split("-")[0] for row in rows[1:]] == ["environment"]
    assert [row["killed"][1].split("-")[0] for row in rows[1:]] == ["learner"]
    assert len({row["params_sha256"] for row in rows}) == 1


@pytest.mark.parametrize("workers", ["", "x", "1,1", "0,,1", "learners=1/environments=1,learners=1/environments=1"])
def test_counts_that_make_no_sense_are_refused(workers):
    from metadist.core.errors import ConfigError
    from metadist.experiment.verify import counts

    with pytest.raises(ConfigError, match="--workers .* expected different numbers of workers"):
        counts(workers)


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        (["--workers", "0"], "--workers 0: a single run is compared with nothing; give two or more"),
        (["--workers", "2", "--kill", "1"], "--workers 2: a single run is compared with nothing"),
        (["--workers", "1,01"], "--workers 1,01: two runs have the same workers"),
        (["--workers", "2,learners=2"], "two runs have the same workers"),
        (["--workers", "0,learners=0"], "two runs have the same workers"),
        (["--workers", "0", "--kill", "2"], "--kill 2: --workers 0 has no workers, so nobody would be killed"),
        (["--workers", "0,learners=0", "--kill", "1"], "--kill 1: --workers 0,learners=0 has no workers"),
    ],
)
def test_a_comparison_with_nothing_and_a_kill_of_nobody_are_refused(tmp_path, options, expected):
    result = verify(tiny.write(tmp_path, *SHORT), *options)
    assert result.exit_code == 2, result.output
    assert expected in " ".join(result.stderr.split()), result.output


@pytest.mark.long
@pytest.mark.timeout(900)
def test_a_kill_at_every_meta_step(cluster, tmp_path):
    result = verify(tiny.write(tmp_path, *SHORT), "--workers", "0,2,4", "--kill", "12")
    assert result.exit_code == 0, result.output
    assert all(row["workers"] == "0" or len(set(row["killed"])) == 12 for row in tiny.last_json(result.stdout)["rows"])


@pytest.mark.long
def test_particles_end_in_the_same_parameters_whoever_holds_their_states_and_is_killed(cluster, tmp_path):
    config = tmp_path / "particles.yaml"
    config.write_text(yaml.safe_dump(particles.document("outer.meta_steps=12", "outer.shard_size=1")))
    result = verify(config, "--workers", "0,1,2", "--kill", "3")
    assert result.exit_code == 0, result.output
    rows = tiny.last_json(result.stdout)["rows"]
    assert [len(row["killed"]) for row in rows] == [0, 3, 3]
    assert len({row["params_sha256"] for row in rows}) == 1
