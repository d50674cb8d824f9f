"""Every command and program of the README, run as written but for shortened overrides."""

from __future__ import annotations

import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from metadist.tracking.mlflow_uri import prepare_sqlite

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")
SHORT = [
    "outer.meta_steps=4",
    "evaluate.every=2",
    "evaluate.tasks=8",
    "evaluate.test_tasks=8",
    "checkpoint.every=2",
    "tracking.log_every=1",
]
#: run by .ci/run and by the tests of clusters, of live runs and of servers
ELSEWHERE = (
    "make",
    "git",
    "cd",
    "pip",
    "export",
    "curl",
    "cluster/",
    "metadist ui",
    "metadist worker",
    "metadist control",
    "metadist submit",
    "metadist jobs",
    "metadist serve",
    "metadist predict",
)


def blocks(language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", README, re.DOTALL)


def commands(text: str = README) -> list[str]:
    found = re.findall(r"```console\n(.*?)```", text, re.DOTALL)
    lines = [line.removeprefix("$ ") for block in found for line in block.splitlines() if line.startswith("$ ")]
    return [line.partition("  #")[0].strip() for line in lines]


def sections() -> dict[str, list[str]]:
    """Heading → the commands under it that are run here."""
    parts = re.split(r"^##+ (.*)$", README, flags=re.MULTILINE)
    found = {
        title: [c for c in commands(text) if not c.startswith(ELSEWHERE)]
        for title, text in zip(parts[1::2], parts[2::2])
    }
    return {title: listed for title, listed in found.items() if listed}


def shortened(command: str) -> list[str]:
    words = shlex.split(command)
    if words[1] == "train":
        few = ["outer.meta_batch_size=8", "outer.shard_size=2"] if "rl2" in words[2] else []
        return words[:3] + SHORT + few + words[3:]
    if words[1] == "verify":
        words = [w if w not in ("20", "0,1,2,4", "3") else {"20": "4", "0,1,2,4": "0,1", "3": "1"}[w] for w in words]
        return words[:3] + ["outer.meta_batch_size=4", "outer.shard_size=2"] + words[3:]
    if words[1] == "bench":
        return [*words, "--seconds", "0.1", "--eager"]  # compiling has tests of its own
    if words[1] in ("evaluate", "oracle"):
        return [w if not w.isdigit() or int(w) < 100 else "8" for w in words]
    return words


@pytest.fixture(scope="session")
def store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An empty MLflow store: to make one takes longer than most commands, and has tests of its own."""
    root = tmp_path_factory.mktemp("store")
    prepare_sqlite(f"sqlite:///{root}/mlflow.db", root)
    return root / "mlflow.db"


@pytest.fixture
def home(tmp_path: Path, store: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """One folder for the commands of a section, since later ones use what earlier ones made."""
    monkeypatch.delenv("METADIST_RUNS", raising=False)
    folder = tmp_path
    (folder / "runs").mkdir()
    shutil.copy(store, folder / "runs")
    for name, text in re.findall(r"```python\n# (\w+\.py)\n(.*?)```", README, re.DOTALL):
        (folder / name).write_text(text)
    for text in blocks("yaml"):
        (folder / f"{re.search(r'^name: (.*)$', text, re.MULTILINE)[1]}.yaml").write_text(text)
    return folder


@pytest.mark.parametrize("section", sections())
def test_commands(home: Path, section: str) -> None:
    environment = {**os.environ, "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"}
    for command in sections()[section]:
        if "omniglot" in command and "METADIST_DATA" not in environment:
            continue
        words = shortened(command)
        assignments = [w for w in words if re.fullmatch(r"[A-Z_]+=\S*", w)]
        done = subprocess.run(
            [w for w in words if w not in assignments],
            cwd=home,
            env=environment,
            capture_output=True,
            text=True,
            timeout=300,
        )
        assert done.returncode == 0, f"{command}\n{done.stdout}\n{done.stderr}"
        assert "Traceback" not in done.stderr, f"{command}\n{done.stderr}"


def test_programs(home: Path) -> None:
    programs = re.findall(r"```python\n# (\w+\.py)\n(.*?)```", README, re.DOTALL)
    assert programs
    for name, text in programs:
        assert len(text.strip().splitlines()) <= 25
        done = subprocess.run([sys.executable, name], cwd=home, capture_output=True, text=True, timeout=300)
        assert done.returncode == 0, done.stderr


def test_configs(home: Path) -> None:
    for config in home.glob("*.yaml"):
        command = [
            str(Path(sys.executable).parent / "metadist"),
            "train",
            config.name,
            *SHORT,
            "tracking.uri=none",
            "--workers",
            "0",
        ]
        done = subprocess.run(command, cwd=home, capture_output=True, text=True, timeout=300)
        assert done.returncode == 0, done.stderr


def test_what_the_readme_names_exists() -> None:
    for target in re.findall(r"\]\(([^)#]+)\)", README):
        assert target.startswith("http") or (ROOT / target).exists(), target
    makefile = (ROOT / "Makefile").read_text()
    for command in commands():
        if command.startswith("make") and len(command.split()) > 1:
            assert re.search(rf"^{command.split()[1]}:", makefile, re.MULTILINE), command
