"""Drivers in processes of their own: killed at random moments, interrupted, terminated; and their remains."""

from __future__ import annotations

import contextlib
import json
import os
import random
import signal
import time
from collections import Counter
from pathlib import Path

import psutil
import pytest
import tiny
from drivers import newest, query, wait_for

from metadist.tracking.spool import read_json

pytestmark = pytest.mark.lane("services")

#: long enough to be killed in: a second or more of meta-steps, a checkpoint after each
STEPS = 120
OFTEN = ["checkpoint.every=1", f"outer.meta_steps={STEPS}", "evaluate.every=20", "outer.meta_batch_size=6"]
TRACKED = "tracking.uri=auto"


@pytest.fixture
def expected(tmp_path):
    """The result of the unbroken run."""
    return tiny.train(tiny.experiment(*OFTEN, "checkpoint.every=1000"), run_dir=str(tmp_path / "whole"), plots=False)


def gone(processes, seconds=180.0) -> list[str]:
    """Wait until ``processes`` have ended, and return the command lines of the others.

    Ray's agents check their raylet only once a minute, and a store that is being created is finished first.
    """
    _, alive = psutil.wait_procs([p for p in processes if not is_agent(p)], timeout=seconds)
    left = []
    for process in alive:
        with contextlib.suppress(psutil.NoSuchProcess):  # gone by now
            if process.status() != psutil.STATUS_ZOMBIE:
                left.append(" ".join(process.cmdline())[:120])
    return left


def is_agent(process) -> bool:
    try:
        return process.cmdline()[0].rstrip() in ("ray::RuntimeEnvAgent", "ray::DashboardAgent")
    except (psutil.NoSuchProcess, IndexError):
        return False


def kill_and_resume(folder: Path, kills: int, *more: str, seed=0):
    """Kill drivers with SIGKILL at random moments after their first checkpoint, then let one finish."""
    chance, run = random.Random(seed), folder / "run"
    arguments = ["train", tiny.write(folder, *OFTEN), *more, "--run-dir", run, "--resume", "--json"]
    moments = []
    for _ in range(kills):
        before = newest(run)
        process = tiny.start(*arguments, folder=folder)
        wait_for(process, lambda before=before: newest(run) > before)
        time.sleep(chance.random() * 0.3)
        family = psutil.Process(process.pid).children(recursive=True)
        process.send_signal(signal.SIGKILL)
        process.communicate()
        assert gone(family) == [], "nothing may outlive its driver"
        moments.append(newest(run))
        if moments[-1] >= STEPS - 10:
            break
    done = tiny.run(*arguments, folder=folder)
    assert done.returncode == 0, done.stderr
    assert "resumed at meta-step" in done.stderr
    return tiny.last_json(done.stdout), moments


def check_points(folder: Path):
    """Every metric of the one MLflow run exactly once at every step."""
    [(run_uuid, status)] = query(folder, "SELECT run_uuid, status FROM runs")
    assert status == "FINISHED"
    points = Counter((key, step) for key, step in query(folder, "SELECT key, step FROM metrics"))
    assert set(points.values()) == {1}
    steps = {}
    for key, step in points:
        steps.setdefault(key, set()).add(step)
    for key in ("meta/loss", "meta/mse", "meta/gradient_norm", "engine/tasks_per_second"):
        assert steps[key] == set(range(1, STEPS + 1)), key
    assert steps["eval/validation/mse"] == set(range(20, STEPS + 1, 20))
    assert steps["eval/test/mse"] == {STEPS}
    return run_uuid


@pytest.mark.long
def test_killed_drivers_lose_nothing(tmp_path, expected):
    result, moments = kill_and_resume(tmp_path, 3, "--workers", "0", TRACKED)
    assert moments == sorted(moments)
    assert result["params_sha256"] == expected.params_sha256
    assert result["evaluation"] == expected.as_dict()["evaluation"]
    check_points(tmp_path)
    values = dict(query(tmp_path, "SELECT step, value FROM metrics WHERE key = 'meta/loss'"))
    assert [values[p["meta_step"]] for p in expected.outcome.progress.curve] == [
        p["loss"] for p in expected.outcome.progress.curve
    ]


@pytest.mark.lane("ray")
@pytest.mark.long
def test_killed_drivers_of_actors_leave_none_behind(tmp_path, expected):
    result, _ = kill_and_resume(tmp_path, 1, "--workers", "2")
    assert result["params_sha256"] == expected.params_sha256


@pytest.mark.lane("ray")
@pytest.mark.long
@pytest.mark.timeout(3600)
@pytest.mark.parametrize("workers", ["0", "2"])
def test_drivers_killed_twenty_times(tmp_path, workers):
    kills = 0
    for seed in range(20):
        folder = tmp_path / str(seed)
        folder.mkdir()
        whole = tiny.train(tiny.experiment(*OFTEN, f"seed={seed}"), run_dir=str(folder / "whole"), plots=False)
        result, moments = kill_and_resume(folder, 3, "--workers", workers, f"seed={seed}", TRACKED, seed=seed)
        assert result["params_sha256"] == whole.params_sha256
        check_points(folder)
        kills += len(moments)
        if kills >= 20:
            return


