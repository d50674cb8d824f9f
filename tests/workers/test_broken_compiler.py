"""A compiler that does not work: ``auto`` computes eagerly and says why, ``always`` refuses in one line."""

from __future__ import annotations

import os
import pickle
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from toys import Curves

from metadist.algorithms import MAML
from metadist.config.engine import EngineSettings
from metadist.config.groups import WorkerGroup
from metadist.core.errors import CompilerError
from metadist.core.model import Model
from metadist.core.outer import OuterLoop
from metadist.engine.plan import Device
from metadist.learners import FewShotLearner
from metadist.workers.numerics import Numerics
from metadist.workers.plan import planned_without_compiler, recorded_engine, why_not_compiled
from metadist.workers.settings import RunSettings

pytestmark = pytest.mark.lane("compile")

TESTS = Path(__file__).parents[1]
NO_HEADERS = """#!/bin/sh
case "$*" in *.cpp*) echo 'x.cpp:1:10: fatal error: Python.h: No such file or directory' >&2; exit 1;; esac
exec g++ "$@"
"""
PROGRAM = """
import sys, torch
sys.path.insert(0, {tests!r})
from toys import Curves, learner
from metadist.algorithms import MAML
from metadist.config.engine import EngineSettings
from metadist.core.errors import MetadistError
from metadist.core.outer import OuterLoop
from metadist.models import MLP
from metadist.workers.local import LocalExecutor
from metadist.workers.settings import RunSettings
outer = OuterLoop(meta_batch_size=4, shard_size=4, meta_steps=10**6)
build = lambda: MLP(hidden=(4,)).build((2,), 2)
subject = learner(MAML(inner_lr=0.1), build, Curves(), outer=outer, dtype=torch.float32)
for wanted in ("auto", "always"):
    planner = lambda device: subject.plan(EngineSettings(compile=wanted), device)
    try:
        executor = LocalExecutor(subject, RunSettings("run", note=lambda text: print("note:", text)), planner=planner)
        print(wanted, executor.plan.engine.compile, executor.plan.reasons["compile"])
    except MetadistError as error:
        print(type(error).__name__, error)
"""


def outcome(cxx, cache):
    environment = {**os.environ, "CXX": cxx, "TORCHINDUCTOR_CACHE_DIR": str(cache), "OMP_NUM_THREADS": "1"}
    program = [sys.executable, "-W", "ignore", "-c", PROGRAM.format(tests=str(TESTS))]
    done = subprocess.run(program, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    return done.stdout.splitlines()


@pytest.mark.timeout(400)
@pytest.mark.parametrize(
    ("script", "why"),
    [
        (None, "No working C++ compiler found"),
        pytest.param(NO_HEADERS, "fatal error: Python.h: No such file or directory", marks=pytest.mark.long),
    ],
)
def test_auto_falls_back_and_always_refuses(script, why, tmp_path):
    cxx = "/bin/false"
    if script is not None:
        cxx = str(tmp_path / "cxx")
        Path(cxx).write_text(script)
        os.chmod(cxx, 0o755)
    compiling, note, auto, again, always = outcome(cxx, tmp_path / "cache")
    assert compiling == again == "note: compiling…"
    assert note.startswith("note: not compiled: the compiler does not work (") and why in note
    assert auto.startswith("auto False not: the compiler does not work (") and why in auto
    assert always.startswith("ConfigError engine.compile: always, but on '") and why in always
    assert always.endswith("; install one that works, or use never")


def test_a_given_engine_is_not_planned_again():
    error = CompilerError("worker w can't comply", "no C++ compiler")
    planner = recorded_engine({"compile": True})
    with pytest.raises(CompilerError, match="worker w can't comply"):
        planned_without_compiler(planner, Device("cpu", "a processor", 1, None), error)
    there = pickle.loads(pickle.dumps(error))
    assert (str(there), there.reason) == (str(error), error.reason)


def test_the_reason_is_the_compiler_s_own_line():
    text = (
        "C++ compile error\n\nCommand:\ng++ …\n\nOutput:\nx.cpp:3:10: error: later\nx.cpp:1:2: fatal error: omp.h: none"
    )
    assert why_not_compiled(RuntimeError(text)) == "x.cpp:1:2: fatal error: omp.h: none"
    assert why_not_compiled(RuntimeError("one\ntwo")) == "RuntimeError: one"


@pytest.mark.lane("ray")
@pytest.mark.timeout(400)
@pytest.mark.long
def test_actors_fall_back_together(cluster):
    """Each of two actors finds that it cannot compile; both compute eagerly, and the driver says so once."""
    from metadist.workers.ray.executor import RayExecutor

    class Uncompilable(FewShotLearner):
        def warm_up(self, seed):
            raise RuntimeError("C++ compile error\nx.cpp:1:10: fatal error: Python.h: No such file or directory")

    outer = OuterLoop(meta_batch_size=4, shard_size=2, meta_steps=10**6)
    model = Model(lambda: torch.nn.Linear(2, 2))
    subject = Uncompilable(MAML(inner_lr=0.1), model, Curves(), outer)
    notes, groups = [], [WorkerGroup(min=2, max=2, cpus=0.1)]
    executor = RayExecutor(
        subject,
        groups,
        RunSettings("run", note=notes.append),
        Numerics(groups),
        lambda device: subject.plan(EngineSettings(), device),
    )
    try:
        assert not executor.plan.engine.compile
        assert len(executor.workers()) == 2
        assert not any(about["fingerprint"]["compile"] for about in executor.workers().values())
        told = [n for n in notes if n.startswith("not compiled")]
        why = "x.cpp:1:10: fatal error: Python.h: No such file or directory"
        assert told == [f"not compiled: the compiler does not work ({why})"]
    finally:
        executor.close()
