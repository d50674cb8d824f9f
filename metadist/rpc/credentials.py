"""What both ends go by when they decide whom to trust: loopback, tokens in files, certificates."""

from __future__ import annotations

import ipaddress
import logging
import stat
from pathlib import Path

from metadist.core.errors import ConfigError

log = logging.getLogger(__name__)


def is_loopback(host: str) -> bool:
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host.strip("[]")).is_loopback
    except ValueError:
        return False


def read_token(path: str) -> str:
    """The bearer token in a file: one line, 16 characters or more. Never printed."""
    text = read_file("token-file", path).decode("ascii", "replace").strip()
    if len(text) < 16 or not text.isascii() or not text.isprintable() or " " in text:
        raise ConfigError(
            f"token-file {path}: expected one line of 16 or more printable ASCII characters without spaces; make one by "
            f"'openssl rand -hex 32 > {path}'"
        )
    if Path(path).stat().st_mode & (stat.S_IRGRP | stat.S_IROTH):
        log.warning("token-file %s can be read by other users; 'chmod 600 %s' keeps it yours", path, path)
    return text


def read_file(key: str, path: str) -> bytes:
    try:
        return Path(path).read_bytes()
    except OSError as error:
        raise ConfigError(f"{key} {path}: can't be read ({error.strerror or error})") from None
