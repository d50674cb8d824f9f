"""Resolve and prepare MLflow stores."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from filelock import FileLock

from metadist.core.errors import ConfigError
from metadist.rpc.proxies import bypass_proxies
from metadist.tracking.sqlite_schema import upgrade_sqlite

REQUEST_SECONDS = 10


_INITIALISE = """
import sys
from mlflow.store.tracking.sqlalchemy_store import SqlAlchemyStore
SqlAlchemyStore(sys.argv[1], sys.argv[2]).engine.dispose()
"""


def resolve_uri(uri: str | None, runs_root: Path) -> str:
    """Return ``uri``; for ``auto`` the value of ``MLFLOW_TRACKING_URI``, or a SQLite file under ``runs_root``."""
    if uri and uri != "auto":
        return uri
    return os.environ.get("MLFLOW_TRACKING_URI") or f"sqlite:///{Path(runs_root).resolve()}/mlflow.db"


def client_of(store: str) -> Any:
    """Return an MLflow client of ``store`` and its registry: ``MLFLOW_REGISTRY_URI``, or the store itself.

    MLflow's own default is the registry that any code in this process set last: models would go to another store.
    """
    from mlflow.tracking import MlflowClient

    return MlflowClient(tracking_uri=store, registry_uri=os.environ.get("MLFLOW_REGISTRY_URI") or store)


def require_mlflow() -> None:
    """Raise ConfigError where MLflow is not installed."""
    if importlib.util.find_spec("mlflow") is None:
        raise ConfigError(
            "tracking needs MLflow, which isn't installed: `pip install mlflow`, or switch tracking off with "
            "tracking.uri=none"
        )


def prepare_environment() -> None:
    """Set short timeouts and switch MLflow's own retries off; its defaults block a call for minutes.

    Variables that the user has set keep their values.
    """
    bypass_proxies()
    for name, value in (
        ("MLFLOW_HTTP_REQUEST_TIMEOUT", str(REQUEST_SECONDS)),
        ("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0"),
        ("MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT", "true"),  # stdout is for results
        ("MLFLOW_DISABLE_TELEMETRY", "true"),
    ):
        os.environ.setdefault(name, value)


def sqlite_path(uri: str) -> Path | None:
    """Return the file of a ``sqlite:///`` URI; None for other stores and for an in-memory database."""
    if not urlsplit(uri).scheme.startswith("sqlite"):
        return None
    path = uri.partition("://")[2].partition("?")[0][1:]
    return Path(path).absolute() if path and path != ":memory:" else None


def artifact_location(uri: str, runs_root: Path) -> str | None:
    """Return the URI of the artifacts of a new experiment; None leaves the choice to MLflow.

    MLflow's default for a database is a folder in the *current directory*.
    """
    if urlsplit(uri).scheme.partition("+")[0] not in ("sqlite", "postgresql", "mysql", "mssql"):
        return None
    return (Path(runs_root).resolve() / "mlartifacts").as_uri()


def prepare_sqlite(uri: str, runs_root: Path) -> None:
    """Create the SQLite file if it is missing, completely or not at all; upgrade that of an older MLflow.

    MLflow needs seconds of migrations to create the file. Two processes that create it simultaneously crash, and a
    process that is killed meanwhile leaves a file that never opens again. Therefore a subprocess creates the file under
    a lock and a temporary name; the driver does not import the migrations.
    """
    path = sqlite_path(uri)
    if path is None:
        return
    if path.exists():
        upgrade_sqlite(path)
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(f"{path}.lock", timeout=60):
        if path.exists():
            return
        for stale in path.parent.glob(f"{path.name}.new-*"):
            stale.unlink(missing_ok=True)
        new = path.with_name(f"{path.name}.new-{os.getpid()}")
        root = artifact_location(uri, runs_root) or ""
        done = subprocess.run(
            [sys.executable, "-c", _INITIALISE, f"sqlite:///{new}", root],
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            start_new_session=True,  # Ctrl-C reaches only the driver
        )
        if done.returncode:
            raise OSError(f"can't create {path}: {done.stderr.strip().splitlines()[-1:]}")
        os.replace(new, path)
