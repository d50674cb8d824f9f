"""The entries of the cache folder: their sizes and ages."""

from __future__ import annotations

import os
import shutil
import time
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class CacheEntry:
    """A file or folder of the cache. ``idle_days`` is the time since a file of it was last read or written."""

    path: Path
    name: str
    bytes: int
    idle_days: float


def entries(root: Path) -> list[CacheEntry]:
    """Return what lies in the cache, the largest first; a remote run (``runs/…``) is an entry of its own."""
    if not root.is_dir():
        return []
    paths = [path for path in root.iterdir() if path.name != "runs"]
    runs = root / "runs"
    paths += list(runs.iterdir()) if runs.is_dir() else []
    return sorted((_entry(root, path) for path in paths), key=lambda entry: (-entry.bytes, entry.name))


def remove(entry: CacheEntry) -> int:
    """Remove an entry and return the bytes that this frees; 0 where it cannot be removed."""
    try:
        if entry.path.is_dir() and not entry.path.is_symlink():
            shutil.rmtree(entry.path)
        else:
            entry.path.unlink()
    except OSError:
        return 0
    return entry.bytes


def _entry(root: Path, path: Path) -> CacheEntry:
    files = [path]
    if path.is_dir() and not path.is_symlink():
        files = [Path(folder, name) for folder, _, names in os.walk(path) for name in names] or [path]
    stats = [file.lstat() for file in files if file.exists() or file.is_symlink()]
    newest = max((max(each.st_mtime, each.st_atime) for each in stats), default=0.0)
    size = sum(each.st_size for each in stats)
    return CacheEntry(path, path.relative_to(root).as_posix(), size, max(0.0, (time.time() - newest) / 86400))
