"""``metadist control``: its output for a live run, its messages where no run can be steered, and a steered Ray run."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import time

import pytest
import tiny
from filelock import FileLock
from steerable import Live
from tiny import train

pytestmark = pytest.mark.lane("services")


@pytest.fixture(scope="module")
def live(tmp_path_factory):
    with Live(tmp_path_factory.mktemp("live") / "run") as run:
        yield run


@pytest.fixture(scope="module")
def over(tmp_path_factory):
    """The directory of a run that was interrupted half way."""
    where = tmp_path_factory.mktemp("over") / "run"
    calls = iter(range(100))
    train(tiny.experiment(), run_dir=str(where), stop=lambda: next(calls) >= 3, plots=False)
    return where


def out(result):
    assert result.exit_code == 0, f"{result.stdout}\n{result.stderr}\n{result.exception!r}"
    return result.stdout


def mistake(result, *expected):
    lines = result.stderr.splitlines()
    assert (result.exit_code, len(lines), result.stdout) == (2, 1, ""), (
        f"{result.stdout}\n{result.stderr}\n{result.exception!r}"
    )
    for text in expected:
        assert text in lines[0], lines[0]


def watched(cli, folder, *more):
    """Return the output of half a second, or of longer on a busy machine."""
    for seconds in ("0.5", "3", "30"):
        if seen := out(cli("control", folder, "watch", "--seconds", seconds, *more)):
            return seen
    raise AssertionError("the run publishes nothing")


def test_a_live_run(cli, live):
    shown = out(cli("control", live.folder, "status"))
    assert "phase       training" in shown
    assert "workers     none: the driver computes" in shown
    assert re.search(r"meta-step   \d+ of 1000000", shown)
    status = json.loads(out(cli("control", live.folder, "status", "--json")))
    assert (status["phase"], status["meta_batch_size"]) == ("training", 8)
    assert re.fullmatch(r"meta-step \d+: paused; .*\n", out(cli("control", live.folder, "pause")))
    assert json.loads(out(cli("control", live.folder, "checkpoint", "--json")))["message"] == "checkpoint written"
    assert "resumed" in out(cli("control", live.folder, "resume"))
    assert "meta_batch_size is 6 from now on" in out(cli("control", live.folder, "set", "meta_batch_size=6"))
    lines = watched(cli, live.folder, "--json").splitlines()
    assert {"kind", "meta_step", "values", "message", "time"} == json.loads(lines[-1]).keys()
    assert "meta-step" in watched(cli, live.folder)
    address = live.record["address"]
    assert (
        json.loads(out(cli("control", address, "status", "--json", "--token-file", live.record["token_file"])))[
            "meta_batch_size"
        ]
        == 6
    )
    mistake(
        cli("control", live.folder, "set", "workers=3"),
        "workers: this run computes in its own process",
        "--resume --workers N",
    )
    mistake(cli("control", address, "status"), "--token-file FILE")


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["statsu"], ["'statsu' is not one of status, watch", "did you mean 'status'?"]),
        (["set"], ["expected meta_batch_size=N or workers=N"]),
        (["set", "meta_batchsize=3"], ["'meta_batchsize=3'", "did you mean 'meta_batch_size'?"]),
        (["set", "meta_batch_size=many"], ["'many' is not a whole number"]),
        (["set", "workers=learners=x"], ["'learners=x' is not a whole number or role=number"]),
        (["set", "meta_batch_size=0"], ["meta_batch_size: 0 is not between 1 and"]),
        (["pause", "now"], ["control pause: unexpected argument 'now'"]),
        (["status"], ["ended at meta-step 3 of 6", "resume it with: metadist train", "--resume"]),
    ],
)
def test_mistakes(cli, over, arguments, expected):
    mistake(cli("control", over, *arguments), *expected)


def test_without_a_driver(cli, over, tmp_path):
    mistake(cli("control", tmp_path / "nothing", "status"), "neither a run directory", "nor HOST:PORT")
    mistake(cli("control", "127.0.0.1:1", "status", "--token-file", over / "control.token"), "no server answers there")
    record = json.loads((over / "control.json").read_text())
    where = tmp_path / "run"
    shutil.copytree(over, where)

    def recorded(**changes):
        (where / "control.json").write_text(json.dumps({**record, "ended": None, **changes}))
        return cli("control", where, "status")

    gone = os.posix_spawn("/bin/true", ["true"], {})
    os.waitpid(gone, 0)
    mistake(
        recorded(pid=gone),
        f"was killed or crashed (process {gone} no longer exists)",
        f"{where}/config.yaml --run-dir {where} --resume",
    )
    mistake(recorded(started=1.0), "was killed or crashed"), "another process has the number now"
    mistake(recorded(host="elsewhere"), "the driver runs on elsewhere and listens on loopback only")
    mistake(recorded(address=None, off="no port"), "can't be steered: no port")
    (where / "control.json").unlink()
    mistake(cli("control", where, "status"), "nothing trains this run, or a driver has just begun")
    (where / "run.json").unlink()
    (where / "group.json").write_text('{"seeds": [0, 1]}')
    mistake(cli("control", where, "status"), "a group of seeds", "seed-0", "seed-1")


def test_a_driver_that_has_just_begun(cli, over, tmp_path):
    where = tmp_path / "run"
    shutil.copytree(over, where)
    with FileLock(str(where / "driver.lock")):
        mistake(cli("control", where, "status"), "is still starting; try again in a moment")


def test_another_run_at_the_recorded_address(cli, live, tmp_path):
    shutil.copytree(live.folder, tmp_path / "run")
    record = {**live.record, "run_id": "mine"}
    (tmp_path / "run/control.json").write_text(json.dumps(record))
    mistake(cli("control", tmp_path / "run", "status"), "another run, ", "out of date")


@pytest.mark.parametrize(
    ("override", "expected"),
    [
        ("control.host=0.0.0.0", "control.host: 0.0.0.0: other machines could steer this run without encryption"),
        ("control.token_file=nowhere", "control.token_file: token-file nowhere"),
        ("control.tls_cert=nowhere", "control.tls_cert, control.tls_key: TLS takes both"),
        ("control.port=99999", "control.port: 99999"),
        ("control.hots=1", "did you mean 'host'?"),
    ],
)
def test_mistakes_in_the_config(cli, config, tmp_path, override, expected):
    mistake(cli("train", config(override), "--run-dir", tmp_path / "run"), expected)
    assert not (tmp_path / "run").exists()


# A Ray run, in processes of their own ---------------------------------------------------------------------------------

STEPS = 1200
RAY = (
    "evaluate.every=100",
    "checkpoint.every=50",
    "engine.compile=never",
    f"outer.meta_steps={STEPS}",
    "outer.meta_batch_size=32",
    "outer.shard_size=4",
)


class Driver:
    """A training in a process of its own; each command runs in another process."""

    def __init__(self, folder, where, *arguments):
        self.folder, self.where = folder, where
        self.process = tiny.start(
            "train", tiny.write(folder, *RAY), "--run-dir", where, "--json", *arguments, folder=folder
        )

    def control(self, *arguments):
        done = tiny.run("control", self.where, *arguments, folder=self.folder)
        assert done.returncode == 0, f"{arguments}: {done.stdout}{done.stderr}"
        return done.stdout

    def status(self):
        return json.loads(self.control("status", "--json"))

    def until(self, condition, seconds=180.0):
        deadline = time.monotonic() + seconds
        while True:
            assert self.process.poll() is None, self.process.communicate()
            assert time.monotonic() < deadline, "the condition never held"
            done = tiny.run("control", self.where, "status", "--json", folder=self.folder)
            if done.returncode == 0 and condition(status := json.loads(done.stdout)):
                return status
            assert done.returncode == 0 or re.search(
                "still starting|neither a run directory|nothing trains", done.stderr
            ), done.stderr
            time.sleep(0.2)

    def end(self, code=0):
        out, err = self.process.communicate(timeout=400)
        assert self.process.returncode == code, f"{out}\n{err}"
        return tiny.last_json(out), err


@pytest.mark.lane("ray")
@pytest.mark.long
@pytest.mark.timeout(1200)
def test_a_ray_run_steered_killed_and_resumed_ends_with_the_same_bits(tmp_path):
    """Every command on a live run that is stopped, resumed, killed and resumed; then the same log in one process."""
    driver = Driver(tmp_path, tmp_path / "run", "--workers", "2")
    try:
        driver.until(lambda s: s["phase"] == "training" and s["meta_step"] > 2)
        watched = [json.loads(line) for line in driver.control("watch", "--seconds", "1", "--json").splitlines()]
        assert any(w["kind"] == "step" and w["values"]["loss"] for w in watched)
        driver.control("pause")
        paused = driver.status()
        assert paused["phase"] == "paused"
        time.sleep(1.0)
        assert driver.status()["meta_step"] == paused["meta_step"]
        driver.control("checkpoint")
        assert (tmp_path / "run/checkpoints" / f"step-{paused['meta_step']:08d}").is_dir()
        driver.control("set", "workers=3")
        joined = driver.until(lambda s: s["there"] == {"learner": 3})
        assert joined["phase"] == "paused", "workers join a paused run"
        driver.control("resume")
        changed = json.loads(driver.control("set", "meta_batch_size=64", "--json"))
        assert changed["meta_step"] > paused["meta_step"]
        refused = tiny.run("control", tmp_path / "run", "set", "workers=environments=2", folder=tmp_path)
        assert (refused.returncode, "this run has no environments" in refused.stderr) == (2, True)
        driver.until(lambda s: s["meta_step"] > changed["meta_step"] + 3)
        driver.control("set", "workers=1")
        driver.until(lambda s: s["there"] == {"learner": 1})
        driver.control("stop")
        stopped, err = driver.end(130)
        assert stopped["stopped"] == "interrupted"
        assert f"stopped at meta-step {stopped['meta_step']}" in err

        driver = Driver(tmp_path, tmp_path / "run", "--workers", "2", "--resume")
        status = driver.until(lambda s: s["meta_step"] > stopped["meta_step"] + 5)
        assert status["meta_batch_size"] == 64
        again = json.loads(driver.control("set", "meta_batch_size=24", "--json"))
        driver.until(lambda s: s["meta_step"] > again["meta_step"] + 2)
        driver.process.send_signal(signal.SIGKILL)
        driver.process.communicate()
        gone = tiny.run("control", tmp_path / "run", "status", folder=tmp_path)
        assert "was killed or crashed" in gone.stderr

        driver = Driver(tmp_path, tmp_path / "run", "--workers", "2", "--resume")
        done, err = driver.end()
        assert "by the command log" in err or done["meta_step"] == STEPS
    finally:
        if driver.process.poll() is None:
            driver.process.kill()
    history = [json.loads(line) for line in (tmp_path / "run/commands.jsonl").read_text().splitlines()]
    assert [c["command"] for c in history] == [
        "pause",
        "checkpoint",
        "set_workers",
        "resume",
        "set_meta_batch_size",
        "set_workers",
        "stop",
        "set_meta_batch_size",
    ]
    (tmp_path / "unbroken").mkdir()
    shutil.copy(tmp_path / "run/commands.jsonl", tmp_path / "unbroken")
    unbroken = tiny.run(
        "train",
        tiny.write(tmp_path, *RAY),
        "--run-dir",
        tmp_path / "unbroken",
        "--workers",
        "0",
        "--json",
        folder=tmp_path,
        timeout=600,
    )
    assert unbroken.returncode == 0, unbroken.stderr
    expected = tiny.last_json(unbroken.stdout)["params_sha256"]
    print(
        {
            "steered, stopped, killed, resumed": done["params_sha256"],
            "unbroken": expected,
            "commands": [(c["command"], c["meta_step"]) for c in history],
        }
    )
    assert done["params_sha256"] == expected
