"""Call a function in another Python process, whose hashes of strings differ from this one's."""

from __future__ import annotations

import os
import pickle
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, TypeVar

T = TypeVar("T")

#: seconds that the other process may take
TIMEOUT = 300

# Stdout carries the answer alone: the user's code prints to stderr.
_PROGRAM = """
import os, sys
answer = os.fdopen(os.dup(1), "wb")
os.dup2(2, 1)
import cloudpickle
function, arguments = cloudpickle.loads(sys.stdin.buffer.read())
answer.write(cloudpickle.dumps(function(*arguments)))
"""


def call(function: Callable[..., T], *arguments: Any) -> T:
    """Return ``function(*arguments)``, computed in a new process with this one's import path.

    Raises RuntimeError with the last line of its stderr where the process fails.
    """
    with calling(packed(function, *arguments)) as answer:
        found: T = answer()
        return found


def packed(function: Callable[..., Any], *arguments: Any) -> bytes:
    """Pickle a call for ``calling``. Raises what pickling raises for objects that can't be sent."""
    import cloudpickle

    data: bytes = cloudpickle.dumps((function, arguments))
    return data


@contextmanager
def calling(call: bytes) -> Iterator[Callable[[], Any]]:
    """Start a new process that makes a ``packed`` call; yield a function that waits for the answer.

    The process ends with the block. Errors are those of ``call``.
    """
    hash_seed = "1" if os.environ.get("PYTHONHASHSEED") != "1" else "2"
    environment = {
        **os.environ,
        "PYTHONHASHSEED": hash_seed,
        "PYTHONPATH": os.pathsep.join(path or os.getcwd() for path in sys.path),
    }
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    process = subprocess.Popen([sys.executable, "-c", _PROGRAM], env=environment, **pipes)  # type: ignore[call-overload]
    said: list[tuple[bytes, bytes]] = []

    def exchange() -> None:
        said.append(process.communicate(call))

    exchanging = threading.Thread(target=exchange, name="elsewhere", daemon=True)
    exchanging.start()  # the pipes must be served meanwhile

    def answer() -> Any:
        exchanging.join(TIMEOUT)
        if not said:
            raise RuntimeError(f"in another process: no answer after {TIMEOUT} s")
        out, err = said[0]
        if process.returncode:
            lines = err.decode(errors="replace").strip().splitlines() or ["no message"]
            raise RuntimeError(f"in another process: {lines[-1]}")
        return pickle.loads(out)

    try:
        yield answer
    finally:
        if process.poll() is None:
            process.kill()
        exchanging.join()
