"""The compose file's services without containers: each command with its environment, on this machine, on free ports.

The services are real: PostgreSQL, MLflow's server on it, a Ray head and a worker with a token, and a submitted job.
"""

from __future__ import annotations

import json
import os
import re
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
import pytest
import yaml
from ports import free_port

pytestmark = [pytest.mark.long, pytest.mark.timeout(1200)]

BIN = Path(sys.executable).parent
SHORT = [
    "outer.meta_steps=30",
    "evaluate.every=10",
    "evaluate.tasks=8",
    "evaluate.test_tasks=8",
    "checkpoint.every=10",
    "tracking.log_every=1",
    "engine.compile=never",
    "workers.0.cpus=0.5",
    "workers.0.gpus=0",
]


def as_postgres(command):
    """PostgreSQL refuses to run as root."""
    return (
        ["setpriv", "--reuid=postgres", "--regid=postgres", "--clear-groups", *command] if os.getuid() == 0 else command
    )


class Services:
    """The services of a compose file as processes of this machine."""

    def __init__(self, compose: dict, folder: Path) -> None:
        self.services, self.folder = compose["services"], folder
        self.secrets = {
            "POSTGRES_PASSWORD": secrets.token_hex(8),
            "RAY_AUTH_TOKEN": secrets.token_hex(16),
            "CONFIG": "sinusoid_maml",
            "WORKER_CPUS": "2",
        }
        self.ports = {name: str(free_port()) for name in ("5432", "5000", "6379", "8265")}
        self.started: list[subprocess.Popen] = []

    def filled(self, text: str) -> str:
        """Expand variables as compose does, then replace the containers' folders and ports by this machine's."""
        text = re.sub(r"\$\{(\w+)(?::([-?+])([^}]*))?\}", self._variable, str(text))
        text = (
            re.sub(r"(?<=[@/=])(database|mlflow|head)(?=:\d{4}\b)", "127.0.0.1", text)
            .replace("localhost:6379", "127.0.0.1:6379")
            .replace("mlflow:5000", "127.0.0.1:5000")
        )
        for port, free in self.ports.items():
            text = re.sub(rf"(?<=[:=]){port}\b|^{port}$", free, text)
        return re.sub(r"^/(runs|cache|artifacts)", rf"{self.folder}/\1", text)

    def _variable(self, found: re.Match) -> str:
        name, kind, other = found.groups()
        value = self.secrets.get(name, "")
        return {"-": value or other, "?": value, "+": other if value else "", None: value}[kind]

    def environment(self, name: str) -> dict[str, str]:
        kept = {k: v for k, v in os.environ.items() if not k.startswith(("RAY_", "MLFLOW_", "METADIST_"))}
        own = {k: self.filled(v) for k, v in self.services[name].get("environment", {}).items()}
        return {**kept, "PATH": f"{BIN}:{os.environ['PATH']}", **own}

    def command(self, name: str) -> list[str]:
        return [self.filled(word) for word in self.services[name]["command"]]

    def start(self, name: str, command: list[str] | None = None, *more: str) -> None:
        with open(self.folder / f"{name}.log", "w") as log:
            words = [*(command or self.command(name)), *more]
            self.started.append(
                subprocess.Popen(
                    words, env=self.environment(name), stdout=log, stderr=log, cwd=self.folder, start_new_session=True
                )
            )

    def healthy(self, name: str, there, seconds: float = 180) -> None:
        deadline = time.monotonic() + seconds
        while not there():
            log = (self.folder / f"{name}.log").read_text()[-3000:]
            assert self.started[-1].poll() is None and time.monotonic() < deadline, f"{name}: {log}"
            time.sleep(0.5)

    def close(self) -> None:
        left = []
        for process in reversed(self.started):
            if process.poll() is None:
                left += [psutil.Process(process.pid), *psutil.Process(process.pid).children(recursive=True)]
                process.send_signal(signal.SIGINT if process is self.started[0] else signal.SIGTERM)
                try:
                    process.wait(30)
                except subprocess.TimeoutExpired:
                    process.kill()
        for process in psutil.wait_procs(left, timeout=5)[1]:
            process.kill()


@pytest.fixture(scope="module")
def services(root):
    if not (shutil.which("initdb") and shutil.which("postgres")):
        pytest.skip("needs PostgreSQL's initdb and postgres on the path (Debian: postgresql)")
    folder = Path(tempfile.mkdtemp(prefix="md-compose-", dir="/tmp"))
    folder.chmod(0o755)
    running = Services(yaml.safe_load((root / "deploy" / "compose.yaml").read_text()), folder)
    try:
        yield running
    finally:
        running.close()
        shutil.rmtree(folder, ignore_errors=True)


