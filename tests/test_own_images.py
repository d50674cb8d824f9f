"""The example of docs/own_images.md as written: from an empty folder to a served model that knows new classes."""

from __future__ import annotations

import json
import os
import re
import shlex
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from ports import free_port

ROOT = Path(__file__).parent.parent
PAGE = (ROOT / "docs/own_images.md").read_text(encoding="utf-8")


def whole(words: list[str]) -> list[str]:
    program = {"python": [sys.executable], "metadist": [sys.executable, "-m", "metadist"]}
    return [*program.get(words[0], words[:1]), *words[1:]]


@pytest.mark.lane("services")
@pytest.mark.long
def test_the_example_of_the_page(tmp_path, empty_store):
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "METADIST_CACHE": str(tmp_path / "cache")}
    environment.pop("METADIST_RUNS", None)
    empty_store(tmp_path / "runs/mlflow.db")
    for kind in ("python", "yaml"):
        name, text = re.search(rf"```{kind}\n# (\S+)\n(.*?)```", PAGE, re.DOTALL).groups()
        (tmp_path / name).write_text(text)
    listed = re.findall(r"^\$ (.*?)(?:\s+#.*)?$", PAGE, re.MULTILINE)
    grpc_port, http_port = free_port(), free_port()
    server, answers = None, []
    try:
        for words in map(shlex.split, listed):
            command = whole([w.replace("8470", str(grpc_port)).replace("8471", str(http_port)) for w in words])
            if words[1] == "serve":
                command += ["--port", str(grpc_port), "--http-port", str(http_port)]
                server = subprocess.Popen(
                    command, cwd=tmp_path, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
                )
                assert any("127.0.0.1" in line and str(http_port) in line for line in server.stdout)
                continue
            done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=600)
            assert done.returncode == 0, f"{words}\n{done.stdout}\n{done.stderr}"
            answers.append(done.stdout)
    finally:
        if server is not None:
            server.send_signal(signal.SIGINT)
            server.wait(60)
    scores = [float(s) for a in answers for s in re.findall(r"^accuracy +([\d.]+)$", a, re.MULTILINE)]
    assert len(scores) == 2 and min(scores) > 0.8, "two new classes, by the model of this process and by the server"
    assert json.loads(answers[-1])["predictions"][0]["predicted"] == "star"
    assert {p.name for p in (tmp_path / "runs/pictures").iterdir()} >= {"splits.json", "plots"}


def test_the_example_is_on_the_first_three_screens():
    """A screen has 40 lines."""
    assert PAGE[: PAGE.index("metadist serve")].count("\n") < 3 * 40
