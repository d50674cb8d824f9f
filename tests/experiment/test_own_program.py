"""The README's program: trained by ``python lines.py``, then evaluated, exported, served and loaded by its name."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
import yaml
from typer.testing import CliRunner

import metadist
from metadist.cli.app import app
from metadist.core.errors import ConfigError
from metadist.serving.load import Serving, build_service

pytestmark = pytest.mark.lane("services")
README = (Path(__file__).parents[2] / "README.md").read_text(encoding="utf-8")
PROGRAM = re.search(r"```python\n# lines\.py\n(.*?)```", README, re.DOTALL)[1]
SHORT = PROGRAM.replace("meta_steps=300", "meta_steps=4").replace("workers=2", "workers=0, tracking='none'")


def trained(folder: Path, *command: str, program: str | None = None) -> Path:
    """Train by a program in ``folder``; return the run's directory."""
    env = {**tiny.environment(folder), "PYTHONPATH": str(Path(__file__).parents[2])}
    done = subprocess.run(
        [sys.executable, *command], cwd=folder, env=env, input=program, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    (run,) = (folder / "runs").iterdir()
    return run


def document(run: Path) -> dict[str, Any]:
    return yaml.safe_load((run / "config.yaml").read_text())


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    monkeypatch.delitem(sys.modules, "lines", raising=False)
    (tmp_path / "lines.py").write_text(SHORT)
    return tmp_path


def cli(*words: object, code: int = 0) -> str:
    done = CliRunner().invoke(app, [str(w) for w in words])
    assert done.exit_code == code, (words, done.output, done.exception)
    return done.output


def test_the_programs_run_is_evaluated_exported_served_and_loaded(home: Path) -> None:
    assert "workers=0" in SHORT and "meta_steps=4" in SHORT
    run = trained(home, "lines.py")
    assert document(run)["tasks"]["name"] == "lines:Lines" and document(run)["model"]["name"] == "lines:network"
    assert "--trust lines" in cli("evaluate", run, code=2)
    cli("evaluate", run, "--tasks", "4", "--trust", "lines")
    cli("export", run, "lines.safetensors", "--trust", "lines")
    loaded = metadist.load(str(run), trust=["lines"])
    x = torch.linspace(-1, 1, 10).unsqueeze(1)
    expected = loaded.predict(loaded.adapt(x, 2 * x), x)
    for source in (str(run), "lines.safetensors"):
        with pytest.raises(ConfigError, match="--trust lines"):
            build_service(Serving((source,)))
        (model,) = build_service(Serving((source,), trust=("lines",))).models.values()
        phi = model.learner.adapt(model.state, metadist.Examples(x, 2 * x))
        assert torch.equal(model.learner.predict(model.state, phi, x, metadist.Examples(x, 2 * x)), expected)
    resumed = CliRunner().invoke(app, ["train", str(run / "config.yaml"), "--run-dir", str(run), "--resume", "--json",
                                       "--trust", "lines"])  # fmt: skip
    assert resumed.exit_code == 0 and json.loads(resumed.stdout.splitlines()[-1])["meta_step"] == 4


def test_the_variable_allows_modules_of_a_project(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = trained(home, "lines.py")
    monkeypatch.setenv("METADIST_TRUST", "others lines")
    cli("evaluate", run, "--tasks", "4")


def test_a_program_that_runs_as_a_module_has_its_name(home: Path) -> None:
    (home / "package").mkdir()
    (home / "package/lines.py").write_text(SHORT)
    assert document(trained(home, "-m", "package.lines"))["tasks"]["name"] == "package.lines:Lines"


def test_a_program_in_another_folder_is_looked_for_where_the_user_is(home: Path, monkeypatch: Any) -> None:
    (home / "lines.py").rename(home / "program.py") and (home / "elsewhere").mkdir()
    (home / "program.py").rename(home / "elsewhere/program.py")
    run = trained(home, "elsewhere/program.py")
    assert "modules are looked for in the working directory" in cli("evaluate", run, "--trust", "program", code=2)
    monkeypatch.chdir(home / "elsewhere")
    cli("evaluate", run, "--tasks", "4", "--trust", "program")


@pytest.mark.parametrize("way", ["stdin", "name"])
def test_what_no_other_process_can_import_is_refused_with_the_remedy(home: Path, way: str) -> None:
    """A program on stdin or in a notebook, and a file whose name is none of Python's."""
    (home / "my-lines.py").write_text(SHORT)
    run = trained(home, "-", program=SHORT) if way == "stdin" else trained(home, "my-lines.py")
    (line,) = cli("evaluate", run, "--trust", "lines", code=2).splitlines()
    assert "'__main__:Lines'" in line and "train from a file, such as mine.py" in line and "made_from=" in line


def test_a_lambda_is_refused_with_the_remedy(home: Path) -> None:
    (home / "lines.py").write_text(SHORT.replace("model=network", "model=lambda: network()"))
    run = trained(home, "lines.py")
    (line,) = cli("evaluate", run, "--trust", "lines", code=2).splitlines()
    assert "model.name: 'lines:<lambda>' can't be imported: it is a lambda" in line
