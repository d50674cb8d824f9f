"""Call a function in another Python process, whose hashes of strings differ from this one's."""

from __future__ import annotations

import os
import pickle
import subprocess
import sys
from collections.abc import Callable
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
    import cloudpickle

    hash_seed = "1" if os.environ.get("PYTHONHASHSEED") != "1" else "2"
    environment = {
        **os.environ,
        "PYTHONHASHSEED": hash_seed,
        "PYTHONPATH": os.pathsep.join(path or os.getcwd() for path in sys.path),
    }
    done = subprocess.run(
        [sys.executable, "-c", _PROGRAM],
        input=cloudpickle.dumps((function, arguments)),
        capture_output=True,
        env=environment,
        timeout=TIMEOUT,
    )
    if done.returncode:
        lines = done.stderr.decode(errors="replace").strip().splitlines() or ["no message"]
        raise RuntimeError(f"in another process: {lines[-1]}")
    answer: T = pickle.loads(done.stdout)
    return answer
