"""Where runs lie: a folder each, on a local disk or any fsspec store."""

from __future__ import annotations

import hashlib
import json
import os
import secrets
import time
from pathlib import Path
from typing import Any

from metadist.core.errors import ConfigError, MetadistError
from metadist.storage.store import Store, why


def runs_root() -> str:
    return os.environ.get("METADIST_RUNS") or "runs"


class RunDirectory:
    """A run's folder: a local path or any fsspec URL. ``scratch`` is a local folder for what can't be remote (spool, plots)."""

    def __init__(self, location: str) -> None:
        try:
            self._store = Store(location)
        except (ValueError, ImportError) as error:
            raise ConfigError(f"run_dir '{location}': {error}") from error
        self.local = self._store.local
        self.url = self._store.path() if self.local else location.rstrip("/")
        digest = hashlib.sha256(self.url.encode()).hexdigest()[:12]
        cache = Path(os.environ.get("METADIST_CACHE") or Path.home() / ".cache" / "metadist")
        self.scratch = Path(self.url) if self.local else cache / "runs" / f"{self.url.rsplit('/', 1)[-1]}-{digest}"

    def read(self, name: str) -> str | None:
        try:
            return self._store.read(name).decode()
        except FileNotFoundError:
            return None
        except Exception as error:
            raise ConfigError(f"run_dir '{self.url}': {name} can't be read: {why(error)}") from error

    def read_json(self, name: str) -> dict[str, Any] | None:
        text = self.read(name)
        try:
            return None if text is None else dict(json.loads(text))
        except (ValueError, TypeError) as error:
            raise ConfigError(f"run_dir '{self.url}': {name} is damaged: {error}") from error

    def write(self, name: str, text: str) -> None:
        """On a local disk renamed into place: a run that is killed meanwhile can still be resumed."""
        try:
            self._store.write(name, text.encode())
        except Exception as error:
            raise MetadistError(f"run_dir '{self.url}': {name} can't be written: {why(error)}") from error

    def upload(self, path: Path, name: str) -> None:
        if not self.local:
            self._store.upload(path, name)


def new_run_id(name: str) -> str:
    return f"{name}-{time.strftime('%Y%m%d-%H%M%S')}-{secrets.token_hex(2)}"


def newest_run(name: str, marker: str = "run.json") -> str:
    """The newest run (or ``group.json``: group of seeds) of an experiment under ``METADIST_RUNS``."""
    store, found = Store(runs_root()), []
    for path in (store.path(name) for name in store.listing("")):
        place = path if store.local else store.fs.unstrip_protocol(path)
        about = RunDirectory(place).read_json(marker) if store.fs.isdir(path) else None
        if about is not None and about["name"] == name:
            found.append((about["created"], place))
    if not found:
        raise ConfigError(
            f"--resume: there is no {'group of seeds' if marker == 'group.json' else 'run'} of '{name}' in {runs_root()}; give --run-dir DIR, or start without --resume"
        )
    return max(found)[1]