# Signals --------------------------------------------------------------------------------------------------------------

ENDLESS = ["outer.meta_steps=100000", "checkpoint.every=50", "evaluate.every=100000", "engine.compile=never"]


def interrupt(folder: Path, number: int, *more: str, group=False):
    """A run that gets a signal in the middle; returns (exit code, stdout, stderr, processes that are left)."""
    process = tiny.start(
        "train", tiny.write(folder, *ENDLESS), *more, "--run-dir", folder / "run", "--json", folder=folder
    )
    # A store takes longer to make than is waited for at the end of a run that is interrupted.
    delivered = lambda: TRACKED not in more or read_json(folder / "run/tracking/acked.json").get("records", 0) > 0  # noqa: E731
    wait_for(process, lambda: newest(folder / "run") > 0 and delivered())
    family = psutil.Process(process.pid).children(recursive=True)
    if group:
        os.killpg(process.pid, number)
    else:
        process.send_signal(number)
    out, err = process.communicate(timeout=120)
    return process.returncode, out, err, gone(family)


def check_interrupted(folder, code, out, err, left):
    assert code == 130, f"{code}\n{out}\n{err}"
    assert "Traceback" not in err
    assert "--resume" in err
    assert str(folder / "run") in err
    about = tiny.last_json(out)
    assert about["stopped"] == "interrupted"
    assert about["evaluation"] is None
    assert newest(folder / "run") == about["meta_step"], "with a checkpoint of the last meta-step"
    assert left == []
    return about


@pytest.mark.long
def test_ctrl_c_checkpoints_closes_mlflow_and_can_be_resumed(tmp_path, empty_store):
    empty_store(tmp_path / "runs/mlflow.db")
    about = check_interrupted(tmp_path, *interrupt(tmp_path, signal.SIGINT, "--workers", "0", TRACKED))
    [(run_uuid, status)] = query(tmp_path, "SELECT run_uuid, status FROM runs")
    assert status == "KILLED"
    steps = about["meta_step"] + 7
    # the schedule is constant, so the end may move
    done = tiny.run(
        "train",
        tiny.write(tmp_path, *ENDLESS),
        "--workers",
        "0",
        TRACKED,
        f"outer.meta_steps={steps}",
        "--run-dir",
        tmp_path / "run",
        "--resume",
        "--json",
        folder=tmp_path,
    )
    assert done.returncode == 0, done.stderr
    assert query(tmp_path, "SELECT run_uuid, status FROM runs") == [(run_uuid, "FINISHED")]
    whole = tiny.train(
        tiny.experiment(*ENDLESS, f"outer.meta_steps={steps}"),
        run_dir=str(tmp_path / "whole"),
        plots=False,
        test=False,
    )
    assert tiny.last_json(done.stdout)["params_sha256"] == whole.params_sha256
    assert tiny.last_json(done.stdout)["run_id"] == about["run_id"]


@pytest.mark.lane("ray")
@pytest.mark.long
def test_sigterm_is_like_ctrl_c_with_actors_too(tmp_path):
    check_interrupted(tmp_path, *interrupt(tmp_path, signal.SIGTERM, "--workers", "1"))


@pytest.mark.lane("ray")
@pytest.mark.long
def test_ctrl_c_in_a_terminal_reaches_the_actors_too(tmp_path):
    check_interrupted(tmp_path, *interrupt(tmp_path, signal.SIGINT, "--workers", "1", group=True))


@pytest.mark.lane("ray")
@pytest.mark.parametrize("number", [signal.SIGINT, pytest.param(signal.SIGTERM, marks=pytest.mark.long)])
def test_a_signal_while_ray_starts(tmp_path, number):
    process = tiny.start(
        "train", tiny.write(tmp_path, *ENDLESS), "--workers", "1", "--run-dir", tmp_path / "run", folder=tmp_path
    )
    me = psutil.Process(process.pid)
    wait_for(process, lambda: any("gcs_server" in command for command in commands(me)))
    time.sleep(0.5)
    family = children(me)
    process.send_signal(number)
    out, err = process.communicate(timeout=150)
    assert process.returncode == 130, err
    assert "Traceback" not in err
    assert "interrupted" in err
    assert out == ""
    assert gone(family) == []


def commands(process) -> list[str]:
    found = []
    for child in process.children(recursive=True):
        with contextlib.suppress(psutil.NoSuchProcess):  # while Ray starts, processes come and go
            found.append(" ".join(child.cmdline()))
    return found


