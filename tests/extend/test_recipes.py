"""Every recipe of docs/extend.md as a reader follows it: write its files, and run its commands in their folder."""

from __future__ import annotations

import os
import re
import runpy
import shlex
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest
import tiny

pytestmark = pytest.mark.lane("services")

ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "docs" / "extend.md").read_text(encoding="utf-8")

#: heading → its text
SECTIONS = dict(zip(*[iter(re.split(r"^## (.*)$", PAGE, flags=re.MULTILINE)[1:])] * 2))
INSTALLED = ("A tracker", "A package of your own")


def files(section: str) -> dict[str, str]:
    """Name → text of the files of a recipe: blocks whose first line is a comment with the name."""
    found = re.findall(r"```(?:python|yaml|toml)\n# (\S+)\n(.*?)```", SECTIONS[section], re.DOTALL)
    return dict(found)


def commands(section: str) -> list[str]:
    blocks = re.findall(r"```console\n(.*?)```", SECTIONS[section], re.DOTALL)
    return [line.removeprefix("$ ") for block in blocks for line in block.splitlines()]


def write(section: str, folder: Path) -> None:
    for name, text in files(section).items():
        (folder / name).write_text(text, encoding="utf-8")


def in_this_process(command: str, cli) -> str:
    """Run ``command`` and return its stdout; a new process would import PyTorch again."""
    first, *arguments = shlex.split(command)
    if first == "metadist":
        result = cli(*arguments)
        assert result.exit_code == 0, f"{command}\n{result.stdout}\n{result.stderr}\n{result.exception!r}"
        return result.stdout
    if arguments[:2] == ["-m", "pytest"]:
        tests = {n: f for n, f in runpy.run_path(arguments[2]).items() if n.startswith("test_")}
        assert tests
        for test in tests.values():
            test()
        return ""
    done = subprocess.run([sys.executable, *arguments], capture_output=True, text=True, timeout=300, env=environment())
    assert done.returncode == 0, f"{command}\n{done.stdout}\n{done.stderr}"
    return done.stdout


def environment(**more: str) -> dict[str, str]:
    path = os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])
    return {**tiny.environment(Path.cwd()), "PYTHONPATH": path, **more}


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """An empty working directory, whose modules are forgotten at the end."""
    before = set(sys.modules)
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("METADIST_RUNS", str(tmp_path / "runs"))
    monkeypatch.setenv("METADIST_CACHE", str(tmp_path / "cache"))
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    yield tmp_path
    for name in set(sys.modules) - before:
        if str(getattr(sys.modules[name], "__file__", "")).startswith(str(tmp_path)):
            del sys.modules[name]


def test_the_page_has_a_recipe_for_each_kind():
    kinds = ("algorithm", "task family", "meta-environment", "model", "tracker", "kind of worker", "command")
    assert list(SECTIONS) == [*(f"A{'n' if kind[0] == 'a' else ''} {kind}" for kind in kinds), INSTALLED[1]]
    for section in SECTIONS:
        assert files(section)
        assert commands(section)


@pytest.mark.parametrize("section", [s for s in SECTIONS if s not in INSTALLED])
def test_a_recipe(section, folder, cli):
    write(section, folder)
    printed = [in_this_process(command, cli) for command in commands(section)]
    trained = sum(command.startswith("metadist train") for command in commands(section))
    assert len(list(Path().glob("**/result.json"))) == trained
    if section == "A command":
        assert re.search(r"^0\.weight|^\d+\.weight  \d", printed[1], re.MULTILINE), printed[1]
        assert "Print the norm of every parameter" in printed[2]


def pip(*arguments: str, python: str = sys.executable) -> None:
    command = [python, "-m", "pip", "install", "--quiet", "--disable-pip-version-check", "--no-index", "--no-deps"]
    done = subprocess.run(
        [*command, "--no-build-isolation", *arguments], capture_output=True, text=True, timeout=300, env=environment()
    )
    assert done.returncode == 0, done.stderr


def check_output(section: str, out: dict[str, str]) -> None:
    """Check the stdout of the commands of a recipe of a package."""
    if section == "A tracker":
        assert (
            "Points as rows step, name, value of a CSV file: csv:///PATH.csv (csv-tracker 1.0)" in out["list trackers"]
        )
        rows = Path("points.csv").read_text().splitlines()
        assert any(re.fullmatch(r"2,meta/loss,\d.*", row) for row in rows), rows[:5]
    else:
        assert re.search(r"^careful +MAML at a low rate .* \(metadist-waves 0\.3\)$", out["list algorithms"], re.M)
        assert re.search(r"^long_waves +Sinusoids on a wide range\. \(metadist-waves 0\.3\)$", out["list tasks"], re.M)
        assert re.search(r"^console +Points on stderr: console:// \(metadist-waves 0\.3\)$", out["list trackers"], re.M)


@pytest.mark.skipif(find_spec("setuptools") is None, reason="needs setuptools to build a package")
@pytest.mark.parametrize("section", INSTALLED)
def test_a_package(section, folder, cli, monkeypatch):
    """Built and installed by pip into a folder of its own, which is on the import path."""
    write(section, folder)
    first, *rest = commands(section)
    assert first == "pip install ."
    pip("--target", "site", ".")
    for name in files(section):
        if name.endswith(".py"):
            (folder / name).unlink()  # the installed copy alone is left
    monkeypatch.syspath_prepend(str(folder / "site"))
    out = {c.removeprefix("metadist ").partition(" sinusoid")[0]: in_this_process(c, cli) for c in rest}
    check_output(section, out)
    assert len(list(Path("runs").glob("*/result.json"))) == 1


@pytest.mark.long
@pytest.mark.skipif(find_spec("setuptools") is None, reason="needs setuptools to build a package")
@pytest.mark.parametrize("section", INSTALLED)
def test_a_package_in_an_environment_of_its_own(section, folder):
    """``pip install .`` in a fresh virtual environment that sees this one's packages; then its ``metadist``."""
    write(section, folder)
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", "fresh"], check=True, timeout=300)
    python = str(folder / "fresh" / "bin" / "python")
    own = subprocess.run(
        [python, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))"], capture_output=True, text=True
    ).stdout.strip()
    here = [p for p in sys.path if p.endswith(("site-packages", "dist-packages"))]
    Path(own, "here.pth").write_text("\n".join([str(ROOT), *here]))
    out = {}
    for command in commands(section):
        if command == "pip install .":
            pip(".", python=python)
            continue
        arguments = ["-m", *shlex.split(command)]
        done = subprocess.run(
            [python, *arguments], capture_output=True, text=True, timeout=300, env=environment(PYTHONPATH="")
        )
        assert done.returncode == 0, done.stderr
        out[command.removeprefix("metadist ").partition(" sinusoid")[0]] = done.stdout
    check_output(section, out)
