"""Find data at a local path, in ``METADIST_DATA``, or at an fsspec URL."""

from __future__ import annotations

import os
from pathlib import Path

from metadist.core.errors import DataError


def located(key: str, path: str) -> str:
    """Return the absolute path or URL of ``path``. A relative one is also looked for in ``METADIST_DATA``.

    Raises DataError that names ``key`` where nothing is there.
    """
    import fsspec

    root = os.environ.get("METADIST_DATA")
    given = Path(os.path.expanduser(path))
    if root and "://" in root and "://" not in path and not given.is_absolute() and not given.exists():
        return located(key, f"{root.rstrip('/')}/{path}")
    if "://" not in path:
        tried = [given, Path(os.path.expanduser(root)) / given] if root and not given.is_absolute() else [given]
        for candidate in tried:
            if candidate.exists():
                return str(candidate.resolve())
        where = " and ".join(str(p.absolute()) for p in tried)
        raise DataError(f"{key} = {path}: no such folder or file; looked for {where}")
    try:
        system, root = fsspec.core.url_to_fs(path)
        if system.exists(root):
            return path
    except Exception as error:  # every fsspec backend raises its own
        raise DataError(f"{key} = {path}: cannot be reached ({error})") from error
    raise DataError(f"{key} = {path}: there is nothing at that address; check the URL")