def children(process) -> list[psutil.Process]:
    found = []
    for child in process.children(recursive=True):
        with contextlib.suppress(psutil.NoSuchProcess):
            child.cmdline()
            found.append(child)
    return found


@pytest.mark.lane("ray")
@pytest.mark.long
@pytest.mark.parametrize("workers", ["0", "2"])
def test_the_second_ctrl_c_stops_at_once(tmp_path, workers):
    """A meta-step that never ends can still be left."""
    (tmp_path / "slow.py").write_text(
        "import time\n"
        "from dataclasses import dataclass\n"
        "from metadist.tasks.sinusoid import Sinusoid\n\n"
        "@dataclass(frozen=True, kw_only=True)\n"
        "class Slow(Sinusoid):\n"
        "    def sample(self, keys, split):\n"
        "        if keys.meta_step == 60 and split == 'train':\n"
        "            open('reached', 'w').close()\n"
        "            time.sleep(600)\n"
        "        return super().sample(keys, split)\n"
    )
    overrides = ["tasks={name: 'slow:Slow'}", "--workers", workers]
    process = tiny.start(
        "train", tiny.write(tmp_path, *ENDLESS), *overrides, "--run-dir", tmp_path / "run", folder=tmp_path
    )
    wait_for(process, lambda: (tmp_path / "reached").exists())
    family = children(psutil.Process(process.pid))
    process.send_signal(signal.SIGINT)
    err = ""
    while "press Ctrl-C again" not in err:  # two signals that are pending at once are one
        assert (line := process.stderr.readline()), err
        err += line
    assert process.poll() is None
    process.send_signal(signal.SIGINT)
    _, more = process.communicate(timeout=150)
    err += more
    assert process.returncode == 130
    assert "Traceback" not in err
    assert newest(tmp_path / "run") == 50
    assert gone(family) == []


# Joining --------------------------------------------------------------------------------------------------------------


@pytest.mark.lane("ray")
def test_a_cluster_that_is_not_there_is_one_line_after_a_bounded_wait(tmp_path):
    began = time.monotonic()
    done = tiny.run("train", tiny.write(tmp_path), "--workers", "1", folder=tmp_path, RAY_ADDRESS="127.0.0.1:6399")
    assert time.monotonic() - began < 300
    assert done.returncode == 2
    assert len(done.stderr.strip().splitlines()) == 1, done.stderr
    assert "RAY_ADDRESS=127.0.0.1:6399" in done.stderr
    assert "--workers 0" in done.stderr
    assert done.stdout == ""


@pytest.mark.lane("ray")
@pytest.mark.long
def test_no_gpu_is_one_line_after_a_bounded_wait(tmp_path):
    done = tiny.run(
        "train",
        tiny.write(tmp_path),
        "--workers",
        "1",
        "workers.0.gpus=0.5",
        "engine.worker_patience=2",
        folder=tmp_path,
    )
    assert done.returncode == 2
    assert len(done.stderr.strip().splitlines()) == 1, done.stderr
    assert "gpus: 0.5" in done.stderr
    assert done.stdout == ""


@pytest.mark.lane("ray")
@pytest.mark.long
def test_actors_find_ones_own_module_and_stdout_stays_clean(tmp_path):
    """The command line, the tasks of a module in the working directory, two actors: the same hash as without."""
    (tmp_path / "myown.py").write_text(
        "from dataclasses import dataclass\n"
        "from metadist.tasks.sinusoid import Sinusoid\n\n"
        "@dataclass(frozen=True, kw_only=True)\n"
        "class Mine(Sinusoid):\n"
        "    shift: float = 1.0\n\n"
        "    def curve(self, keys, x):\n"
        "        return super().curve(keys, x) + self.shift\n\n"
        "def loss(p, t):\n"
        "    return (p - t).abs().flatten(1).mean(1)\n"
    )
    config = tiny.write(tmp_path)
    own = ["tasks={name: 'myown:Mine', shift: 2}", "loss=myown:loss"]
    two, none = (
        tiny.run("train", config, *own, "--workers", workers, "--json", folder=tmp_path) for workers in ("2", "0")
    )
    assert two.returncode == 0, two.stderr
    assert none.returncode == 0, none.stderr
    a, b = tiny.last_json(two.stdout), tiny.last_json(none.stdout)
    assert a["params_sha256"] == b["params_sha256"]
    assert a["evaluation"] == b["evaluation"]
    kept = ("meta-step", "INFO", "WARNING")
    assert all(line.startswith(kept) for line in two.stderr.splitlines()), two.stderr
    assert [line.split()[0] for line in two.stdout.splitlines()][:2] == [
        line.split()[0] for line in none.stdout.splitlines()
    ][:2]
    assert json.loads((Path(a["run_dir"]) / "result.json").read_text())["params_sha256"] == a["params_sha256"]
