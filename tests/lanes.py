"""Lanes: what a test needs besides this process.

A test that no lane claims is fast, and a fast test fails if it starts any of it.

A module claims a lane with ``pytestmark = pytest.mark.lane("services")``, a test with ``@pytest.mark.lane("ray")``;
the nearest claim counts. Tests of the folder ``deploy`` and tests that use certain fixtures need no mark.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import grpc
import pytest

from metadist.engine.compiled import Compiled

FAST = "fast"
#: lane → the reason that a test belongs to it; in the order in which the lanes run, the fast lane fills the gaps at
#: the end
LANES = {
    "ray": "starts a Ray cluster or joins one",
    "compile": "compiles a graph",
    "services": "starts a server or another process of Python",
    "deploy": "checks or runs the files of deploy/ and cluster/",
    "numerics": "needs this process only, and computes there for seconds",
    FAST: "needs this process only, for less than a second",
}
#: fixture → the lane of the tests that use it
FIXTURES = {"cluster": "ray", "server": "services", "bucket": "services", "empty_store": "services"}
#: serves the commands of ``metadist control`` in every run: the one gRPC server that a fast test may start
CONTROL = "metadist.experiment.lifecycle"
#: programs that no fast test starts: interpreters, Ray's processes, compilers
PROGRAMS = ("python", "metadist", "ray", "gcs_server", "mlflow", "g++", "gcc", "c++", "clang")


def lane_of(item: pytest.Item) -> str:
    claim = item.get_closest_marker("lane")
    if claim is not None:
        [lane] = claim.args
        if lane not in LANES:
            raise pytest.UsageError(f"{item.nodeid}: lane {lane!r}; expected one of {', '.join(LANES)}")
        return lane
    for fixture, lane in FIXTURES.items():
        if fixture in getattr(item, "fixturenames", ()):
            return lane
    return "deploy" if "deploy" in item.path.relative_to(Path(__file__).parent).parts[:1] else FAST


def assign(items: list[pytest.Item]) -> None:
    """Mark every test with its lane, order the tests by lane, and keep the tests of a module on one process of xdist.

    All tests of the Ray lane share one process, hence one cluster. A test that names its own group keeps it.
    """
    for item in items:
        lane = lane_of(item)
        item.add_marker(lane)
        if item.get_closest_marker("xdist_group") is None:
            group = "ray" if lane == "ray" else f"{lane} {item.path.parent.name}/{item.path.stem}"
            item.add_marker(pytest.mark.xdist_group(group))
        item.stash[_LANE] = lane
    order = list(LANES)
    items.sort(key=lambda item: order.index(item.stash[_LANE]))


_LANE: pytest.StashKey[str] = pytest.StashKey()


def _callers() -> set[str]:
    """The modules on the stack."""
    frame, found = sys._getframe(1), set()
    while frame is not None:
        found.add(frame.f_globals.get("__name__", ""))
        frame = frame.f_back
    return found


class Guard:
    """A plugin that fails a fast test where it does what belongs to another lane.

    Audit hooks see sockets and processes of Python; gRPC's servers and the compilation of graphs are watched at their
    entrance.
    """

    def __init__(self) -> None:
        self._fast = False
        self._seen: list[str] = []
        sys.addaudithook(self._audit)
        self._watch(grpc, "server", "starts a gRPC server", allowed=CONTROL)
        self._watch(Compiled, "_compile", "compiles a graph")

    def _watch(self, owner: Any, name: str, deed: str, allowed: str = "") -> None:
        """Refuse calls of ``owner.name`` unless the module ``allowed`` is among the callers."""
        original = getattr(owner, name)

        def watched(*arguments: Any, **options: Any) -> Any:
            if self._fast and allowed not in _callers():
                self._refuse(deed)
            return original(*arguments, **options)

        setattr(owner, name, watched)

    def _audit(self, event: str, arguments: tuple[Any, ...]) -> None:
        if not self._fast:
            return
        if event == "socket.bind":
            self._refuse(f"binds a socket to {arguments[1]}")
        elif event == "subprocess.Popen":
            program = Path(str(arguments[0] or arguments[1][0])).name
            # A library that asks its C part for the version while it is imported is no server.
            if program.startswith(PROGRAMS) and "importlib._bootstrap" not in _callers():
                self._refuse(f"starts {program}")

    def _refuse(self, deed: str) -> None:
        if self._fast:
            self._seen.append(deed)
            pytest.fail(f"a test of the fast lane {deed}; mark it, see tests/lanes.py")

    @pytest.hookimpl(wrapper=True)
    def pytest_runtest_protocol(self, item: pytest.Item) -> Any:
        self._fast, self._seen = item.stash[_LANE] == FAST, []
        try:
            return (yield)
        finally:
            self._fast = False

    @pytest.hookimpl(wrapper=True, trylast=True)
    def pytest_runtest_call(self) -> Any:
        """Also where the failure was caught on its way, or happened in another thread."""
        result = yield
        if self._seen:
            pytest.fail(f"a test of the fast lane {self._seen[0]}; mark it, see tests/lanes.py")
        return result
