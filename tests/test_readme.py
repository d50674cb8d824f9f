"""Run the commands and programs of README.md, CONTRIBUTING.md and docs/ as written, in shorter runs; check their names.

Lines of ``console`` blocks that start with ``$`` are commands. The commands of a section run in one folder, in order.
"""

from __future__ import annotations

import functools
import os
import re
import runpy
import shlex
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import typer.main
import yaml
from typer.testing import CliRunner

import metadist
from metadist.cli.app import app

ROOT = Path(__file__).parent.parent
#: pages with commands for users; the recipes of docs/extend.md have a test of their own
PAGES = ["README.md", "CONTRIBUTING.md", *(f"docs/{p.name}" for p in sorted((ROOT / "docs").glob("*.md")))]
PAGES = [page for page in PAGES if page != "docs/extend.md"]
LINKED = [*PAGES, "CHANGELOG.md", *(f"docs/decisions/{p.name}" for p in sorted((ROOT / "docs/decisions").glob("*.md")))]
#: pages whose commands run in `make test-long` only; tests/experiment/test_verify.py runs the same with a tiny config
LONG = {"CONTRIBUTING.md", "docs/verify.md"}
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
    ".venv/",
    "metadist ui",
    "metadist worker",
    "metadist control",
    "metadist submit",
    "metadist jobs",
    "metadist serve",
    "metadist predict",
)
# The pages ------------------------------------------------------------------------------------------------------------


def read(page: str) -> str:
    return (ROOT / page).read_text(encoding="utf-8")


def lines(page: str) -> Iterator[tuple[str, str, str]]:
    """(heading, language of the fence or "" outside, line) of every line; a command's comment is cut off."""
    heading, language = "", ""
    for line in read(page).splitlines():
        if fence := re.match(r"\s*```(\w*)", line):
            language = "" if language else fence[1] or "text"
        elif not language and (found := re.match(r"#+ (.*)", line)):
            heading = found[1]
            yield heading, "heading", line
        else:
            yield heading, language, line


def sections(page: str) -> dict[str, list[str]]:
    """Heading → its commands."""
    found: dict[str, list[str]] = {}
    for heading, language, line in lines(page):
        if language == "console" and line.lstrip().startswith("$ "):
            command = line.lstrip().removeprefix("$ ").partition("  #")[0].strip()
            found.setdefault(heading, []).append(command)
    return found


def part_of(some: list[str], others: list[str]) -> bool:
    """Whether ``some`` are among ``others``, in the same order."""
    rest = iter(others)
    return all(command in rest for command in some)


def cases() -> list[tuple[str, str, list[str]]]:
    """(page, heading, commands) to run here. A section whose commands are a part of another section's runs there."""
    every = [
        (page, heading, [c for c in listed if not c.startswith(ELSEWHERE)])
        for page in PAGES
        for heading, listed in sections(page).items()
    ]
    every = [case for case in every if case[2]]

    def elsewhere(i: int) -> bool:
        mine = every[i][2]
        return any(
            part_of(mine, others) and (mine != others or j < i) for j, (*_, others) in enumerate(every) if j != i
        )

    return [case for i, case in enumerate(every) if not elsewhere(i)]


def programs() -> list[tuple[str, str]]:
    """(file name, text) of every Python block that begins with its file name."""
    return [found for page in PAGES for found in re.findall(r"```python\n# (\w+\.py)\n(.*?)```", read(page), re.DOTALL)]


def configs() -> list[tuple[str, str]]:
    """(name, text) of every YAML block."""
    texts = [text for page in PAGES for text in re.findall(r"```yaml\n(.*?)```", read(page), re.DOTALL)]
    return [(yaml.safe_load(text)["name"], text) for text in texts]


# Commands, programs and configs are run -------------------------------------------------------------------------------


