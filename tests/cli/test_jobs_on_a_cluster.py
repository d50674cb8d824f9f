"""Jobs on a real Ray cluster with token authentication: submitted, followed, stopped, killed, resumed."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import time
from pathlib import Path

import pytest
import yaml
from ray_cluster import BIN, RayCluster

pytestmark = [pytest.mark.long, pytest.mark.timeout(1200), pytest.mark.lane("ray")]

LINES = """
import torch
from beside import slope_of
from metadist import Examples, Task, TaskFamily


class Lines(TaskFamily):
    input_shape = (1,)

    def sample_task(self, key, split):
        generator = key.generator()
        slope, x = slope_of(generator), torch.randn(20, 1, generator=generator)
        return Task(Examples(x[:10], slope * x[:10]), Examples(x[10:], slope * x[10:]))
"""
BESIDE = "import torch\n\n\ndef slope_of(generator):\n    return torch.randn(1, generator=generator)\n"
CONFIG = {
    "name": "lines",
    "tasks": {"name": "lines:Lines"},
    "model": {"name": "mlp", "hidden": [8]},
    "algorithm": {"name": "maml", "inner_lr": 0.01},
    "outer": {"meta_steps": 300, "meta_batch_size": 4, "shard_size": 2},
    "evaluate": {"every": 100, "tasks": 8, "test_tasks": 8},
    "checkpoint": {"every": 10},
    "engine": {"compile": "never"},
    "workers": [{"role": "learner", "cpus": 0.5}],
}


@pytest.fixture(scope="module")
def cluster(tmp_path_factory):
    with RayCluster(METADIST_RUNS=str(tmp_path_factory.mktemp("elsewhere"))) as cluster:
        yield cluster


@pytest.fixture
def home(tmp_path):
    """The user's folder: a config, a module that it names, a module that this one imports, and other files."""
    folder = tmp_path / "home"
    for name in ("runs", "data", ".git"):
        (folder / name).mkdir(parents=True)
        (folder / name / "large.bin").write_bytes(os.urandom(1 << 20))
    (folder / "lines.py").write_text(LINES)
    (folder / "beside.py").write_text(BESIDE)
    (folder / "lines.yaml").write_text(yaml.safe_dump(CONFIG))
    return folder


