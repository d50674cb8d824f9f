"""Ray's settings that must stand in the environment before ray is imported, and what must surround its start.

Imported before ray, wherever ray is.
"""

import contextlib
import os
import re
import signal
import socket
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

#: the cluster to join; None starts one on this machine
ADDRESS = os.environ.get("RAY_ADDRESS") or None

_has_token = (
    any(os.environ.get(name) for name in ("RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH"))
    or (Path.home() / ".ray" / "auth_token").exists()
)

# A cluster of our own always asks for a token (Ray writes one to ~/.ray); somebody else's may know of none. Where ray is
# imported already, its own default holds: its C++ part has read the mode, and would disagree with its children.
if "ray" not in sys.modules and (ADDRESS is None or _has_token):
    os.environ.setdefault("RAY_AUTH_MODE", "token")

# Ray would try for a quarter of an hour to join what listens at the address but is no Ray.
if ADDRESS is not None:
    os.environ.setdefault("RAY_NUM_REDIS_GET_RETRIES", "2")

#: what travels with a call or its answer, not through the object store, whose round trips take a millisecond
INLINE_BYTES = 1 << 20
os.environ.setdefault("RAY_max_direct_call_object_size", str(INLINE_BYTES + (64 << 10)))

# Without it an actor that asked for no GPU may see them all.
os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "1")
os.environ.setdefault("RAY_DEDUP_LOGS", "0")

# Ray's workers are nice (15) to everything else: beside one other busy process per processor an actor would get a thirtieth of it.
os.environ.setdefault("RAY_worker_niceness", "0")


@contextlib.contextmanager
def own_signals() -> Iterator[None]:
    """Ray installs signal handlers when it starts (SIGTERM then raises SystemExit); afterwards the caller's stand again."""
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
    """ConnectionError at once where nothing listens: ray.init itself would try for many minutes."""
    found = re.fullmatch(r"(?:ray://)?\[?([^\]/]+?)\]?:(\d+)", address)
    if found is not None:
        socket.create_connection((found[1], int(found[2])), timeout=timeout).close()
