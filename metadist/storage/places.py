"""Folders of this user that a machine may lack: a home, a cache, and a private folder in their place."""

from __future__ import annotations

import functools
import getpass
import os
import stat
import tempfile
from pathlib import Path


def cache_root() -> Path:
    """Return ``METADIST_CACHE``, or ``~/.cache/metadist``; a private temporary folder where no home can be written to.

    Users may delete its files at any time.
    """
    if given := os.environ.get("METADIST_CACHE"):
        return Path(os.path.expanduser(given))
    home = home_folder()
    cache = None if home is None else home / ".cache" / "metadist"
    return cache if cache is not None and writable(cache) else private_folder() / "cache"


def home_folder() -> Path | None:
    """Return the home of this user, or None where there is none."""
    home = os.path.expanduser("~")
    return Path(home) if home != "~" and os.path.isdir(home) else None


def provide_home() -> None:
    """Give the libraries a home and a user's name where this process has none.

    Containers and schedulers run programs without ``HOME`` and without an entry in the table of users; Ray, PyTorch's
    compiler and Matplotlib need both. A home that exists stays, because credentials may lie there: where it is
    read-only, only Matplotlib's files move.
    """
    try:
        getpass.getuser()
    except (KeyError, OSError):
        os.environ["LOGNAME"] = f"uid-{os.getuid()}"
    home = home_folder()
    if home is None:
        os.environ["HOME"] = str(private_folder())
    elif not writable(home / ".config"):
        os.environ.setdefault("MPLCONFIGDIR", str(private_folder() / "matplotlib"))


@functools.cache
def private_folder(parent: str | None = None) -> Path:
    """Return a folder in ``parent`` that only this user can enter, the same one in every process.

    ``parent`` is the folder of temporary files by default.
    """
    path = Path(parent or tempfile.gettempdir()) / f"metadist-{os.getuid()}"
    try:
        path.mkdir(mode=0o700, exist_ok=True)
        found = path.lstat()
        if stat.S_ISDIR(found.st_mode) and found.st_uid == os.getuid() and not found.st_mode & 0o077:
            return path
    except OSError:
        pass
    return Path(tempfile.mkdtemp(prefix="metadist-", dir=parent))  # somebody else has the name


def writable(path: Path) -> bool:
    """Return whether ``path`` is a folder that can be written to, or can become one."""
    nearest = next(p for p in (path, *path.parents) if p.exists())
    return nearest.is_dir() and os.access(nearest, os.W_OK | os.X_OK)