def metadist(cluster, home, *words, expect=0, **environment):
    done = subprocess.run(
        [BIN / "metadist", *words],
        cwd=home,
        env={**cluster.environment, "RAY_API_SERVER_ADDRESS": cluster.address, **environment},
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert "Traceback" not in done.stderr or expect, done.stderr
    assert done.returncode == expect, f"{words}: {done.returncode}\n{done.stdout}\n{done.stderr}"
    return done


def last_json(done):
    return json.loads(done.stdout.splitlines()[-1])


def unbroken(home, tmp_path, *overrides):
    """Return the hash of the parameters of the same run, computed in one process here."""
    words = [
        BIN / "metadist",
        "train",
        "lines.yaml",
        *overrides,
        "tracking.uri=none",
        "--workers",
        "0",
        "--run-dir",
        tmp_path / "here",
        "--json",
    ]
    done = subprocess.run(words, cwd=home, capture_output=True, text=True, timeout=300, check=True)
    return last_json(done)["params_sha256"]


def until(condition, seconds=180):
    deadline = time.monotonic() + seconds
    while not (found := condition()):
        assert time.monotonic() < deadline, "too late"
        time.sleep(0.2)
    return found


def test_a_killed_driver_goes_on_elsewhere_and_ends_the_same(cluster, home, tmp_path):
    runs = f"file://{tmp_path}/store"  # by URL: the driver keeps no local files
    longer = "outer.meta_steps=1200"  # a short run may end before the second submit is refused
    refused = metadist(cluster, home, "submit", "lines.yaml", "--run-dir", f"{runs}/a", expect=2)
    assert "lines.py imports 'beside': the job would not have" in refused.stderr
    assert "add --module beside" in refused.stderr
    own = ("--module", "beside")
    done = metadist(
        cluster,
        home,
        "submit",
        "lines.yaml",
        *own,
        longer,
        "--workers",
        "2",
        "--run-dir",
        f"{runs}/a",
        "--run-id",
        "lines-a",
        "--json",
    )
    first = last_json(done)
    assert first["job_id"] == "lines-a-1"
    assert first["job_url"] == f"{cluster.address}/#/jobs/lines-a-1"
    store = tmp_path / "store" / "a" / "checkpoints"
    until(lambda: store.is_dir() and len(list(store.iterdir())) > 2)
    again = metadist(cluster, home, "submit", "lines.yaml", longer, *own, "--run-id", "lines-a", expect=2)
    assert "run lines-a is running as job lines-a-1" in again.stderr
    until(lambda: cluster.driver("lines-a")).kill()
    until(lambda: "FAILED" in metadist(cluster, home, "jobs", "status", "lines-a-1").stdout)

    done = metadist(
        cluster,
        home,
        "submit",
        "lines.yaml",
        *own,
        longer,
        "--workers",
        "2",
        "--run-dir",
        f"{runs}/a",
        "--wait",
        "--json",
        "--driver-cpus",
        "0.5",
    )
    second = last_json(done)
    assert (second["run_id"], second["attempt"], second["status"]) == ("lines-a", 2, "SUCCEEDED")
    assert second["config_sha256"] == first["config_sha256"]
    assert "resumed at meta-step" in done.stderr
    result = json.loads((tmp_path / "store" / "a" / "result.json").read_text())
    assert (result["run_id"], result["meta_step"]) == ("lines-a", 1200)
    assert json.loads((tmp_path / "store" / "a" / "links.json").read_text())["ray_job"].endswith("/#/jobs/lines-a-2")
    assert result["params_sha256"] == unbroken(home, tmp_path, longer)

    listed = metadist(cluster, home, "jobs").stdout.splitlines()
    assert [line.split()[:2] for line in listed[:2]] == [["lines-a-2", "SUCCEEDED"], ["lines-a-1", "FAILED"]]
    about = last_json(metadist(cluster, home, "jobs", "status", "lines-a", "--json"))
    assert (about["job_id"], about["attempt"], about["run_dir"]) == ("lines-a-2", "2", f"{runs}/a")
    logs = metadist(cluster, home, "jobs", "logs", "-f", "lines-a-2").stdout
    assert logs == metadist(cluster, home, "jobs", "logs", "lines-a-2").stdout
    assert result["params_sha256"] in logs
    # The job's files: the config and the two modules, nothing else.
    packages = [p for p in Path(cluster.folder, "ray").rglob("working_dir_files/_ray_pkg_*") if p.is_dir()]
    assert packages and all(
        {f.name for f in p.rglob("*") if f.suffix != ".pyc" and f.is_file()} == {"config.yaml", "lines.py", "beside.py"}
        for p in packages
    )


def test_stopped_with_a_checkpoint(cluster, home, tmp_path):
    store = tmp_path / "stopped"
    done = metadist(
        cluster,
        home,
        "submit",
        "lines.yaml",
        "--module",
        "beside",
        "outer.meta_steps=100000",
        "checkpoint.every=50000",
        "--run-dir",
        str(store),
    )
    job_id = done.stdout.strip()
    until(lambda: "meta-step" in metadist(cluster, home, "jobs", "logs", job_id).stdout)
    stopped = metadist(cluster, home, "jobs", "stop", job_id)
    assert stopped.stdout.split() == [job_id, "STOPPED"]
    assert "--run-id" in stopped.stderr
    steps = [int(p.name.split("-")[-1]) for p in (store / "checkpoints").iterdir() if p.name.split("-")[-1].isdigit()]
    assert any(0 < step < 50000 for step in steps), list((store / "checkpoints").iterdir())
    over = metadist(cluster, home, "jobs", "stop", job_id, expect=2)
    assert over.stderr.strip() == f"error: job {job_id} has ended already (stopped)"


@pytest.mark.parametrize(
    ("token", "says"),
    [
        (None, "it needs a token; set RAY_AUTH_MODE=token and RAY_AUTH_TOKEN_PATH"),
        ("0" * 32, "it does not accept this token"),
    ],
)
def test_without_the_right_token(cluster, home, tmp_path, token, says):
    other = {"RAY_AUTH_TOKEN_PATH": "", "RAY_AUTH_MODE": "disabled", "HOME": str(tmp_path)}
    if token:
        (tmp_path / "token").write_text(token)
        other = {"RAY_AUTH_TOKEN_PATH": str(tmp_path / "token")}
    for words in (["submit", "lines.yaml", "--run-dir", str(tmp_path / "a")], ["jobs"], ["jobs", "logs", "-f"]):
        done = metadist(cluster, home, *words, expect=2, **other)
        assert says in done.stderr and len(done.stderr.strip().splitlines()) == 1, done.stderr


def test_a_users_mistake_fails_the_job_in_one_line(cluster, home, tmp_path):
    # submit does not load the data, so only the driver finds the mistake.
    done = metadist(
        cluster,
        home,
        "submit",
        "omniglot_maml_5w1s",
        "--run-dir",
        str(tmp_path / "b"),
        "--data",
        str(tmp_path / "nothing"),
        "--wait",
        expect=1,
    )
    assert "has no Omniglot" in done.stderr
    assert "--run-id omniglot-maml-5w1s-" in done.stderr.splitlines()[-1]


def test_nodes_without_metadist(home, tmp_path):
    bare = tmp_path / "bin"
    bare.mkdir()
    (bare / "ray").symlink_to(BIN / "ray")
    for tool in ("sh", "bash"):
        (bare / tool).symlink_to(shutil.which(tool))
    with RayCluster(path=f"{bare}{os.pathsep}/usr/bin{os.pathsep}/bin") as cluster:
        environment = {"PATH": f"{BIN}{os.pathsep}{os.environ['PATH']}"}
        done = metadist(
            cluster,
            home,
            "submit",
            "lines.yaml",
            "--module",
            "beside",
            "--run-dir",
            str(tmp_path / "c"),
            "--wait",
            expect=1,
            **environment,
        )
        assert "the cluster's nodes have no metadist" in done.stderr.splitlines()[-1], done.stderr