def test_a_job_is_recorded_in_mlflow_on_postgresql(services):
    folder = services.folder
    for name in ("runs", "cache", "artifacts", "database"):
        (folder / name).mkdir()
    # database: what the image's entrypoint does with these variables
    settings, port = services.environment("database"), services.ports["5432"]
    (folder / "password").write_text(settings["POSTGRES_PASSWORD"])
    if os.getuid() == 0:
        shutil.chown(folder / "database", "postgres")
        shutil.chown(folder / "password", "postgres")
    cluster = str(folder / "database")
    initdb = [
        "initdb",
        "--auth=scram-sha-256",
        f"--username={settings['POSTGRES_USER']}",
        f"--pwfile={folder}/password",
        "--pgdata",
        cluster,
    ]
    subprocess.run(as_postgres(initdb), check=True, capture_output=True)
    services.start("database", as_postgres(["postgres", "-D", cluster, "-p", port, "-h", "127.0.0.1", "-k", cluster]))
    ready = services.services["database"]["healthcheck"]["test"][1:]
    services.healthy(
        "database",
        lambda: subprocess.run([*ready, "--host=127.0.0.1", f"--port={port}"], capture_output=True).returncode == 0,
    )
    sql = {
        **os.environ,
        "PGPASSWORD": settings["POSTGRES_PASSWORD"],
        "PGHOST": "127.0.0.1",
        "PGPORT": port,
        "PGUSER": settings["POSTGRES_USER"],
    }
    subprocess.run(["createdb", settings["POSTGRES_DB"]], env=sql, check=True)

    services.start("mlflow")
    health = [
        services.filled(re.sub(r"localhost:5000", "127.0.0.1:5000", word))
        for word in services.services["mlflow"]["healthcheck"]["test"][1:]
    ]
    services.healthy(
        "mlflow", lambda: subprocess.run([BIN / health[0], *health[1:]], capture_output=True).returncode == 0
    )

    services.start(
        "head",
        None,
        f"--dashboard-port={services.ports['8265']}",
        f"--temp-dir={folder}/ray",
        "--node-ip-address=127.0.0.1",
    )
    check = [services.filled(word) for word in services.services["head"]["healthcheck"]["test"][1:]]
    services.healthy(
        "head", lambda: subprocess.run(check, env=services.environment("head"), capture_output=True).returncode == 0
    )
    services.start("worker", None, "--node-ip-address=127.0.0.1", f"--dashboard-agent-listen-port={free_port()}")
    services.healthy("head", lambda: _jobs_api(services))

    job = services.command("job")
    done = subprocess.run(
        [*job[:3], *SHORT, *job[3:]],
        env=services.environment("job"),
        capture_output=True,
        text=True,
        timeout=400,
        cwd=folder,
    )
    assert done.returncode == 0, done.stderr
    result = json.loads((folder / "runs" / "first" / "result.json").read_text())
    assert result["meta_step"] == 30 and result["undelivered"] == 0
    links = json.loads((folder / "runs" / "first" / "links.json").read_text())
    assert links["mlflow"].startswith(f"http://127.0.0.1:{services.ports['5000']}/#/experiments/")
    assert links["ray_job"].startswith(f"http://127.0.0.1:{services.ports['8265']}/#/jobs/sinusoid-maml-")

    def count(query: str) -> int:
        asked = subprocess.run(
            ["psql", settings["POSTGRES_DB"], "-tAc", query], env=sql, capture_output=True, text=True, check=True
        )
        return int(asked.stdout)

    assert count("select count(*) from runs where status = 'FINISHED'") == 1
    assert (
        count("select count(distinct step) from metrics where key = 'meta/loss'") >= 30
        or count("select count(*) from metrics") > 100
    )
    assert count("select count(*) from tags where key = 'ray.job_url'") == 1
    assert count("select count(*) from tags where key = 'mlflow.note.content'") == 1
    stored = [p.name for p in (folder / "artifacts").rglob("*") if p.is_file()]
    assert "model.safetensors" in stored and "config.yaml" in stored


def _jobs_api(services) -> bool:
    url = f"http://127.0.0.1:{services.ports['8265']}/nodes?view=summary"
    request = urllib.request.Request(url, headers={"Authorization": f"Bearer {services.secrets['RAY_AUTH_TOKEN']}"})
    try:
        with urllib.request.urlopen(request, timeout=10) as response:
            return response.read().decode().count('"state": "ALIVE"') == 2
    except OSError:
        return False
