from __future__ import annotations

import signal

import pytest
import tiny
from typer.testing import CliRunner


@pytest.fixture
def cli(tmp_path, monkeypatch):
    """``cli(*arguments)``: the command line in this process, in an empty working directory with nothing of the
    machine's settings.
    """
    for name in ("METADIST_DATA", "MLFLOW_TRACKING_URI", "RAY_ADDRESS"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("METADIST_RUNS", str(tmp_path / "runs"))
    monkeypatch.setenv("METADIST_CACHE", str(tmp_path / "cache"))
    monkeypatch.chdir(tmp_path)
    handlers = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}

    def run(*arguments):
        from metadist.cli.app import app

        return CliRunner().invoke(app, [str(a) for a in arguments], prog_name="metadist")

    yield run
    for number, handler in handlers.items():
        signal.signal(number, handler)


@pytest.fixture
def config(tmp_path):
    """``config(*overrides)``: the path of a config that trains in a second."""
    return lambda *overrides: tiny.write(tmp_path, *overrides)
