"""cluster/local.sh: a cluster on this machine, and a run on it."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from pathlib import Path

import psutil
import pytest
from ports import free_port

BIN = Path(sys.executable).parent
SHORT = [
    "outer.meta_steps=6",
    "evaluate.every=3",
    "evaluate.tasks=8",
    "evaluate.test_tasks=8",
    "checkpoint.every=3",
    "engine.compile=never",
    "tracking.uri=none",
]


@pytest.mark.long
def test_a_run_on_this_machine(root, tmp_path):
    temporary = tempfile.mkdtemp(prefix="md-local-", dir="/tmp")
    kept = {k: v for k, v in os.environ.items() if not k.startswith("RAY_")}
    port = free_port()
    # A home of its own: the script makes a token there.
    environment = {
        **kept,
        "PATH": f"{BIN}:{os.environ['PATH']}",
        "HOME": str(tmp_path),
        "PORT": str(free_port()),
        "DASHBOARD_PORT": str(port),
        "CPUS": "2",
        "GPUS": "0",
        "RAY_TEMP": f"{temporary}/r",
        "OMP_NUM_THREADS": "1",
    }
    with open(tmp_path / "log", "w") as log:
        cluster = subprocess.Popen(
            ["bash", root / "cluster" / "local.sh"], env=environment, stdout=log, stderr=log, start_new_session=True
        )
    try:
        deadline = time.monotonic() + 120
        while True:
            assert cluster.poll() is None and time.monotonic() < deadline, (tmp_path / "log").read_text()
            try:
                urllib.request.urlopen(f"http://127.0.0.1:{port}/api/version", timeout=5)
            except urllib.error.HTTPError as error:
                refused = error.code
                break
            except OSError:
                time.sleep(0.5)
        assert refused == 401  # it asks for the token
        token = tmp_path / ".ray" / "auth_token"
        assert token.stat().st_mode & 0o077 == 0
        words = [
            "submit",
            "sinusoid_maml",
            *SHORT,
            "--workers",
            "2",
            "--address",
            f"http://127.0.0.1:{port}",
            "--run-dir",
            str(tmp_path / "a"),
            "--wait",
        ]
        done = subprocess.run(
            [BIN / "metadist", *words],
            env={**environment, "RAY_AUTH_MODE": "token"},
            capture_output=True,
            text=True,
            timeout=300,
        )
        assert done.returncode == 0, done.stderr
        assert json.loads((tmp_path / "a" / "result.json").read_text())["meta_step"] == 6
    finally:
        processes = (
            [psutil.Process(cluster.pid), *psutil.Process(cluster.pid).children(recursive=True)]
            if cluster.poll() is None
            else []
        )
        cluster.send_signal(signal.SIGTERM)
        for process in psutil.wait_procs(processes, timeout=20)[1]:
            process.kill()
        shutil.rmtree(temporary, ignore_errors=True)
