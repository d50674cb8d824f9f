"""What ``metadist.train`` shows, calls and keeps when it is called from Python."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
import tiny
from drivers import newest, query, wait_for

import metadist
from metadist import MAML, EvaluateSettings, OuterLoop, Sinusoid
from metadist.models import MLP


def parts(**changes):
    return {
        "tasks": Sinusoid(k_shot=4, query_shots=4),
        "model": MLP(hidden=(8,)),
        "algorithm": MAML(inner_steps=1),
        "outer": OuterLoop(meta_batch_size=4, shard_size=2, meta_steps=6),
        "evaluate": EvaluateSettings(every=3, tasks=4, test_tasks=4, inner_steps=1),
        "engine": metadist.EngineSettings(compile="never"),
        "tracking": "none",
        **changes,
    }


@pytest.mark.lane("numerics")
def test_callbacks_see_every_step_and_validation(tmp_path, capsys):
    steps, judged = [], []
    metadist.train(
        run_dir=str(tmp_path / "run"),
        on_step=lambda step, report: steps.append((step, sorted(report))),
        on_evaluation=lambda step, evaluation: judged.append((step, evaluation.split, evaluation.tasks)),
        **parts(),
    )
    assert [step for step, _ in steps] == [1, 2, 3, 4, 5, 6]
    assert {"loss", "mse", "tasks_per_second"} <= set(steps[0][1])
    assert judged == [(3, "validation", 4), (6, "validation", 4)]
    printed = capsys.readouterr()
    assert "meta-step 3  validation mse" in printed.err
    assert "test on 4 tasks" in printed.err
    assert printed.out == ""


@pytest.mark.lane("numerics")
def test_quiet_prints_nothing(tmp_path, capfd):
    metadist.train(run_dir=str(tmp_path / "run"), quiet=True, **parts())
    printed = capfd.readouterr()
    assert (printed.out, printed.err) == ("", "")


@pytest.mark.lane("numerics")
@pytest.mark.parametrize("which", ["on_step", "on_evaluation"])
def test_an_exception_of_a_callback_ends_the_run_with_a_checkpoint(tmp_path, which):
    class Pruned(Exception):
        pass

    def prune(step, _):
        if step == 3:
            raise Pruned

    before = [signal.getsignal(n) for n in (signal.SIGINT, signal.SIGTERM)]
    with pytest.raises(Pruned):
        metadist.train(run_dir=str(tmp_path / "run"), quiet=True, **{which: prune}, **parts())
    assert newest(tmp_path / "run") == 3
    assert [signal.getsignal(n) for n in (signal.SIGINT, signal.SIGTERM)] == before
    again = metadist.train(run_dir=str(tmp_path / "run"), resume=True, quiet=True, **parts())
    assert again.params_sha256 == metadist.train(run_dir=str(tmp_path / "b"), quiet=True, **parts()).params_sha256


@pytest.mark.lane("numerics")
def test_handlers_of_the_program_stay(tmp_path):
    mine = lambda number, frame: None  # noqa: E731
    before, seen = signal.signal(signal.SIGTERM, mine), []
    try:
        metadist.train(
            run_dir=str(tmp_path / "run"), on_step=lambda *_: seen.append(signal.getsignal(signal.SIGTERM)), **parts()
        )
    finally:
        signal.signal(signal.SIGTERM, before)
    assert set(seen) == {mine}


@pytest.mark.lane("numerics")
def test_a_thread_trains_too(tmp_path):
    results = []
    thread = threading.Thread(target=lambda: results.append(metadist.train(run_dir=str(tmp_path / "run"), **parts())))
    thread.start()
    thread.join()
    assert results[0].outcome.progress.meta_step == 6


# Signals --------------------------------------------------------------------------------------------------------------

PROGRAM = """
import sys
import metadist
from metadist import MAML, CheckpointSettings, EvaluateSettings, OuterLoop, Sinusoid
from metadist.models import MLP

