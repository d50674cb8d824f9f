"""Tokens and passwords stay in the files and variables that hold them."""

from __future__ import annotations

import json
import logging
import os
import stat
from pathlib import Path
from typing import Any

import pytest
import tiny
import typer.main
import yaml
from outsiders import wait_for

from metadist.cli.app import app
from metadist.config.build import build
from metadist.core.errors import ConfigError
from metadist.core.text import without_passwords
from metadist.jobs import submit as jobs
from metadist.jobs.ray_jobs import JobRequest
from metadist.jobs.render import Rendering, render
from metadist.tracking.mlflow import MLflowTracker
from metadist.tracking.ui import ui_command
from metadist.training.observers import Observer

PASSWORD = "hunter2-of-the-store"
STORE = f"http://me:{PASSWORD}@127.0.0.1:9"


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str, str, int]:
    """(a run's directory, its token, its log, the mode of the token's file), with a store that has a password."""
    folder = tmp_path_factory.mktemp("secrets") / "run"
    seen: dict[str, Any] = {}

    class Look(Observer):
        def step(self, meta_step: int, report: Any, tasks_per_second: float) -> None:
            path = folder / "control.token"
            seen.update(token=path.read_text().strip(), mode=stat.S_IMODE(path.stat().st_mode))

        def note(self, message: str) -> None:
            lines.append(message)

    lines: list[str] = []
    handler = logging.Handler()
    handler.emit = lambda record: lines.append(record.getMessage())  # type: ignore[method-assign]
    root, level = logging.getLogger(), logging.getLogger().level
    root.addHandler(handler)
    root.setLevel(logging.DEBUG)
    mask = os.umask(0)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("MLFLOW_TRACKING_URI", STORE)
        finish = MLflowTracker.finish

        def finish_after_the_first_failure(self: MLflowTracker, status: str, timeout: float) -> int:
            wait_for(lambda: any(" fails: " in line for line in lines))
            return finish(self, status, 0.5)

        patch.setattr(MLflowTracker, "finish", finish_after_the_first_failure)
        try:
            tiny.train(tiny.experiment("tracking.uri=auto", "outer.meta_steps=2"), run_dir=str(folder), plots=False,
                       display=Look())  # fmt: skip
        finally:
            os.umask(mask)
            root.removeHandler(handler)
            root.setLevel(level)
    return folder, seen["token"], "\n".join(lines), seen["mode"]


def files_with(folder: Path, secret: str) -> list[str]:
    return [p.name for p in folder.rglob("*") if p.is_file() and secret.encode() in p.read_bytes()]


@pytest.mark.lane("services")
def test_only_the_user_reads_the_token_of_a_run(run: tuple[Path, str, str, int]) -> None:
    folder, token, _, mode = run
    assert mode == 0o600 and len(token) == 64
    assert files_with(folder, token) == ["control.token"]


@pytest.mark.lane("services")
def test_logs_and_records_for_mlflow_have_no_secret(run: tuple[Path, str, str, int]) -> None:
    folder, token, log, _ = run
    assert token not in log and PASSWORD not in log and "http://me:***@127.0.0.1:9 fails" in log
    assert files_with(folder, PASSWORD) == []
    assert (folder / "tracking/spool.jsonl").is_file() and json.loads((folder / "control.json").read_text())["address"]


def test_passwords_in_texts() -> None:
    assert without_passwords("a http://u:p@h/x, postgresql+psycopg2://u:p@q@h:1/d b") == (
        "a http://u:***@h/x, postgresql+psycopg2://u:***@h:1/d b"
    )
    plain = "http://h:80/a@b s3://bucket/x:y@z u:p@h"
    assert without_passwords(plain) == plain


def test_a_config_has_no_password() -> None:
    with pytest.raises(ConfigError, match=r"tracking\.uri: a password in a config would stand") as caught:
        build(tiny.document(f"tracking.uri={STORE}"))
    assert PASSWORD not in str(caught.value)


