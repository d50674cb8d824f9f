"""Serve the MLflow UI on the store of the runs."""

from __future__ import annotations

import os
import sys
from pathlib import Path

from metadist.core.errors import ConfigError
from metadist.core.text import without_passwords
from metadist.tracking.mlflow_uri import (
    artifact_location,
    prepare_environment,
    prepare_sqlite,
    require_mlflow,
    resolve_uri,
)


def ui_command(tracking_uri: str | None, port: int, runs_root: str | Path) -> list[str]:
    """Return the command that serves the UI on ``127.0.0.1:port``; create the SQLite file if it is missing.

    The URI of the store goes into the environment: it may hold a password, and every user sees the words of a command.
    """
    require_mlflow()
    uri = resolve_uri(tracking_uri, Path(runs_root))
    if uri.startswith("http"):
        raise ConfigError(f"{without_passwords(uri)} is an MLflow server already; open this address in a browser")
    prepare_environment()
    prepare_sqlite(uri, Path(runs_root))
    os.environ["MLFLOW_BACKEND_STORE_URI"] = uri
    root = artifact_location(uri, Path(runs_root))
    return [
        sys.executable,
        "-m",
        "mlflow",
        "server",
        "--host",
        "127.0.0.1",
        "--port",
        str(port),
        "--workers",
        "1",
        *(["--default-artifact-root", root] if root else []),
    ]


def serve_ui(tracking_uri: str | None, port: int, runs_root: str | Path) -> None:
    """Replace this process by the MLflow server, which answers after up to half a minute."""
    command = ui_command(tracking_uri, port, runs_root)
    # MLflow's job runner starts more processes than the server itself.
    os.environ["MLFLOW_SERVER_ENABLE_JOB_EXECUTION"] = "false"
    os.execv(command[0], command)