result = metadist.train(
    tasks=Sinusoid(k_shot=4, query_shots=4), model=MLP(hidden=(8,)), algorithm=MAML(inner_steps=1),
    outer=OuterLoop(meta_batch_size=4, shard_size=2, meta_steps=int(sys.argv[1])),
    evaluate=EvaluateSettings(every=1000000, tasks=4, test_tasks=int(sys.argv[2])),
    engine=metadist.EngineSettings(compile="never"), checkpoint=CheckpointSettings(every=50),
    run_dir="run", resume=len(sys.argv) > 3,
)
print(result.params_sha256)
"""


def program(folder: Path, *arguments: object) -> subprocess.Popen[str]:
    (folder / "program.py").write_text(PROGRAM)
    return subprocess.Popen(
        [sys.executable, "program.py", *map(str, arguments)],
        cwd=folder,
        env=tiny.environment(folder),
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )


@pytest.mark.lane("services")
@pytest.mark.parametrize("number", [signal.SIGINT, pytest.param(signal.SIGTERM, marks=pytest.mark.long)])
def test_a_signal_stops_a_program_with_a_checkpoint(tmp_path, empty_store, number):
    empty_store(tmp_path / "runs/mlflow.db")
    process = program(tmp_path, 100000, 4)
    wait_for(process, lambda: newest(tmp_path / "run") > 0)
    time.sleep(1.0)
    process.send_signal(number)
    out, err = process.communicate(timeout=120)
    assert process.returncode == 1, err
    assert out == "", "the program ends: its next line does not run"
    assert "TrainingInterrupted: stopped at meta-step" in err
    steps = int(err.rpartition("stopped at meta-step ")[2].partition(",")[0])
    assert newest(tmp_path / "run") == steps
    assert query(tmp_path, "SELECT status FROM runs") == [("KILLED",)]

    if number == signal.SIGINT:
        return
    done = program(tmp_path, steps + 7, 4, "resume")
    sha, err = done.communicate(timeout=120)
    assert done.returncode == 0, err
    assert query(tmp_path, "SELECT status FROM runs") == [("FINISHED",)]
    (tmp_path / "whole").mkdir()
    whole, err = program(tmp_path / "whole", steps + 7, 4).communicate(timeout=120)
    assert sha == whole, err


@pytest.mark.lane("services")
@pytest.mark.long
def test_a_signal_during_the_final_test_ends_it(tmp_path, empty_store):
    empty_store(tmp_path / "runs/mlflow.db")
    process = program(tmp_path, 3, 10_000_000)
    seen = ""
    while "test on 10000000 tasks" not in seen:
        assert (line := process.stderr.readline()), seen
        seen += line
    time.sleep(0.5)
    process.send_signal(signal.SIGTERM)
    out, err = process.communicate(timeout=60)
    assert process.returncode == -signal.SIGINT, err
    assert newest(tmp_path / "run") == 3
    assert query(tmp_path, "SELECT status FROM runs") == [("KILLED",)]


# A notebook -----------------------------------------------------------------------------------------------------------


@pytest.mark.lane("services")
@pytest.mark.long
def test_a_notebook_shows_one_line_that_is_replaced(tmp_path):
    pytest.importorskip("ipykernel")
    from jupyter_client.manager import start_new_kernel

    cell = PROGRAM.replace("int(sys.argv[1])", "200").replace("int(sys.argv[2])", "4").replace("len(sys.argv) > 3", "0")
    cell = cell.replace('run_dir="run"', 'run_dir="run", tracking="none"').replace("every=1000000", "every=50")
    manager, client = start_new_kernel(env={**os.environ, **tiny.environment(tmp_path)}, cwd=str(tmp_path))
    try:
        shown = []
        client.execute_interactive(cell, timeout=120, output_hook=shown.append)
    finally:
        client.stop_channels()
        manager.shutdown_kernel(now=True)
    kinds = {message["msg_type"] for message in shown}
    assert "error" not in kinds, shown
    [first] = [m for m in shown if m["msg_type"] == "display_data"]
    updates = [m["content"]["data"]["text/plain"] for m in shown if m["msg_type"] == "update_display_data"]
    assert first["content"]["data"] == {"text/plain": "starting…"}
    assert any("validation mse" in text for text in updates)
    assert updates[-1].startswith("test on 4 tasks")
