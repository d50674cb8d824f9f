"""The README's program: trained by ``python lines.py``, then evaluated, exported, served and loaded by its name."""

from __future__ import annotations

import importlib.machinery
import json
import re
import shutil
import subprocess
import sys
import types
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
from metadist.core.imports import path_of
from metadist.serving.load import Serving, build_service

pytestmark = pytest.mark.lane("services")
README = (Path(__file__).parents[2] / "README.md").read_text(encoding="utf-8")
PROGRAM = re.search(r"```python\n# lines\.py\n(.*?)```", README, re.DOTALL)[1]
SHORT = PROGRAM.replace("meta_steps=300", "meta_steps=4").replace("workers=2", "workers=0, tracking='none'")


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of the program, which ran as ``python lines.py``."""
    folder = tmp_path_factory.mktemp("program")
    (folder / "lines.py").write_text(SHORT)
    env = {**tiny.environment(folder), "PYTHONPATH": str(Path(__file__).parents[2])}
    done = subprocess.run([sys.executable, "lines.py"], cwd=folder, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    (run,) = (folder / "runs").iterdir()
    run.rename(folder / "run")
    return folder


@pytest.fixture
def home(trained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A copy of the program and its run, in the working directory."""
    shutil.copytree(trained, tmp_path, dirs_exist_ok=True)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [p for p in sys.path if p != ""])
    monkeypatch.delitem(sys.modules, "lines", raising=False)
    return tmp_path


def cli(*words: object, code: int = 0) -> str:
    done = CliRunner().invoke(app, [str(w) for w in words])
    assert done.exit_code == code, (words, done.output, done.exception)
    return done.output


def test_the_programs_run_is_evaluated_exported_served_and_loaded(home: Path) -> None:
    assert "workers=0" in SHORT and "meta_steps=4" in SHORT
    named = yaml.safe_load(Path("run/config.yaml").read_text())
    assert named["tasks"]["name"] == "lines:Lines" and named["model"]["name"] == "lines:network"
    assert "allow it with --trust lines" in cli("evaluate", "run", code=2)
    cli("evaluate", "run", "--tasks", "4", "--trust", "lines")
    cli("export", "run", "lines.safetensors", "--trust", "lines")
    loaded = metadist.load("run", trust=["lines"])
    x = torch.linspace(-1, 1, 10).unsqueeze(1)
    expected = loaded.predict(loaded.adapt(x, 2 * x), x)
    for source in ("run", "lines.safetensors"):
        with pytest.raises(ConfigError, match="--trust lines"):
            build_service(Serving((source,)))
        (model,) = build_service(Serving((source,), trust=("lines",))).models.values()
        support = metadist.Examples(x, 2 * x)
        phi = model.learner.adapt(model.state, support)
        assert torch.equal(model.learner.predict(model.state, phi, x, support), expected)
    again = cli("train", "run/config.yaml", "--run-dir", "run", "--resume", "--json", "--trust", "lines")
    assert json.loads(again.splitlines()[-1])["meta_step"] == 4


def test_the_variable_allows_modules_of_a_project(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("METADIST_TRUST", "others lines")
    cli("evaluate", "run", "--tasks", "4")


def test_a_program_is_looked_for_in_the_working_directory(home: Path) -> None:
    Path("lines.py").unlink()
    assert "modules are looked for in the working directory" in cli("evaluate", "run", "--trust", "lines", code=2)


@pytest.mark.parametrize(
    ("name", "remedy"),
    [
        (
            "__main__:Lines",
            "'__main__' can't be imported: it was a notebook, stdin or a file whose name is no module's",
        ),
        ("lines:Outer.Lines", "defined inside a function or a class; expected a name at the top level"),
        ("lines:make.<locals>.Lines", "defined inside a function or a class; expected a name at the top level"),
        ("lines:<lambda>", "'lines:<lambda>' can't be imported: it is a lambda"),
    ],
)
def test_what_no_other_process_can_import_is_refused_with_the_remedy(home: Path, name: str, remedy: str) -> None:
    config = Path("run/config.yaml")
    config.write_text(config.read_text().replace("lines:Lines", name))
    (line,) = cli("evaluate", "run", "--trust", "lines", code=2).splitlines()
    assert remedy in line and f"'{name}'" in line


class Local:
    """A class of this module."""

    class Inner:
        """A class inside."""


@pytest.mark.parametrize(
    ("spec", "file", "expected"),
    [
        (None, "{home}/lines.py", "lines"),  # python lines.py
        ("package.lines", "{home}/package/lines.py", "package.lines"),  # python -m package.lines
        (None, None, "__main__"),  # a notebook, python -c
        (None, "<stdin>", "__main__"),
        (None, "{home}/my-lines.py", "__main__"),  # no name of a module
        (None, "{home}/elsewhere/lines.py", "__main__"),  # another lines.py is found first
    ],
)
def test_parts_of_a_program_have_the_name_of_its_module(home: Path, monkeypatch: Any, spec, file, expected) -> None:
    main = types.ModuleType("__main__")
    main.__spec__ = None if spec is None else importlib.machinery.ModuleSpec(spec, None)
    if file is not None:
        main.__file__ = file.replace("{home}", str(home))
    monkeypatch.syspath_prepend(str(home))
    monkeypatch.setitem(sys.modules, "__main__", main)
    (made := type("Lines", (), {})).__module__ = "__main__"
    assert path_of(made) == "__main__:Lines"  # another program's class
    main.Lines = made
    assert path_of(made) == f"{expected}:Lines"
    assert path_of(Local.Inner) == f"{__name__}:Local.Inner"
