"""A real Ray cluster on this machine: a head without CPUs and a worker node, token authentication on, ended by pid."""

from __future__ import annotations

import os
import secrets
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import urllib.request
from pathlib import Path

import psutil
from ports import free_port

BIN = Path(sys.executable).parent


class RayCluster:
    """``with RayCluster() as cluster``: ``address`` is the dashboard's; ``environment`` has the token in it."""

    def __init__(self, cpus: int = 2, path: str | None = None, **environment: str) -> None:
        # Unix sockets have short names: not below pytest's folders.
        self.folder = Path(tempfile.mkdtemp(prefix="md-ray-", dir="/tmp"))
        token = self.folder / "token"
        token.write_text(secrets.token_hex(16))
        self.port, self.dashboard = free_port(), free_port()
        self.address = f"http://127.0.0.1:{self.dashboard}"
        kept = {k: v for k, v in os.environ.items() if not k.startswith(("RAY_", "MLFLOW_"))}
        self.environment = {
            **kept,
            "PATH": path or f"{BIN}{os.pathsep}{os.environ['PATH']}",
            "RAY_AUTH_MODE": "token",
            "RAY_AUTH_TOKEN_PATH": str(token),
            "OMP_NUM_THREADS": "1",
            "RAY_USAGE_STATS_ENABLED": "0",
            **environment,
        }
        self._cpus, self._nodes = cpus, list[subprocess.Popen]()

    def __enter__(self) -> RayCluster:
        try:
            self._start(
                "--head",
                f"--port={self.port}",
                "--num-cpus=0",
                "--dashboard-host=127.0.0.1",
                f"--dashboard-port={self.dashboard}",
                f"--temp-dir={self.folder}/ray",
            )
            self._await(self._answers, "its dashboard")
            self._start(f"--address=127.0.0.1:{self.port}", f"--num-cpus={self._cpus}")
            self._await(lambda: self._alive() == 2, "its worker node")
        except BaseException:
            self.close()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _start(self, *options: str) -> None:
        with open(self.folder / f"node-{len(self._nodes)}.log", "w") as log:
            command = [
                str(BIN / "ray"),
                "start",
                "--block",
                "--node-ip-address=127.0.0.1",
                "--object-store-memory=200000000",
                "--disable-usage-stats",
                f"--dashboard-agent-listen-port={free_port()}",
                f"--metrics-export-port={free_port()}",
                *options,
            ]
            self._nodes.append(
                subprocess.Popen(
                    command, env=self.environment, stdout=log, stderr=log, start_new_session=True, cwd=self.folder
                )
            )

    def _get(self, path: str) -> str:
        token = (self.folder / "token").read_text()
        request = urllib.request.Request(self.address + path, headers={"Authorization": f"Bearer {token}"})
        with urllib.request.urlopen(request, timeout=10) as response:
            return response.read().decode()

    def _answers(self) -> bool:
        try:
            return "ray_version" in self._get("/api/version") and self._get("/api/jobs/") == "[]"
        except OSError:
            return False

    def _alive(self) -> int:
        try:
            return self._get("/nodes?view=summary").count('"state": "ALIVE"')
        except OSError:
            return 0

    def _await(self, there: object, what: str, seconds: float = 120.0) -> None:
        deadline = time.monotonic() + seconds
        while not there():
            dead = [i for i, node in enumerate(self._nodes) if node.poll() is not None]
            if dead or time.monotonic() > deadline:
                logs = "\n".join((self.folder / f"node-{i}.log").read_text()[-2000:] for i in range(len(self._nodes)))
                raise RuntimeError(f"the cluster has not got {what}\n{logs}")
            time.sleep(0.5)

    def driver(self, run_id: str) -> psutil.Process | None:
        """The process of ``metadist train`` in this cluster that drives a run."""
        for node in self._nodes:
            for process in psutil.Process(node.pid).children(recursive=True):
                try:
                    words = process.cmdline()
                except psutil.Error:
                    continue
                if run_id in words and "train" in words:
                    return process
        return None

    def close(self) -> None:
        """Every process that descends from ours, by its pid."""
        processes = []
        for node in self._nodes:
            try:
                processes += [psutil.Process(node.pid), *psutil.Process(node.pid).children(recursive=True)]
            except psutil.NoSuchProcess:
                pass
        for node in reversed(self._nodes):
            if node.poll() is None:
                node.send_signal(signal.SIGTERM)
                try:
                    node.wait(20)
                except subprocess.TimeoutExpired:
                    node.kill()
        _, left = psutil.wait_procs(processes, timeout=5)
        for process in left:
            process.kill()
        shutil.rmtree(self.folder, ignore_errors=True)
