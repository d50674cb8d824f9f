"""The rooms, read from the imports: layers point down only, and each heavy library has one importer."""

from __future__ import annotations

import ast
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[1] / "metadist"

#: room → rooms beneath it that it may import. What lies in the package itself (config, cli, …) is on top of all, and so are:
ON_TOP = {"bench", "commands"}
BENEATH = {
    "core": (),
    "algorithms": ("core",),
    "models": ("core",),
    "tasks": ("core", "wire"),
    "envs": ("core",),
    "oracles": ("core", "envs"),
    "wire": ("core",),
    "runtime": ("core", "wire"),
    "tracking": ("core",),
    "control": ("core", "wire"),
}
#: rooms that need little → the libraries that they may import
LIBRARIES = {
    "core": {"torch"},
    "algorithms": {"torch"},
    "models": {"torch"},
    "envs": {"torch", "numpy", "gymnasium", "mujoco", "metaworld"},
    "oracles": {"torch"},
    "wire": {"torch", "pyarrow", "xxhash"},
}
#: library → the only places that may import it
IMPORTERS = {
    "mlflow": ("tracking/",),
    "grpc": ("control/",),
    "starlette": ("control/adapt_http.py", "control/http_guard.py"),
    "uvicorn": ("control/adapt_http.py", "control/http_guard.py"),
    "ray": (
        "runtime/ray_cluster.py",
        "runtime/ray_executor.py",
        "runtime/ray_jobs.py",
        "runtime/ray_metrics.py",
        "runtime/ray_serve.py",
    ),
    "typer": ("cli.py", "terminal.py", "bench/commands.py", "commands/"),
    "rich": ("display.py",),
    "higher": ("bench/",),
    "torchopt": ("bench/",),
    "jax": ("bench/",),
    "pydantic": ("schema.py",),
    "matplotlib": ("tracking/", "pictures.py"),
}
FILES = sorted(path.relative_to(PACKAGE).as_posix() for path in PACKAGE.rglob("*.py"))


def imports(file, top_level_only=False):
    """Dotted names of all modules that ``file`` imports, inside functions too."""
    tree = ast.parse((PACKAGE / file).read_text(encoding="utf-8"))
    for node in tree.body if top_level_only else ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{file} imports relatively"
            yield node.module
            if node.module == "metadist":
                yield from (f"metadist.{alias.name}" for alias in node.names)


def room(file):
    return file.partition("/")[0] if "/" in file else None


def test_every_room_has_its_place():
    assert {room(f) for f in FILES} - {None} <= BENEATH.keys() | ON_TOP


@pytest.mark.parametrize("file", [f for f in FILES if room(f) in BENEATH])
def test_layers_point_down(file):
    allowed = {room(file), *BENEATH[room(file)]}
    ours = [name for name in imports(file) if name.split(".")[0] == "metadist" and name != "metadist"]
    assert [name for name in ours if name.split(".")[1] not in allowed and name != "metadist.__version__"] == []


@pytest.mark.parametrize("file", [f for f in FILES if room(f) in LIBRARIES])
def test_rooms_that_need_little(file):
    known = LIBRARIES[room(file)] | set(sys.stdlib_module_names) | {"metadist"}
    assert {name.split(".")[0] for name in imports(file)} - known == set()


@pytest.mark.parametrize("library", IMPORTERS)
def test_heavy_libraries_have_one_importer(library):
    users = [f for f in FILES if library in {name.split(".")[0] for name in imports(f)}]
    assert [f for f in users if not f.startswith(IMPORTERS[library])] == []


def test_the_loop_imports_no_executor():
    """Nor does the scheduler: they can't tell executors apart."""
    for file in ("runtime/train.py", "runtime/scheduler.py", "runtime/evaluation.py"):
        assert not [name for name in imports(file) if "executor" in name and not name.startswith("metadist.core")]


def python(code, *arguments, **environment):
    import os

    return subprocess.run(
        [sys.executable, "-c", textwrap.dedent(code), *arguments],
        capture_output=True,
        text=True,
        timeout=400,
        env={**os.environ, **environment},
    )


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


def test_every_public_name_is_there():
    done = python("import metadist\nfor name in metadist.__all__: getattr(metadist, name)")
    assert done.returncode == 0, done.stderr


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
