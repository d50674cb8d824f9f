"""The rooms: the contracts of import-linter hold, and a commit that breaks one of them fails."""

from __future__ import annotations

import ast
import os
import shutil
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "metadist"
#: rooms that need little → the libraries that they may import
LIBRARIES = {
    "core": {"torch"},
    "engine": {"torch"},
    "learners": {"torch"},
    "algorithms": {"torch"},
    "models": {"torch"},
    "rl": {"torch"},
    "oracles": {"torch", "numpy", "sklearn"},
    "environments": {"torch", "numpy", "gymnasium", "mujoco", "metaworld"},
    "wire": {"torch", "pyarrow", "xxhash"},
}
FILES = sorted(path.relative_to(PACKAGE).as_posix() for path in PACKAGE.rglob("*.py"))


def lint(folder):
    """``lint-imports`` in ``folder``: its exit code and what it prints."""
    done = subprocess.run(
        [Path(sys.executable).with_name("lint-imports"), "--no-cache"],
        cwd=folder,
        env={**os.environ, "PYTHONPATH": os.pathsep.join([str(folder), str(ROOT / "tests")]), "COLUMNS": "200"},
        capture_output=True,
        text=True,
        timeout=300,
    )
    return done.returncode, done.stdout + done.stderr


@pytest.fixture
def commit(tmp_path):
    """``commit(file, line)``: the outcome of the contracts once ``line`` is at the end of a file of the package."""
    shutil.copytree(PACKAGE, tmp_path / "metadist", ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copy(ROOT / "pyproject.toml", tmp_path)

    def add(file, line):
        with open(tmp_path / "metadist" / file, "a") as source:
            source.write(f"\n{line}\n")
        return lint(tmp_path)

    return add


@pytest.mark.lane("services")
def test_the_contracts_hold():
    code, printed = lint(ROOT)
    assert code == 0, printed


@pytest.mark.lane("services")
def test_an_import_upwards_fails(commit):
    code, printed = commit("core/state.py", "import metadist.training.loop")
    assert code == 1 and "metadist.core.state -> metadist.training.loop" in printed, printed


@pytest.mark.lane("services")
def test_a_circle_inside_a_room_fails(commit):
    code, printed = commit("core/parameters.py", "def late():\n    import metadist.core.state")
    assert code == 1 and "No cycles are allowed in metadist.core" in printed, printed


@pytest.mark.lane("services")
def test_an_import_by_string_fails(commit):
    code, printed = commit("wire/frame.py", 'LATE = "metadist.training.loop:meta_train"')
    assert code == 1 and "metadist.wire.frame -> metadist.training.loop:meta_train" in printed, printed


def imports(file):
    """Dotted names of all modules that ``file`` imports, inside functions too."""
    for node in ast.walk(ast.parse((PACKAGE / file).read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{file} imports relatively"
            yield node.module


@pytest.mark.parametrize("file", [f for f in FILES if f.partition("/")[0] in LIBRARIES])
def test_rooms_that_need_little(file):
    known = LIBRARIES[file.partition("/")[0]] | set(sys.stdlib_module_names) | {"metadist", "typing_extensions"}
    assert {name.split(".")[0] for name in imports(file)} - known == set()


def test_no_private_name_of_another_room():
    found = []
    for file in FILES:
        for node in ast.walk(ast.parse((PACKAGE / file).read_text(encoding="utf-8"))):
            if isinstance(node, ast.ImportFrom) and node.module and node.module.startswith("metadist."):
                room = node.module.split(".")[1]
                private = [alias.name for alias in node.names if alias.name.startswith("_")]
                found += [f"{file}: {node.module}.{name}" for name in private if room != file.partition("/")[0]]
    assert found == []


def test_no_public_class_name_twice():
    places = {}
    for file in (f for f in FILES if not f.endswith("_pb2_grpc.py")):
        for node in ast.parse((PACKAGE / file).read_text(encoding="utf-8")).body:
            if isinstance(node, ast.ClassDef) and not node.name.startswith("_"):
                places.setdefault(node.name, []).append(file)
    assert {name: files for name, files in places.items() if len(files) > 1} == {}


def test_files_fit_in_the_head():
    """No file over 450 lines, and nothing loose at the top of the package."""
    long = {f: n for f in FILES if (n := len((PACKAGE / f).read_text().splitlines())) > 450 and "_pb2" not in f}
    assert long == {}
    assert [f for f in FILES if "/" not in f] == ["__init__.py", "__main__.py", "api.py"]


def test_few_parameters():
    """At most 6 outside the command line, where every option is one; ``conv2d`` has those of torch.nn.functional."""
    many = []
    for file in (f for f in FILES if not f.startswith("cli/") and "_pb2" not in f):
        for node in ast.walk(ast.parse((PACKAGE / file).read_text(encoding="utf-8"))):
            if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
                names = [a.arg for a in (*node.args.posonlyargs, *node.args.args, *node.args.kwonlyargs)]
                if len([n for n in names if n not in ("self", "cls")]) > 6:
                    many.append(f"{file}:{node.name}")
    assert [f for f in many if not f.startswith("engine/convolution.py")] == []


def python(code, *arguments, **environment):
    return subprocess.run(
        [sys.executable, "-c", textwrap.dedent(code), *arguments],
        capture_output=True,
        text=True,
        timeout=400,
        env={**os.environ, **environment},
    )


@pytest.mark.lane("services")
def test_importing_metadist_does_nothing():
    done = python(
        """
        import sys, threading, logging
        handlers = logging.root.handlers[:]
        import metadist
        assert not {"torch", "ray", "mlflow", "pyarrow", "grpc", "numpy"} & sys.modules.keys()
        assert threading.active_count() == 1 and logging.root.handlers == handlers
        assert set(metadist.__all__) <= set(dir(metadist))
        """
    )
    assert done.returncode == 0, done.stderr


@pytest.mark.lane("services")
def test_every_public_name_is_there():
    done = python("import metadist\nfor name in metadist.__all__: getattr(metadist, name)")
    assert done.returncode == 0, done.stderr


@pytest.mark.lane("services")
def test_old_names_of_modules_import_the_same_modules():
    done = python(
        """
        import metadist.envs.bandit, metadist.environments.bandit, metadist.mlflow_model, metadist.serving.mlflow_model
        assert metadist.envs.bandit is metadist.environments.bandit
        assert metadist.mlflow_model is metadist.serving.mlflow_model
        assert metadist.environments.__spec__.name == "metadist.environments"
        from metadist.bench.random_images import RandomImages
        """
    )
    assert done.returncode == 0, done.stderr


@pytest.mark.lane("services")
def test_training_in_this_process_needs_neither_ray_nor_mlflow(tmp_path):
    done = python(
        """
        import sys

        class Blocked:
            def find_spec(self, name, path=None, target=None):
                if name.partition(".")[0] in ("ray", "mlflow", "grpc"):
                    raise ModuleNotFoundError(f"{name} is blocked", name=name)

        sys.meta_path.insert(0, Blocked())
        from metadist.cli.app import main
        sys.argv = ["metadist", "train", *sys.argv[1:]]
        main()
        """,
        "sinusoid_maml",
        "--workers",
        "0",
        "--run-dir",
        str(tmp_path / "run"),
        "--json",
        "tracking.uri=none",
        "outer.meta_steps=2",
        "evaluate.tasks=4",
        "evaluate.test_tasks=4",
        PYTHONPATH=str(PACKAGE.parent),
    )
    assert done.returncode == 0, done.stderr
    assert '"meta_step": 2' in done.stdout.splitlines()[-1]