def test_no_option_takes_a_secret_on_the_command_line() -> None:
    """``ps`` shows all words of a command to every user: options name a file, a Secret or a variable."""
    commands = [typer.main.get_command(app)]
    while commands:
        command: Any = commands.pop()
        commands += getattr(command, "commands", {}).values()
        for parameter in command.params:
            if any(word in parameter.name for word in ("token", "password", "secret", "tls_key")):
                shown = f"{parameter.metavar} {getattr(parameter, 'help', '')}"
                assert "FILE" in shown or "a Secret" in shown, (command.name, parameter.name)


def test_the_servers_that_metadist_starts_get_no_secret_as_a_word(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("mlflow")
    store = f"postgresql://me:{PASSWORD}@127.0.0.1:9/mlflow"
    monkeypatch.setenv("MLFLOW_BACKEND_STORE_URI", "")
    assert PASSWORD not in " ".join(ui_command(store, 5000, tmp_path))
    assert os.environ["MLFLOW_BACKEND_STORE_URI"] == store
    with pytest.raises(ConfigError, match="is an MLflow server already") as caught:
        ui_command(STORE, 5000, tmp_path)
    assert PASSWORD not in str(caught.value)


class Cluster:
    """Stands for a Ray cluster's job API: it keeps the request, whose every field Ray shows."""

    address = "http://head:8265"

    def __init__(self) -> None:
        self.shown: list[str] = []

    def all(self) -> list[Any]:
        return []

    def submit(self, request: JobRequest) -> None:
        self.shown = [repr(request), *(p.read_text() for p in request.folder.rglob("*.yaml"))]


def test_a_jobs_description_has_no_secret(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "token").write_text("f" * 64)
    monkeypatch.setenv("MLFLOW_TRACKING_URI", STORE)
    monkeypatch.setenv("RAY_AUTH_TOKEN_PATH", str(tmp_path / "token"))
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", PASSWORD)
    cluster = Cluster()
    document = tiny.document(f"control.token_file={tmp_path}/token", "tracking.uri=auto")
    jobs.submit(cluster, document, jobs.Request(run_dir=str(tmp_path / "run")))  # type: ignore[arg-type]
    assert cluster.shown and not any(PASSWORD in text or "f" * 64 in text for text in cluster.shown)
    assert "MLFLOW_TRACKING_URI has a password" in caplog.text and PASSWORD not in caplog.text
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://127.0.0.1:9")
    jobs.submit(cluster, document, jobs.Request(run_dir=str(tmp_path / "run")))  # type: ignore[arg-type]
    assert "http://127.0.0.1:9" in cluster.shown[0]  # without a password it is sent, as before


def test_files_for_clusters_have_no_secret(tmp_path: Path) -> None:
    wanted = Rendering(run_dir="s3://b/r", image="r/metadist:1", mlflow=STORE)
    with pytest.raises(ConfigError, match="--mlflow: a password would stand in the files") as caught:
        render("slurm", yaml.safe_load(yaml.safe_dump(tiny.document("workers=[{max: 1}]"))), wanted, tmp_path)
    assert PASSWORD not in str(caught.value)


def test_the_location_of_a_run_has_no_password(tmp_path: Path) -> None:
    """It stands in tags of MLflow, in links and in the metadata of jobs."""
    place, expected = f"ftp://me:{PASSWORD}@127.0.0.1/r", r"run_dir 'ftp://me:\*\*\*@.*FSSPEC_FTP_PASSWORD"
    with pytest.raises(ConfigError, match=expected) as trained:
        tiny.train(tiny.experiment(), run_dir=place)
    with pytest.raises(ConfigError, match=expected):
        jobs.submit(Cluster(), tiny.document(), jobs.Request(run_dir=place))  # type: ignore[arg-type]
    wanted = Rendering(run_dir=place, image="r/metadist:1", mlflow="http://m")
    with pytest.raises(ConfigError, match=expected):
        render("slurm", yaml.safe_load(yaml.safe_dump(tiny.document("workers=[{max: 1}]"))), wanted, tmp_path)
    assert PASSWORD not in str(trained.value)
