"""Read and write whole files below one root, on a local disk or any fsspec file system."""

from __future__ import annotations

import contextlib
import errno
import os
from pathlib import Path

from fsspec.core import url_to_fs
from fsspec.implementations.local import LocalFileSystem

#: protocols of object stores: they need no folders, and s3fs would create a bucket from a mistyped name
BUCKETS = {"s3", "s3a", "gs", "gcs", "abfs", "abfss", "az", "oci", "oss"}


class Store:
    """Read, write, list and remove whole files below ``root``.

    A local file is written to a temporary name, synced and renamed, so that a reader sees the old or the new file and
    nothing between. Other file systems write in their own way.

    Raises ``ValueError`` if the URL's protocol is unknown, ``ImportError`` if the protocol's driver isn't installed. In
    the methods each fsspec backend raises its own errors: catch ``Exception`` and describe it with ``why``.
    """

    def __init__(self, root: str | Path, below: str = "") -> None:
        url = os.fspath(root)
        self.root = os.path.join(url, below) if below else url
        if "://" in url:
            try:
                self.fs, path = url_to_fs(url)
            except ImportError as error:
                raise ImportError(
                    f"{error}: pip install 'metadist[cluster]' installs the drivers of S3 and Google Cloud Storage"
                ) from error
        else:
            self.fs, path = LocalFileSystem(), os.path.abspath(os.path.expanduser(url))
        self.local = isinstance(self.fs, LocalFileSystem)
        protocols = (self.fs.protocol,) if isinstance(self.fs.protocol, str) else self.fs.protocol
        self._folders = not BUCKETS & set(protocols)
        self._base = "/".join(filter(None, (path.rstrip("/"), below)))

    def path(self, name: str = "") -> str:
        """Return the path of ``name`` in the file system's own notation."""
        return f"{self._base}/{name}" if name else self._base

    def read(self, name: str) -> bytes:
        """Return the bytes of a file. Raises ``FileNotFoundError`` if there is none."""
        return self.fs.cat_file(self.path(name))

    def listing(self, directory: str) -> dict[str, int | None]:
        """Return name → bytes for the entries of a directory; empty if the directory does not exist."""
        path = self.path(directory)
        self.fs.invalidate_cache(path)
        try:
            return {os.path.basename(i["name"].rstrip("/")): i.get("size") for i in self.fs.ls(path, detail=True)}
        except FileNotFoundError:
            return {}

    def write(self, name: str, data: bytes) -> None:
        """Write a file. On a local disk: synced and renamed, file and directory, before this returns."""
        parent, base = os.path.split(path := self.path(name))
        if not self.local:
            self._make(parent)
            self.fs.pipe_file(path, data)
            return
        missing = [p for p in (Path(parent), *Path(parent).parents) if not p.is_dir()]
        os.makedirs(parent, exist_ok=True)
        for made in missing:
            sync_directory(made.parent)
        temporary = f"{parent}/.{base}.{os.getpid()}.tmp"
        try:
            with open(temporary, "wb") as file:
                file.write(data)
                file.flush()
                os.fsync(file.fileno())
            os.replace(temporary, path)
        except BaseException:
            with contextlib.suppress(OSError):
                os.remove(temporary)
            raise
        sync_directory(parent)

    def upload(self, file: Path, name: str) -> None:
        """Copy a local file to a store that is not local."""
        self._make(os.path.dirname(self.path(name)))
        self.fs.put_file(str(file), self.path(name))

    def remove(self, name: str) -> None:
        """Remove a file. A missing file is no error."""
        with contextlib.suppress(FileNotFoundError):
            self.fs.rm_file(self.path(name))

    def remove_tree(self, directory: str) -> None:
        """Remove a directory with its files. A missing directory is no error."""
        with contextlib.suppress(FileNotFoundError):
            self.fs.rm(self.path(directory), recursive=True)

    def _make(self, directory: str) -> None:
        if self._folders:
            self.fs.makedirs(directory, exist_ok=True)


def sync_directory(path: str | Path) -> None:
    """Sync a local directory, so that a rename in it survives a power failure."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.ENOTSUP):  # some file systems cannot sync a directory
            raise
    finally:
        os.close(descriptor)


def why(error: Exception) -> str:
    """Describe an error in one line."""
    line = (str(error).strip().splitlines() or [""])[0]
    return line if isinstance(error, (OSError, ImportError)) and line else f"{type(error).__name__}: {line}"