def shortened(command: str) -> list[str]:
    words = shlex.split(command)
    if words[0] == "python":
        return words
    trials = len(words) > 2 and ("rl2" in words[2] or "promp" in words[2])
    if words[1] == "train":
        few = ["outer.meta_batch_size=8", "outer.shard_size=2"] if trials else []
        return words[:3] + SHORT + few + ["0,1" if w == "0,1,2" else w for w in words[3:]]
    if words[1] == "verify":
        less = {"20": "4", "0,1,2,4": "0,1", "0,1,2": "0,1", "3": "1", "5": "2"}
        words = [less.get(w, w) for w in words]
        return words[:3] + [f"outer.meta_batch_size={8 if trials else 4}", "outer.shard_size=2"] + words[3:]
    if words[1] == "plan":
        smaller = ["model.filters=8"] if "omniglot" in words[2] else []
        return [*words, *smaller, "engine.compile=never", "outer.shard_size=2", "algorithm.inner_steps=2"]
    if words[1] == "bench":
        return [*words, "--seconds", "0.1", "--eager"]  # compiling has tests of its own
    if words[1] in ("evaluate", "oracle"):
        return [w if not w.isdigit() or int(w) < 100 else "8" for w in words]
    return words


@pytest.fixture
def home(tmp_path: Path, empty_store: Callable[[Path], None], monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with an MLflow store and with the programs and configs of all pages."""
    monkeypatch.delenv("METADIST_RUNS", raising=False)
    monkeypatch.chdir(tmp_path)
    empty_store(tmp_path / "runs/mlflow.db")
    for name, text in programs():
        (tmp_path / name).write_text(text)
        if "metadist" not in text and name.removesuffix(".py") in dict(configs()):  # it writes the table of the config
            runpy.run_path(name)
    for name, text in configs():
        (tmp_path / f"{name}.yaml").write_text(text)
    return tmp_path


def run(words: list[str]) -> None:
    """Run ``metadist …`` of this source tree; nothing but exit code 0 and no traceback will do.

    ``metadist`` runs in this process, because an interpreter takes seconds to start, with the Ray cluster of all tests.
    ``python PROGRAM`` runs in another one.
    """
    if words[0] == "python":
        subprocess.run([sys.executable, *words[1:]], check=True, timeout=300)
        return
    assert words[0] == "metadist", words
    handlers = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    done = CliRunner().invoke(app, words[1:], prog_name="metadist")
    for number, handler in handlers.items():
        signal.signal(number, handler)
    assert done.exit_code == 0, f"{shlex.join(words)}\n{done.output}\n{done.exception!r}"
    assert "Traceback" not in done.output, f"{shlex.join(words)}\n{done.output}"


def marks(page: str, listed: list[str]) -> list[pytest.MarkDecorator]:
    ray = any(re.search(r"^metadist (?!render).*--workers (?!0( |$))", command) for command in listed)
    # Ray's tests of the workers take one process for as long as all other tests take another.
    group = [pytest.mark.xdist_group("pages on Ray")] if ray else []
    return [*group, pytest.mark.lane("ray" if ray else "services"), *([pytest.mark.long] if page in LONG else [])]


@pytest.mark.parametrize(
    "listed",
    [pytest.param(each, id=f"{page}-{heading}", marks=marks(page, each)) for page, heading, each in cases()],
)
def test_commands(home: Path, listed: list[str], request: pytest.FixtureRequest) -> None:
    if request.node.get_closest_marker("ray") is not None:
        request.getfixturevalue("cluster")
    for command in listed:
        if "omniglot" in command and "METADIST_DATA" not in os.environ:
            continue
        run(shortened(command))


@pytest.mark.xdist_group("pages on Ray")
@pytest.mark.lane("ray")
def test_programs(home: Path, cluster: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RAY_ADDRESS", cluster.get_runtime_context().gcs_address)
    assert programs()
    for name, text in programs():
        assert len(text.strip().splitlines()) <= 26
        done = subprocess.run([sys.executable, name], cwd=home, capture_output=True, text=True, timeout=300)
        assert done.returncode == 0, done.stderr


@pytest.mark.lane("services")
def test_configs(home: Path) -> None:
    run(["python", "draw.py"])
    for name, _ in configs():
        run(["metadist", "train", f"{name}.yaml", *SHORT, "tracking.uri=none", "--workers", "0"])


# Names in the pages ---------------------------------------------------------------------------------------------------


def slug(heading: str) -> str:
    """The anchor that GitHub gives a heading."""
    return re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-")


def test_links() -> None:
    missing = []
    for page in LINKED:
        for target in re.findall(r"\]\(([^)]+)\)", read(page)):
            path, _, anchor = target.partition("#")
            there = (ROOT / page).parent / path if path else ROOT / page
            if target.startswith("http"):
                continue
            if not there.exists():
                missing.append(f"{page}: {target}")
            elif anchor:
                headings = [h for h, kind, _ in lines(str(there.resolve().relative_to(ROOT))) if kind == "heading"]
                missing += [f"{page}: {target}"] if anchor not in map(slug, headings) else []
    assert not missing


#: a measured number: with an error, a unit of time, memory or speed, or as a multiple
FIGURE = re.compile(r"± ?[.\d]|[.\d] ?(ms|µs|MiB|GFLOP/s|tasks/s|steps/s|minutes|core-minutes|×)(?![\w×])")
COMMAND = re.compile(r"`(metadist|make) [^`]+`")


# docs/config.md holds docstrings, whose numbers are settings.
@pytest.mark.parametrize("page", [page for page in PAGES if page != "docs/config.md"])
def test_every_figure_names_its_command(page: str) -> None:
    """Each section with a measured number has the command that prints it, in its text, heading or ``console`` block."""
    text: dict[str, list[str]] = {}
    for heading, language, line in lines(page):
        if language != "text":
            text.setdefault(heading, []).append(line)
    measured = {h: found for h, each in text.items() if (found := [line for line in each if FIGURE.search(line)])}
    commands = sections(page)
    assert {h: f for h, f in measured.items() if h not in commands and not COMMAND.search(" ".join(text[h]))} == {}


@functools.cache
def command_line() -> Any:
    return typer.main.get_command(app)


@pytest.mark.parametrize("page", PAGES)
def test_every_command_and_option_exists(page: str) -> None:
    """In console blocks and in quoted commands."""
    quoted = [" ".join(c.split()) for c in re.findall(r"`(metadist [^`]+)`", read(page))]
    makefile = read("Makefile")
    for command in [c for listed in sections(page).values() for c in listed] + quoted:
        words = [w for w in shlex.split(command) if w != "…"]
        if words[0] == "make" and len(words) > 1:
            assert re.search(rf"^{words[1]}:", makefile, re.MULTILINE), command
        if words[0] != "metadist" or words[1] == "COMMAND":
            continue
        click = command_line()
        options: set[str] = {"--help"}
        for word in words[1:3]:
            if word in getattr(click, "commands", {}):
                click = click.commands[word]
                options |= {o for p in click.params for o in p.opts}
        assert click.name == words[1] or click.name == words[2], command
        given = {w.partition("=")[0] for w in words if re.match(r"--?[a-z]", w)}
        assert given <= options, f"{command}: {given - options}"


@pytest.mark.parametrize("page", PAGES)
def test_every_file_and_name_exists(page: str) -> None:
    """``room/file.py`` and ``room/file.py: name`` in backticks."""
    missing = []
    for path, name in re.findall(r"`((?:\w+/)+\w+\.py)(?:: (\w+))?", read(page)):
        texts = [(root / path).read_text() for root in (ROOT / "metadist", ROOT) if (root / path).is_file()]
        if not texts or (name and not re.search(rf"^ *(?:def|class) {name}\b", texts[0], re.MULTILINE)):
            missing.append(f"{path}: {name}")
    assert not missing


def test_every_decision_is_in_the_index() -> None:
    index = read("docs/decisions/README.md")
    files = [p.name for p in (ROOT / "docs/decisions").glob("*.md") if p.name != "README.md"]
    assert [name for name in files if f"({name})" not in index] == []


def test_readme_is_short() -> None:
    assert len(read("README.md").splitlines()) <= 200


def test_citation_and_changelog_have_this_version() -> None:
    about = yaml.safe_load(read("CITATION.cff"))
    assert {"cff-version", "message", "title", "authors", "license"} <= about.keys()
    assert about["version"] == metadist.__version__
    assert f"## {metadist.__version__} " in read("CHANGELOG.md")
