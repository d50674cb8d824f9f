"""What a person sees while it runs."""

from __future__ import annotations

import dataclasses
import io
import json
import os
import pty
import re
import subprocess
import sys

import pytest
import tiny
from rich.console import Console

from metadist.cli import display as results
from metadist.experiment import live as display
from metadist.learners.evaluation import Evaluation, TaskScore

JUDGED = Evaluation("validation", "mse", 6, [2.0, 1.0], [0.2, 0.1], [1.5, 0.9], [2.0, 1.0], 0.0, {})


def test_plain_lines_say_step_loss_rate_and_what_is_left(capsys, monkeypatch):
    clock = iter([0.0, 1.0, 20.0, 21.0, 40.0, 41.0])
    monkeypatch.setattr(display.time, "monotonic", lambda: next(clock))
    plain = display.PlainLines(100)
    plain.step(11, {"loss": 0.5, "gradient_norm": 9.0}, 123.4)
    plain.step(31, {"loss": 0.25, "mse": 0.25, "lr": 1.0}, 123.4)
    plain.step(32, {"loss": 0.25}, 123.4)
    plain.evaluated(32, JUDGED)
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.splitlines() == [
        "meta-step 31/100  loss 0.2500  mse 0.2500  123 tasks/s, 66 s left",
        "meta-step 32  validation mse 1.0000 ± 0.1000",
    ]


SOME = dataclasses.replace(
    JUDGED,
    split="test",
    tasks=500,
    divergence_rate=3 / 492,
    left_out=8,
    loss_rose=3,
    ci95_tasks=[0.1, 0.05],
    task_metrics={"r2": TaskScore([0.1, 0.5], [0.01, 0.02], [0.2, 0.6], 12)},
    tables={"confusion_matrix": [[7.0, 1.0], [0.0, 12.0]]},
    protocol={"interval": "over 7 sources (Student's t)"},
)


def test_left_out_tasks_stand_wherever_the_number_stands(capsys):
    """Earlier, the title said 500 tasks where 8 of them had left the mean."""
    results.show_evaluation(SOME)
    shown = capsys.readouterr().out
    assert shown.startswith("test: mse on 500 tasks (8 of 500 left out: not finite)")
    assert "divergence rate 0.0061 (query loss higher after 1 adaptation steps than before: 3 tasks)" in shown
    assert re.search(r"r2 +│ 0.1000 │ 0.5000 │ ± 0.0200 │ 0.6000 │ 12 of 500 │", shown)
    assert "over 7 sources (Student's t); with all tasks taken as independent ± 0.0500" in shown
    assert "confusion_matrix: rows are classes" in shown and "\n      7       1\n      0      12\n" in shown
    display.PlainLines(10).evaluated(3, SOME)
    assert "validation mse 1.0000 ± 0.1000 (8 of 500 left out: not finite)" in capsys.readouterr().err
    assert SOME.metrics()["eval/test/mse/left_out"] == 8.0
    assert json.loads(json.dumps(SOME.as_dict()))["left_out"] == 8


@pytest.mark.parametrize("message", ["tasks [3, 4] gave [bold]NaN[/x]", "[/]", "run [a/b] :smile:"])
def test_notes_are_shown_as_they_are(message):
    shown = io.StringIO()
    with display.bar(Console(file=shown, width=80)) as progress:
        bar = display.Bar(progress, 10)
        bar.step(3, {"loss": 0.5}, 12.0)
        bar.evaluated(3, JUDGED)
        bar.note(message)
    assert message in shown.getvalue()


@pytest.mark.parametrize("width", [80, 66, 60, 160])
def test_a_narrow_terminal_keeps_the_bar(width):
    shown = io.StringIO()
    console = Console(file=shown, width=width, force_terminal=True, color_system=None)
    progress = display.bar(console)
    bar = display.Bar(progress, 15000)
    bar.step(12345, {"loss": 0.5, "mse": 0.25, "a_metric_of_a_long_name": 0.75, "another": 1.0}, 12345.6)
    bar.evaluated(12000, JUDGED)
    console.print(progress.get_renderable())
    first, second, *rest = [line.rstrip() for line in shown.getvalue().splitlines()]
    assert rest == [], "two rows"
    assert first.count("━") >= 3, "the bar"
    assert "12345/15000" in first
    assert second.startswith("loss 0.5000  mse 0.2500")
    assert max(map(len, (first, second))) <= width
    assert ("validation mse 1.0000 ± 0.1000" in second) == (width == 160)


def test_the_final_test_names_its_phase(capsys):
    shown = io.StringIO()
    progress = display.bar(Console(file=shown, width=80, force_terminal=True, color_system=None))
    bar = display.Bar(progress, 100)
    bar.step(100, {"loss": 0.5}, 12.0)
    bar.testing(10000)
    progress.console.print(progress.get_renderable())
    assert "test on 10000 tasks" in shown.getvalue()
    display.PlainLines(100).testing(10000)
    assert "test on 10000 tasks" in capsys.readouterr().err


@pytest.mark.lane("services")
def test_a_terminal_gets_a_bar(tmp_path):
    master, slave = pty.openpty()
    command = [sys.executable, "-m", "metadist", "train", str(tiny.write(tmp_path, "outer.meta_steps=30")), "--json"]
    environment = {**tiny.environment(tmp_path), "TERM": "xterm-256color", "COLUMNS": "80"}
    with subprocess.Popen(
        command, cwd=tmp_path, env=environment, stdout=subprocess.PIPE, stderr=slave, text=True
    ) as process:
        os.close(slave)
        shown = b""
        while True:
            try:
                piece = os.read(master, 4096)
            except OSError:  # the other end is closed
                break
            if not piece:
                break
            shown += piece
        out = process.stdout.read()
    os.close(master)
    assert process.returncode == 0
    text = shown.decode()
    for part in ("meta-training", "30/30", "tasks/s", "loss", "mse", "test on 8 tasks"):
        assert part in text, part
    assert "Traceback" not in text
    assert tiny.last_json(out)["meta_step"] == 30
