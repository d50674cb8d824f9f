"""Control characters from outside never reach a terminal or a log raw."""

from __future__ import annotations

import ast
import io
import json
import logging
import sys
from pathlib import Path

import pytest
from rich.table import Table
from typer.testing import CliRunner

from metadist.cli.app import app
from metadist.cli.display import show_predictions
from metadist.cli.terminal import LogFormatter, say
from metadist.core.text import printable, show
from metadist.experiment.console import PlainConsole
from metadist.experiment.live import PlainLines
from metadist.workers.remote import work_pb2 as pb
from metadist.workers.remote.codec import applicant_of, facts, failure_of

PACKAGE = Path(__file__).parents[2] / "metadist"
#: colours, a cleared screen, a window title, C1, a carriage return, a reversed text, a separator, a lone surrogate
EVIL = "\x1b[31mred\x1b[2J\x1b]0;title\x07\x9b1m\rhidden\u202etxt\u2028\udc80\x00"
SAFE = "\\u001b[31mred\\u001b[2J\\u001b]0;title\\u0007\\u009b1m\\u000dhidden\\u202etxt\\u2028\\udc80\\u0000"


def raw(text: str) -> set[str]:
    return {c for c in text if c in "\x1b\x07\x9b\r\u202e\u2028\udc80\x00"}


def test_control_characters_become_escapes_and_all_others_stay() -> None:
    assert printable(EVIL) == SAFE and json.loads(f'"{SAFE}"') == EVIL
    assert printable("Gruß, 你好, 👩‍🔬, ±\u00a0") == "Gruß, 你好, 👩‍🔬, ±\u00a0"
    assert printable("a\tb\nc", keep="\n\t") == "a\tb\nc" and printable("a\nb") == "a\\u000ab"


def test_messages_and_results(capsys: pytest.CaptureFixture[str]) -> None:
    say(f"error: {EVIL}")
    show(f"result {EVIL}\n  second line")
    PlainLines().note(f"worker {EVIL}")
    captured = capsys.readouterr()
    assert captured.err == f"error: {SAFE}\nworker {SAFE}\n" and captured.out == f"result {SAFE}\n  second line\n"


def test_tables_on_a_terminal_keep_their_styles_alone() -> None:
    shown = io.StringIO()
    table = Table(title=f"title {EVIL}", title_style="bold")
    table.add_column(f"heading {EVIL}")
    table.add_row(f"cell {EVIL}")
    PlainConsole(file=shown, width=200, force_terminal=True, color_system="standard").print(table)
    text = shown.getvalue()
    assert "\x1b[1m" in text and raw(text) == {"\x1b"}
    for sequence in ("\x1b[31m", "\x1b[2J", "\x1b]0;"):
        assert sequence not in text
    assert text.count("\\u001b[2J") == 3


def test_names_of_classes_and_files(capsys: pytest.CaptureFixture[str]) -> None:
    row = {"image": EVIL, "predicted": EVIL, "class": EVIL, "probability": 1.0}
    about = {"model": EVIL, "algorithm": "maml", "classes": [EVIL], "support": 1, "accuracy": 1.0}
    show_predictions({**about, "predictions": [row]})
    assert raw(capsys.readouterr().out) == set()


def test_records_of_the_log() -> None:
    record = logging.LogRecord("metadist.x", logging.WARNING, "", 1, "worker %s\nERROR forged: x", (EVIL,), None)
    assert LogFormatter().format(record) == f"WARNING metadist.x: worker {SAFE}\n    ERROR forged: x"
    try:
        raise ValueError(EVIL)
    except ValueError:
        record.exc_info = sys.exc_info()
    text = LogFormatter().format(record)
    assert raw(text) == set() and all(line.startswith("    ") for line in text.splitlines()[1:])


@pytest.mark.parametrize(
    "override", [f"tasks.name={EVIL}", f"tasks.{EVIL}=1", f"{EVIL}=1", f"loss={EVIL}:f", "name=\x1b[31m"]
)
def test_keys_and_values_of_a_config(override: str) -> None:
    done = CliRunner().invoke(app, ["train", "sinusoid_maml", override.replace("\udc80", "").replace("\x00", "")])
    assert done.exit_code == 2 and raw(done.output) == set() and "error: " in done.output


def test_a_workers_facts_and_failures() -> None:
    hello = pb.Hello(name="\x1b[31m", role="\x1b", host="a\rb", pid=1, versions={"\x1b": "\x07"}, process="\x9b")
    applicant = applicant_of(hello)
    assert raw(f"{applicant}") == set() and applicant.host == "a\\u000db"
    about = facts(json.dumps({"name\x1b": "cpu\x1b[2J", "fingerprint": {"id": "\u202e", "threads": 1}}))
    assert about == {"name\\u001b": "cpu\\u001b[2J", "fingerprint": {"id": "\\u202e", "threads": 1}}
    failure = failure_of(pb.Failure(kind="error\x1b", message="line\n\x1b[2Jtwo", detail="line\n\x1b[2Jtwo"))
    assert (failure.kind, failure.message) == ("error\\u001b", "line \\u001b[2Jtwo")
    assert failure.detail == "line\n\\u001b[2Jtwo"


def test_every_command_prints_through_the_escaping_function() -> None:
    for file in [*PACKAGE.glob("cli/*.py"), *PACKAGE.glob("experiment/*.py"), PACKAGE / "api.py"]:
        tree = ast.parse(file.read_text())
        names = {ast.unparse(n.func) for n in ast.walk(tree) if isinstance(n, ast.Call)}
        imported = {a.asname for n in ast.walk(tree) if isinstance(n, ast.ImportFrom) for a in n.names}
        assert "print" not in names or "print" in imported, file.name
        assert not {"sys.stdout.write", "sys.stderr.write", "Console"} & names, file.name
