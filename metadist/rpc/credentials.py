"""Loopback addresses, tokens in files, and certificates: shared by clients and servers."""

from __future__ import annotations

import ipaddress
import logging
import stat
from pathlib import Path

from metadist.core.errors import ConfigError

log = logging.getLogger(__name__)


def is_loopback(host: str) -> bool:
    """Return whether ``host`` (a name or an address) is this machine only."""
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host.strip("[]")).is_loopback
    except ValueError:
        return False


def read_token(path: str) -> str:
    """Read the bearer token from a file: one line of 16 or more characters. The token is never printed or logged.

    Raises ``ConfigError`` if the file cannot be read or holds no such line.
    """
    text = read_file("token-file", path).decode("ascii", "replace").strip()
    if len(text) < 16 or not text.isascii() or not text.isprintable() or " " in text:
        raise ConfigError(
            f"token-file {path}: expected one line of 16 or more printable ASCII characters without spaces; make one "
            f"by 'openssl rand -hex 32 > {path}'"
        )
    if Path(path).stat().st_mode & (stat.S_IRGRP | stat.S_IROTH):
        log.warning("token-file %s: other users can read it; 'chmod 600 %s' restricts it to you", path, path)
    return text


def read_file(key: str, path: str) -> bytes:
    """Read a file. Raises ``ConfigError`` with ``key``, the option that names the file, if that fails."""
    try:
        return Path(path).read_bytes()
    except OSError as error:
        raise ConfigError(f"{key} {path}: can't be read ({error.strerror or error})") from None
