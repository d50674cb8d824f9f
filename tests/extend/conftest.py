from __future__ import annotations

import importlib
import signal
import sys

import installed
import pytest
import tiny
from typer.testing import CliRunner


@pytest.fixture
def site(tmp_path, monkeypatch):
    """``site(project, points, **modules)``: installs a package that this process can import, until the test ends."""
    before = set(sys.modules)
    folder = tmp_path / "site"
    folder.mkdir()
    monkeypatch.syspath_prepend(str(folder))
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    monkeypatch.setenv("METADIST_RUNS", str(tmp_path / "runs"))
    monkeypatch.chdir(tmp_path)

    def install(project, points, **modules):
        installed.install(folder, project, points, **modules)
        importlib.invalidate_caches()

    yield install
    for name in set(sys.modules) - before:
        if str(getattr(sys.modules[name], "__file__", "")).startswith(str(folder)):
            del sys.modules[name]


@pytest.fixture
def plugins(site):
    """A package with plug-ins of every kind."""
    site("metadist-good", installed.entry_points("good_plugins", installed.ALL), good_plugins=installed.GOOD)


@pytest.fixture
def cli():
    """``cli(*arguments)``: the command line in this process."""
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
