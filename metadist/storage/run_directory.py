"""Locate and access the directory of a run, on a local disk or any fsspec store."""

from __future__ import annotations

import hashlib
import json
import os
import secrets
import time
from pathlib import Path
from typing import Any

from metadist.core.errors import ConfigError, MetadistError
from metadist.core.text import has_password, without_passwords
from metadist.storage.places import cache_root
from metadist.storage.store import Store, why


def runs_root() -> str:
    """Return the directory that holds all runs: ``METADIST_RUNS``, or ``runs``."""
    return os.environ.get("METADIST_RUNS") or "runs"


def refuse_password(location: str) -> None:
    """Raise ConfigError where the URL of a run contains a password: logs, tags and the metadata of jobs show it."""
    if has_password(location):
        kind = location.partition("://")[0]
        raise ConfigError(
            f"run_dir '{without_passwords(location)}': a password in a location would stand in logs, in MLflow and in "
            f"the metadata of jobs; give the location without it, and the password as FSSPEC_{kind.upper()}_PASSWORD"
        )


class RunDirectory:
    """Read and write the files of one run.

    ``location``: a local path or any fsspec URL; ``ConfigError`` if it cannot be used. ``scratch``: a local directory
    for files that must be local (spool, plots); the run's own directory where that one is local.
    """

    def __init__(self, location: str) -> None:
        refuse_password(location)
        try:
            self._store = Store(location)
        except (ValueError, ImportError) as error:
            raise ConfigError(f"run_dir '{location}': {error}") from error
        self.local = self._store.local
        self.url = self._store.path() if self.local else location.rstrip("/")
        digest = hashlib.sha256(self.url.encode()).hexdigest()[:12]
        remote = f"{self.url.rsplit('/', 1)[-1]}-{digest}"
        self.scratch = Path(self.url) if self.local else cache_root() / "runs" / remote

    def read(self, name: str) -> str | None:
        """Return a file's text, or None if there is no such file. ``ConfigError`` if the store fails."""
        try:
            return self._store.read(name).decode()
        except FileNotFoundError:
            return None
        except Exception as error:
            raise ConfigError(f"run_dir '{self.url}': {name} can't be read: {why(error)}") from error

    def read_json(self, name: str) -> dict[str, Any] | None:
        """Return a file's JSON object, or None if there is no such file. ``ConfigError`` if it is no JSON object."""
        text = self.read(name)
        try:
            return None if text is None else dict(json.loads(text))
        except (ValueError, TypeError) as error:
            raise ConfigError(f"run_dir '{self.url}': {name} is damaged: {error}") from error

    def write(self, name: str, text: str) -> None:
        """Write a file. A local file is renamed into place, so that a killed run can still be resumed.

        Raises ``MetadistError`` if the store fails.
        """
        try:
            self._store.write(name, text.encode())
        except Exception as error:
            raise MetadistError(f"run_dir '{self.url}': {name} can't be written: {why(error)}") from error

    def upload(self, path: Path, name: str) -> None:
        """Copy a local file into the run's directory; do nothing where that directory is local."""
        if not self.local:
            self._store.upload(path, name)


def tracking_root(directory: RunDirectory) -> Path:
    """Return the folder of the default SQLite store: METADIST_RUNS, or a local folder where that is remote."""
    return directory.scratch.parent if "://" in runs_root() else Path(runs_root()).resolve()


def new_run_id(name: str) -> str:
    """Return a new run id: the experiment's name, the local time and four random hexadecimal digits."""
    return f"{name}-{time.strftime('%Y%m%d-%H%M%S')}-{secrets.token_hex(2)}"


def newest_run(name: str, marker: str = "run.json") -> str:
    """Return the location of an experiment's newest run under ``METADIST_RUNS``.

    ``marker``: the file that identifies the directory: ``run.json`` for a run, ``group.json`` for a group of seeds.
    Raises ``ConfigError`` if there is none.
    """
    store, found = Store(runs_root()), []
    for path in (store.path(name) for name in store.listing("")):
        location = path if store.local else store.fs.unstrip_protocol(path)
        about = RunDirectory(location).read_json(marker) if store.fs.isdir(path) else None
        if about is not None and about["name"] == name:
            found.append((about["created"], location))
    if not found:
        kind = "group of seeds" if marker == "group.json" else "run"
        raise ConfigError(
            f"--resume: there is no {kind} of '{name}' in {runs_root()}; give --run-dir DIR, or start without --resume"
        )
    return max(found)[1]
