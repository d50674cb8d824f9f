"""Where runs lie: a folder each, on a local disk or any fsspec store."""

from __future__ import annotations

import hashlib
import json
import os
import secrets
import time
from pathlib import Path
from typing import Any

import fsspec
from fsspec.core import url_to_fs
from fsspec.implementations.local import LocalFileSystem

from metadist.core.errors import ConfigError, MetadistError


def runs_root() -> str:
    return os.environ.get("METADIST_RUNS") or "runs"


class RunFolder:
    """A run's folder: a local path or any fsspec URL. ``scratch`` is a local folder for what can't be remote (spool, plots)."""

    def __init__(self, location: str) -> None:
        self.url = location.rstrip("/")
        try:
            self._fs, self._path = url_to_fs(self.url)
        except (ValueError, ImportError) as error:
            raise ConfigError(f"run_dir '{location}': {error}") from error
        self.local = isinstance(self._fs, LocalFileSystem)
        if self.local:
            self.url = self._path
        digest = hashlib.sha256(self.url.encode()).hexdigest()[:12]
        cache = Path(os.environ.get("METADIST_CACHE") or Path.home() / ".cache" / "metadist")
        self.scratch = Path(self._path) if self.local else cache / "runs" / f"{self.url.rsplit('/', 1)[-1]}-{digest}"

    def read(self, name: str) -> str | None:
        try:
            with fsspec.open(f"{self.url}/{name}", "r", encoding="utf-8") as file:
                return file.read()
        except FileNotFoundError:
            return None
        except (OSError, UnicodeDecodeError) as error:
            raise ConfigError(f"run_dir '{self.url}': {name} can't be read: {error}") from error

    def read_json(self, name: str) -> dict[str, Any] | None:
        text = self.read(name)
        try:
            return None if text is None else dict(json.loads(text))
        except (ValueError, TypeError) as error:
            raise ConfigError(f"run_dir '{self.url}': {name} is damaged: {error}") from error

    def write(self, name: str, text: str) -> None:
        """On a local disk renamed into place: a run that is killed meanwhile can still be resumed."""
        target = f"{self._path}/{name}"
        try:
            self._fs.makedirs(target.rpartition("/")[0], exist_ok=True)
            written = f"{target}.new" if self.local else target
            self._fs.pipe_file(written, text.encode())
            if self.local:
                os.replace(written, target)
        except OSError as error:
            raise MetadistError(f"run_dir '{self.url}': {name} can't be written: {error}") from error

    def upload(self, path: Path, name: str) -> None:
        if not self.local:
            self._fs.makedirs(f"{self._path}/{name}".rpartition("/")[0], exist_ok=True)
            self._fs.put_file(str(path), f"{self._path}/{name}")


def new_run_id(name: str) -> str:
    return f"{name}-{time.strftime('%Y%m%d-%H%M%S')}-{secrets.token_hex(2)}"


def newest_run(name: str, marker: str = "run.json") -> str:
    """The newest run (or ``group.json``: group of seeds) of an experiment under ``METADIST_RUNS``."""
    fs, root = url_to_fs(runs_root())
    found = []
    for path in fs.ls(root, detail=False) if fs.exists(root) else []:
        about = RunFolder(fs.unstrip_protocol(path)).read_json(marker) if fs.isdir(path) else None
        if about is not None and about["name"] == name:
            found.append((about["created"], path))
    if not found:
        raise ConfigError(f"--resume: there is no {'group of seeds' if marker == 'group.json' else 'run'} of '{name}' in {runs_root()}; give --run-dir DIR, or start without --resume")
    return fs.unstrip_protocol(max(found)[1]) if not isinstance(fs, LocalFileSystem) else max(found)[1]
