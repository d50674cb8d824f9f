"""The MLflow UI on a run's store."""

from __future__ import annotations

import os
import sys
from pathlib import Path

from metadist.core.errors import ConfigError
from metadist.tracking.mlflow_uri import (
    artifact_location,
    prepare_environment,
    prepare_sqlite,
    require_mlflow,
    resolve_uri,
)


def ui_command(tracking_uri: str | None, port: int, runs_root: str | Path) -> list[str]:
    """The command that serves the UI on ``127.0.0.1:port``; creates the SQLite file if there is none yet."""
    require_mlflow()
    uri = resolve_uri(tracking_uri, Path(runs_root))
    if uri.startswith("http"):
        raise ConfigError(f"{uri} is an MLflow server already: open it in a browser")
    prepare_environment()
    prepare_sqlite(uri, Path(runs_root))
    root = artifact_location(uri, Path(runs_root))
    return [
        sys.executable,
        "-m",
        "mlflow",
        "server",
        "--backend-store-uri",
        uri,
        "--host",
        "127.0.0.1",
        "--port",
        str(port),
        "--workers",
        "1",
        *(["--default-artifact-root", root] if root else []),
    ]


def serve_ui(tracking_uri: str | None, port: int, runs_root: str | Path) -> None:
    """Replaces this process by the MLflow server; it takes up to half a minute to answer."""
    command = ui_command(tracking_uri, port, runs_root)
    os.environ["MLFLOW_SERVER_ENABLE_JOB_EXECUTION"] = (
        "false"  # its job runner starts more processes than the server itself
    )
    os.execv(command[0], command)
