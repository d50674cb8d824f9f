"""Whole files below one root, on a local disk or any fsspec file system."""

from __future__ import annotations

import contextlib
import errno
import os
from pathlib import Path

from fsspec.core import url_to_fs
from fsspec.implementations.local import LocalFileSystem

#: object stores: folders need not be made there, and s3fs would make a bucket of a mistyped name
BUCKETS = {"s3", "s3a", "gs", "gcs", "abfs", "abfss", "az", "oci", "oss"}


class Store:
    """On a local disk files are synced and renamed into place; on other file systems written as they allow.

    Raises ``ValueError`` if the URL's protocol is unknown, ``ImportError`` if its driver isn't installed. Of the methods every
    fsspec backend raises its own errors: catch ``Exception``, and say it with ``why``.
    """

    def __init__(self, root: str | Path, below: str = "") -> None:
        url = os.fspath(root)
        self.root = os.path.join(url, below) if below else url
        if "://" in url:
            try:
                self.fs, path = url_to_fs(url)
            except ImportError as error:
                raise ImportError(
                    f"{error}: pip install 'metadist[cluster]' brings what S3 and Google's store need"
                ) from error
        else:
            self.fs, path = LocalFileSystem(), os.path.abspath(os.path.expanduser(url))
        self.local = isinstance(self.fs, LocalFileSystem)
        protocols = (self.fs.protocol,) if isinstance(self.fs.protocol, str) else self.fs.protocol
        self._folders = not BUCKETS & set(protocols)
        self._base = "/".join(filter(None, (path.rstrip("/"), below)))

    def path(self, name: str = "") -> str:
        """As the file system itself calls it."""
        return f"{self._base}/{name}" if name else self._base

    def read(self, name: str) -> bytes:
        return self.fs.cat_file(self.path(name))

    def listing(self, directory: str) -> dict[str, int | None]:
        """Name → size of what lies in a directory; empty if there is none."""
        path = self.path(directory)
        self.fs.invalidate_cache(path)
        try:
            return {os.path.basename(i["name"].rstrip("/")): i.get("size") for i in self.fs.ls(path, detail=True)}
        except FileNotFoundError:
            return {}

    def write(self, name: str, data: bytes) -> None:
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
        """A local file to where this store is elsewhere."""
        self._make(os.path.dirname(self.path(name)))
        self.fs.put_file(str(file), self.path(name))

    def remove(self, name: str) -> None:
        with contextlib.suppress(FileNotFoundError):
            self.fs.rm_file(self.path(name))

    def remove_tree(self, directory: str) -> None:
        with contextlib.suppress(FileNotFoundError):
            self.fs.rm(self.path(directory), recursive=True)

    def _make(self, directory: str) -> None:
        if self._folders:
            self.fs.makedirs(directory, exist_ok=True)


def sync_directory(path: str | Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.ENOTSUP):  # some file systems can't sync a directory
            raise
    finally:
        os.close(descriptor)


def why(error: Exception) -> str:
    """One line that tells a person what failed."""
    line = (str(error).strip().splitlines() or [""])[0]
    return line if isinstance(error, (OSError, ImportError)) and line else f"{type(error).__name__}: {line}"
