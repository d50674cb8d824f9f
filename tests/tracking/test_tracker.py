from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from metadist.core.errors import ConfigError
from metadist.core.text import without_passwords
from metadist.tracking import MLflowTracker, NullTracker, make_tracker, mean_sd
from metadist.tracking.mlflow_uri import artifact_location, resolve_uri, sqlite_path
from metadist.tracking.ui import ui_command


@pytest.mark.lane("services")
def test_importing_tracking_imports_neither_mlflow_nor_matplotlib():
    check = "import sys, metadist.tracking, metadist.tracking.ui, metadist.tracking.plots\n"
    check += "sys.exit(bool({'mlflow', 'matplotlib', 'torch'} & set(sys.modules)))"
    assert subprocess.run([sys.executable, "-c", check]).returncode == 0


def test_without_mlflow_the_error_says_what_to_do(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "mlflow", None)
    assert isinstance(make_tracker("none", spool=tmp_path, experiment="e", runs_root=tmp_path), NullTracker)
    with pytest.raises(ConfigError, match=r"pip install mlflow.*tracking\.uri=none"):
        make_tracker("auto", spool=tmp_path, experiment="e", runs_root=tmp_path)


@pytest.mark.lane("services")  # imports MLflow, which opens a socket
def test_where_a_run_goes(tmp_path, monkeypatch):
    pytest.importorskip("mlflow")

    def uri(given: str | None) -> str:
        tracker = make_tracker(given, spool=tmp_path, experiment="e", runs_root=tmp_path)
        assert isinstance(tracker, MLflowTracker)
        return tracker.tracking_uri

    assert uri(None) == uri("auto") == f"sqlite:///{tmp_path}/mlflow.db"
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://elsewhere:5000")
    assert uri("auto") == "http://elsewhere:5000"
    assert uri("http://here:5000") == "http://here:5000"
    with pytest.raises(ConfigError, match="names no file"):
        uri("sqlite://")
    with pytest.raises(ConfigError, match="open this address in a browser"):
        ui_command("auto", 5000, tmp_path)


def test_uris(tmp_path):
    assert sqlite_path("sqlite:////a/b.db?x=1") == Path("/a/b.db")
    assert sqlite_path("sqlite:///b.db") == Path.cwd() / "b.db"
    assert sqlite_path("sqlite://") is None
    assert sqlite_path("http://a") is None
    assert without_passwords("http://me:secret@host:1/x") == "http://me:***@host:1/x"
    assert artifact_location("postgresql+psycopg2://db/x", tmp_path) == f"file://{tmp_path}/mlartifacts"
    assert artifact_location("https://host", tmp_path) is None
    assert resolve_uri("file:./mlruns", tmp_path) == "file:./mlruns"


def test_quotes_in_a_run_id_are_refused(tmp_path):
    tracker = MLflowTracker(tmp_path, tracking_uri="http://127.0.0.1:9", experiment="e", runs_root=tmp_path)
    with pytest.raises(ConfigError, match="quotes"):
        tracker.start(run_id="it's", name="x", params={}, tags={})


def test_mean_and_sd_over_seeds():
    summary = mean_sd([{"acc": 0.5, "only": 1.0}, {"acc": 1.0}, {"acc": float("nan")}])
    assert summary["only/mean"] == 1.0
    assert "only/sd" not in summary
    assert summary["acc/mean"] != summary["acc/mean"]
    assert mean_sd([{"acc": 1.0}, {"acc": 3.0}]) == {"acc/mean": 2.0, "acc/sd": pytest.approx(2**0.5)}
