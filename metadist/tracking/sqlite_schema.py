"""Upgrade the SQLite store of an older MLflow, after a backup."""

from __future__ import annotations

import contextlib
import importlib.util
import logging
import re
import sqlite3
import subprocess
import sys
from pathlib import Path

from filelock import FileLock

from metadist.core.errors import ConfigError

logger = logging.getLogger(__name__)

_REVISION = re.compile(r"^(down_revision|revision)\s*(?::[^=]*)?=\s*(.+)$", re.MULTILINE)


def upgrade_sqlite(path: Path) -> None:
    """Bring the schema of the file to that of the installed MLflow, and note it; do nothing where they are equal.

    The file is copied to ``PATH.backup-SCHEMA`` first. A subprocess upgrades it: Ctrl-C does not stop it.
    Raises ConfigError where a newer MLflow wrote the file, and OSError where the upgrade fails.
    """
    there = schema_of(path)
    known = _known_schemas()
    if there is None or there not in known:
        if there is not None and known:
            raise ConfigError(
                f"{path} was written by a newer MLflow (schema {there}); update MLflow here: pip install -U mlflow"
            )
        return
    if known[there]:  # no later revision builds on it
        return
    with FileLock(f"{path}.lock", timeout=600):
        if schema_of(path) != there:  # another process was faster
            return
        backup = path.with_name(f"{path.name}.backup-{there}")
        with contextlib.closing(sqlite3.connect(path)) as source, contextlib.closing(sqlite3.connect(backup)) as target:
            source.backup(target)
        command = [sys.executable, "-m", "mlflow", "db", "upgrade", f"sqlite:///{path}"]
        done = subprocess.run(
            command, stdin=subprocess.DEVNULL, capture_output=True, text=True, start_new_session=True, timeout=600
        )
    if done.returncode:
        why = " ".join((done.stderr.strip().splitlines() or [""])[-1].split())[:300]
        raise OSError(
            f"{path} has the schema of an older MLflow, and the upgrade failed ({why}); the backup is {backup}; try: "
            f"mlflow db upgrade sqlite:///{path}"
        )
    logger.warning("%s had the schema of an older MLflow and is upgraded; the old file is %s", path, backup)


def schema_of(path: Path) -> str | None:
    """Return the schema's revision in the file; None for a file that is no store of MLflow."""
    try:
        with contextlib.closing(sqlite3.connect(f"file:{path}?mode=ro", uri=True, timeout=10)) as connection:
            row = connection.execute("SELECT version_num FROM alembic_version").fetchone()
    except sqlite3.Error:
        return None
    return None if row is None else str(row[0])


def _known_schemas() -> dict[str, bool]:
    """Return the revisions of the installed MLflow, and whether each is the newest one.

    The revisions are read from the migration scripts, because importing the migrations takes seconds.
    """
    found = importlib.util.find_spec("mlflow")
    if found is None or found.origin is None:
        return {}
    revisions, earlier = set[str](), set[str]()
    for script in (Path(found.origin).parent / "store/db_migrations/versions").glob("*.py"):
        for name, value in _REVISION.findall(script.read_text(encoding="utf-8")):
            named = re.findall(r"[\"']([0-9a-z]+)[\"']", value)
            (revisions if name == "revision" else earlier).update(named)
    return {revision: revision not in earlier for revision in revisions}
