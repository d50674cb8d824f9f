"""Checkpoints of a process that is killed: at random moments, and before every line that touches the store."""

from __future__ import annotations

import os
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

from metadist.storage import checkpoints as checkpoint

pytestmark = pytest.mark.lane("services")

KILLED = textwrap.dedent("""
    import os, random, shutil, signal, sys, time, traceback
    import torch
    torch.set_num_threads(1)
    from metadist.core.parameters import Layout
    from metadist.core.state import Slot, State
    from metadist.storage import checkpoints as checkpoint
    from metadist.storage import store
    from metadist.storage.checkpoints import Checkpoints

    TOUCHING = "save _write _prune _remove write remove remove_tree sync_directory".split()
    size = 50_000
    slots = {"theta": Slot(Layout(("w",), ((size,),)))}

    def state(step):
        return State({"theta": torch.arange(size) * 1e-3 + step}, {"step": torch.tensor(step)})

    def check(run_dir, least):
        loaded = Checkpoints(run_dir).latest(slots)
        step = loaded.meta_step if loaded else 0
        assert step >= least, (step, least)
        if loaded:
            assert loaded.state.slots["theta"].equal(state(step).slots["theta"]) and loaded.manifest == {"step": step}
            assert loaded.state.outer["step"] == step
        return step

    def killed(child, parent):
        pid = os.fork()
        if pid == 0:
            try:
                child()
            except BaseException:
                traceback.print_exc()
                os._exit(1)
            os._exit(0)
        parent(pid)
        status = os.waitpid(pid, 0)[1]
        assert os.WIFSIGNALED(status) or status == 0, status
        return status != 0

    def at_random_moments(run_dir, times):
        rng, least, kills = random.Random(0), 0, 0
        began = time.perf_counter()
        for step in range(1, 6):
            Checkpoints(run_dir + "-timed").save(step, state(step), {"step": step}, slots=slots)
        longest = max(0.12, time.perf_counter() - began)  # some saves, on a slow disk too
        for _ in range(times):
            def child():
                step = check(run_dir, least)
                while True:
                    step += 1
                    assert Checkpoints(run_dir).save(step, state(step), {"step": step}, slots=slots)
            def parent(pid):
                time.sleep(rng.uniform(0.002, longest))
                os.kill(pid, signal.SIGKILL)
            kills += killed(child, parent)
            least = check(run_dir, least)
        return kills, least

    def at_every_line(run_dir, step, old):
        '''SIGKILL before the nth line that touches the store, for every n.'''
        for line in range(100_000):
            base = f"{run_dir}/{line}"
            for s in old:
                assert Checkpoints(base).save(s, state(s), {"step": s}, slots=slots)
            def child():
                count = 0
                def trace(frame, event, argument):
                    nonlocal count
                    code = frame.f_code
                    if code.co_filename not in (checkpoint.__file__, store.__file__) or code.co_name not in TOUCHING:
                        return None
                    if event == "line":
                        if count == line:
                            os.kill(os.getpid(), signal.SIGKILL)
                        count += 1
                    return trace
                checkpoints = Checkpoints(base)
                sys.settrace(trace)
                assert checkpoints.save(step, state(step), {"step": step}, slots=slots)
            if not killed(child, lambda pid: None):
                return line
            check(base, max(old, default=0))
            assert Checkpoints(base).save(step + 1, state(step + 1), {"step": step + 1}, slots=slots)
            assert check(base, step + 1) == step + 1
            left = [f for _, _, names in os.walk(base) for f in names]
            assert len(left) == 4 or not old and len(left) == 2, left
            assert {"manifest.json", "state.safetensors"} == set(left), left
            shutil.rmtree(base)

    run_dir, what, times = sys.argv[1:]
    if what == "random":
        print(*at_random_moments(run_dir, int(times)))
    else:
        os.fsync = lambda descriptor: None  # a kill doesn't lose what the kernel has
        size = 100
        slots = {"theta": Slot(Layout(("w",), ((size,),)))}
        print(at_every_line(run_dir, 3, [1, 2]), at_every_line(run_dir + "-first", 1, []))
""")


def kill_loop(tmp_path: Path, *arguments: object) -> list[int]:
    command = [sys.executable, "-c", KILLED, str(tmp_path / "run"), *map(str, arguments)]
    environment = {**os.environ, "PYTHONPATH": str(Path(checkpoint.__file__).parents[2])}
    done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=600)
    assert done.returncode == 0, done.stderr
    return list(map(int, done.stdout.split()))


def test_sigkill_at_random_moments_leaves_a_whole_checkpoint(tmp_path):
    kills, last = kill_loop(tmp_path, "random", 40)
    assert kills == 40
    assert last > 10


def test_sigkill_before_every_line_of_a_save_leaves_a_whole_checkpoint(tmp_path):
    assert min(kill_loop(tmp_path, "lines", 0)) > 50


@pytest.mark.long
def test_sigkill_at_five_hundred_random_moments(tmp_path):
    assert kill_loop(tmp_path, "random", 500)[0] == 500
