"""A rendered Slurm script as a job of two nodes: a stub of srun runs the commands here; Ray and the run are real."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import psutil
import pytest
from ports import free_port

from metadist.jobs.render import Rendering, render

pytestmark = [pytest.mark.long, pytest.mark.timeout(900)]

BIN = Path(sys.executable).parent
SRUN = """#!/usr/bin/env bash
# srun OPTION… COMMAND…: the command, here, as the node that was asked for
while [ "${1#--}" != "$1" ]; do
    case "$1" in --nodelist=*) node="${1#*=}" ;; esac
    shift
done
echo "${node:?} $*" >>"$CALLS"
exec "$@"
"""
SCONTROL = """#!/usr/bin/env bash
echo "scontrol $*" >>"$CALLS"
if [ "$1 $2" = "show hostnames" ]; then printf 'one\\ntwo\\n'; fi
"""
HOSTNAME = "#!/usr/bin/env bash\necho 127.0.0.1\n"
CONFIG = {
    "name": "slurm",
    "tasks": {"name": "sinusoid"},
    "model": {"name": "mlp", "hidden": [8]},
    "algorithm": {"name": "maml"},
    "outer": {"meta_steps": 4000, "meta_batch_size": 4, "shard_size": 2},
    "evaluate": {"every": 1000, "tasks": 8, "test_tasks": 8},
    "checkpoint": {"every": 1000},
    "engine": {"compile": "never"},
    "tracking": {"uri": "none"},
    "workers": [{"min": 2, "max": 2, "cpus": 1, "gpus": 0}],
}


@pytest.fixture
def allocation(tmp_path):
    """The environment of a batch job on two nodes, with stubs of Slurm's commands first on the path."""
    stubs = tmp_path / "stubs"
    stubs.mkdir()
    for name, text in (("srun", SRUN), ("scontrol", SCONTROL), ("hostname", HOSTNAME)):
        (stubs / name).write_text(text)
        (stubs / name).chmod(0o755)
    files, _ = render("slurm", CONFIG, Rendering(str(tmp_path / "run"), "a"), tmp_path)
    for name, text in files.items():
        (tmp_path / name).write_text(text)
    short = tempfile.mkdtemp(prefix="md-slurm-", dir="/tmp")
    kept = {k: v for k, v in os.environ.items() if not k.startswith(("RAY_", "SLURM_", "MLFLOW_"))}
    yield {
        **kept,
        "PATH": f"{stubs}:{BIN}:{os.environ['PATH']}",
        "CALLS": str(tmp_path / "calls"),
        "SLURM_JOB_ID": "7",
        "SLURM_JOB_NODELIST": "node[1-2]",
        "SLURM_CPUS_PER_TASK": "2",
        "SLURM_GPUS_ON_NODE": "0",
        "STATE": str(tmp_path / "state"),
        "PORT": str(free_port()),
        "RAY_TEMP": f"{short}/r",
    }
    subprocess.run(["rm", "-rf", short], check=True)


def start(folder, environment, log):
    command = ["bash", folder / "job.sh"]
    return subprocess.Popen(command, env=environment, stdout=log, stderr=subprocess.STDOUT, start_new_session=True)


def end(job):
    """Kill the processes that a job has left."""
    processes = (
        [psutil.Process(job.pid), *psutil.Process(job.pid).children(recursive=True)] if job.poll() is None else []
    )
    for process in processes:
        process.kill()


def test_a_job_near_its_limit_is_queued_again_and_resumes(allocation, tmp_path):
    with open(tmp_path / "log", "w") as log:
        job = start(tmp_path, allocation, log)
        try:
            deadline = time.monotonic() + 300
            while not (tmp_path / "run" / "checkpoints").is_dir() or "meta-step" not in (tmp_path / "log").read_text():
                assert job.poll() is None and time.monotonic() < deadline, (tmp_path / "log").read_text()
                time.sleep(0.2)
            job.send_signal(signal.SIGUSR1)  # what --signal=B:USR1@300 does
            assert job.wait(120) == 130, (tmp_path / "log").read_text()
        finally:
            end(job)
        calls = (tmp_path / "calls").read_text()
        assert "scontrol requeue 7" in calls
        assert not (tmp_path / "state").exists(), "the token stayed"
        first = json.loads((tmp_path / "run" / "result.json").read_text())
        assert first["stopped"] == "interrupted" and first["meta_step"] < 4000
        job = start(tmp_path, allocation, log)
        try:
            assert job.wait(400) == 0, (tmp_path / "log").read_text()
        finally:
            end(job)
    assert "resumed at meta-step" in (tmp_path / "log").read_text()
    assert (tmp_path / "calls").read_text().count("requeue") == 1
    started = [line for line in (tmp_path / "calls").read_text().splitlines() if "ray start" in line]
    assert [line.split()[0] for line in started] == ["one", "two"] * 2
    result = json.loads((tmp_path / "run" / "result.json").read_text())
    words = [
        BIN / "metadist",
        "train",
        tmp_path / "config.yaml",
        "--workers",
        "0",
        "--run-dir",
        tmp_path / "here",
        "--json",
    ]
    here = subprocess.run(words, capture_output=True, text=True, timeout=300, check=True)
    assert result["params_sha256"] == json.loads(here.stdout.splitlines()[-1])["params_sha256"]
