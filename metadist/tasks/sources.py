"""Find and download data sets: the folders of METADIST_DATA, and files with a known MD5."""

from __future__ import annotations

import hashlib
import http.client
import json
import logging
import os
import posixpath
import urllib.request
from collections.abc import Sequence
from pathlib import Path

from metadist.core.errors import DataError
from metadist.storage.places import cache_root
from metadist.tasks.images import replacing

log = logging.getLogger(__name__)


def data_folder(name: str, files: Sequence[str]) -> Path | None:
    """Return the folder ``name`` in METADIST_DATA, or None if that variable is not set.

    Where METADIST_DATA is an fsspec URL, copy the existing ones of ``files`` to this node's cache, once for each state
    of the files.
    """
    root = os.environ.get("METADIST_DATA")
    if not root:
        return None
    if "://" not in root:
        return Path(os.path.expanduser(root)) / name
    import fsspec

    try:
        system, base = fsspec.core.url_to_fs(f"{root.rstrip('/')}/{name}")
        there = {f: f"{base}/{f}" for f in files if system.exists(f"{base}/{f}")}
        state = sorted((f, str(system.ukey(path))) for f, path in there.items())
        copy = cache_root() / "data" / hashlib.sha256(json.dumps([root, name, state]).encode()).hexdigest()[:16] / name
        for f, path in there.items():
            if not (copy / f).is_file():
                copy.mkdir(parents=True, exist_ok=True)
                with replacing(copy / f) as temporary:
                    system.get_file(path, str(temporary))
    except Exception as error:  # every fsspec backend raises its own
        raise DataError(f"METADIST_DATA = {root} cannot be reached ({' '.join(str(error).split())})") from error
    return copy


def download(url: str, md5: str) -> bytes:
    """Return the file at ``url``, from the cache or the network. Raises DataError where its MD5 is not ``md5``."""
    target = cache_root() / posixpath.basename(url)
    try:
        data = target.read_bytes()
        if hashlib.md5(data, usedforsecurity=False).hexdigest() == md5:
            return data
        log.warning("%s is damaged: downloading it again", target)
    except OSError:
        pass
    log.info("downloading %s", url)
    by_hand = "or download the file by hand and set METADIST_DATA"
    try:
        with urllib.request.urlopen(url, timeout=60) as response:
            data = response.read()
    except (OSError, http.client.HTTPException) as error:
        raise DataError(f"cannot download {url} ({error}); try again, {by_hand}") from error
    found = hashlib.md5(data, usedforsecurity=False).hexdigest()
    if found != md5:
        raise DataError(f"{url} arrived with MD5 {found}, not {md5} ({len(data)} bytes); try again, {by_hand}")
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        with replacing(target) as temporary:
            temporary.write_bytes(data)
    except OSError as error:
        log.warning("cannot keep %s in the cache (%s)", target, error)
    return data
