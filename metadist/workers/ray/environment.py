"""Ray's settings in the environment, and the signal handlers around its start.

Ray reads its environment when it is imported, so every module that imports ray imports this one first.
"""

import contextlib
import os
import re
import secrets
import signal
import socket
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

from metadist.core.errors import ConfigError
from metadist.rpc.proxies import bypass_proxies
from metadist.storage.places import private_folder, provide_home, writable

#: the cluster to join; None starts one on this machine
ADDRESS = os.environ.get("RAY_ADDRESS") or None

provide_home()
bypass_proxies()

_token = Path(os.path.expanduser("~/.ray/auth_token"))
_has_token = any(os.environ.get(name) for name in ("RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH")) or os.access(
    _token, os.R_OK
)


def _new_token(path: Path) -> str:
    """Write a token that only this user can read, unless the file is there; return its path."""
    with (
        contextlib.suppress(FileExistsError),
        open(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "w") as file,
    ):
        file.write(secrets.token_hex(32))
    return str(path)


# A cluster that this process starts requires a token (Ray writes one to ~/.ray); a cluster that it joins may have none.
# Where ray is imported already, the mode stays as it is: Ray's C++ part has read it and its children must agree.
if "ray" not in sys.modules and (ADDRESS is None or _has_token):
    os.environ.setdefault("RAY_AUTH_MODE", "token")

# Ray would write its token to a home that is read-only.
if ADDRESS is None and not _has_token and not writable(_token):
    os.environ["RAY_AUTH_TOKEN_PATH"] = _new_token(private_folder() / "ray_auth_token")

# The path of a Unix socket has at most 107 bytes, and Ray's sockets lie below its temporary folder.
_SOCKET = "/ray/session_2026-01-31_23-59-59_999999_9999999/sockets/plasma_store"
if "RAY_TMPDIR" not in os.environ and len(os.fsencode(os.environ.get("TMPDIR", "") + _SOCKET)) > 107:
    os.environ["RAY_TMPDIR"] = str(private_folder("/tmp"))

# Otherwise Ray tries for a quarter of an hour to join a server at the address that is not Ray's.
if ADDRESS is not None:
    os.environ.setdefault("RAY_NUM_REDIS_GET_RETRIES", "2")

#: objects up to this size travel with a call or its answer: a round trip through the object store takes a millisecond
INLINE_BYTES = 1 << 20
os.environ.setdefault("RAY_max_direct_call_object_size", str(INLINE_BYTES + (64 << 10)))

# Without this an actor that asked for no GPU may see all GPUs.
os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "1")
os.environ.setdefault("RAY_DEDUP_LOGS", "0")

# Ray's workers have niceness 15 by default: with one other busy process per processor, an actor gets a thirtieth of it.
os.environ.setdefault("RAY_worker_niceness", "0")


@contextlib.contextmanager
def own_signals() -> Iterator[None]:
    """Restore the caller's signal handlers after Ray has started.

    Ray installs handlers of its own, with which SIGTERM raises SystemExit.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    except SystemExit as error:
        raise KeyboardInterrupt from error
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def reach(address: str, timeout: float = 10.0) -> None:
    """Raise ConnectionError where nothing listens at ``address``: ray.init would try for many minutes.

    Raises ConfigError for an address of another form, which ray.init would try for as long.
    """
    if address in ("auto", "local"):
        return
    found = re.fullmatch(r"(?:ray://)?\[?([^\]/\s]+?)\]?:(\d+)", address)
    if found is None:
        expected = "expected HOST:6379 (the head's address), ray://HOST:10001 (Ray Client), or auto"
        if address.startswith(("http://", "https://")):
            expected += "; http:// is the address of jobs and of the dashboard: metadist submit --address " + address
        raise ConfigError(f"RAY_ADDRESS={address}: {expected}")
    socket.create_connection((found[1], int(found[2])), timeout=timeout).close()
