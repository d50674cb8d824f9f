"""Somebody else's config, run, export and worker's driver run no code; the user's own parts are unhindered."""

from __future__ import annotations

import ast
import copy
import json
import pickle
import re
import shutil
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import tiny
import torch
import yaml
from typer.testing import CliRunner

import metadist
from metadist.cli.app import app
from metadist.config.build import build
from metadist.config.trust import check_trust, import_paths
from metadist.core.errors import ConfigError, MetadistError
from metadist.core.imports import author
from metadist.experiment.remote import build as build_for_driver
from metadist.serving.load import Serving, build_service
from metadist.serving.mlflow_model import _load_pyfunc

pytestmark = pytest.mark.lane("services")

ROOT = Path(__file__).parents[2]
#: a module of the working directory, with its own parts and traps; {mark} is a file that no test may find
MODULE = """
import functools, os
from dataclasses import dataclass
from os import system
from pathlib import Path

import torch
from metadist import Examples, Task, TaskFamily

class Lines(TaskFamily):
    input_shape = (1,)

    def sample_task(self, key, split):
        x = key.stream("x").normal(8, 1)
        return Task(Examples(x[:4], x[:4]), Examples(x[4:], x[4:]))

class Outer:
    class Inner(Lines):
        pass

class Acts:
    def __init__(self, **options):
        Path("{mark}").touch()

@dataclass
class ActsToo:
    rows: int = 3
    def __post_init__(self):
        Path("{mark}").touch()

def network(width=4):
    return torch.nn.Sequential(torch.nn.Linear(1, width), torch.nn.Tanh(), torch.nn.Linear(width, 1))

def absolute(prediction, target):
    return (prediction - target).abs().flatten(1).mean(1)

@functools.cache
def wrapped():
    return network()

narrow = functools.partial(network, 3)
getter = os.environ.get
"""
SIDE_EFFECT = 'from pathlib import Path\nPath("{mark}").touch()\n' + MODULE
COMMAND = {"name": "os:system", "command": "touch {mark}"}
#: fragments of a config that name code which is no part of an experiment: each is refused wherever it stands
ATTACKS: dict[str, dict[str, Any]] = {
    "a command": {"tasks": COMMAND},
    "a command as the model": {"model": COMMAND},
    "a command as the algorithm": {"algorithm": COMMAND},
    "a function of the standard library": {"tasks": {"name": "subprocess:getoutput", "cmd": "touch {mark}"}},
    "a built-in function": {"model": {"name": "builtins:exec", "object": "open('{mark}', 'w')"}},
    "an installed function": {"model": {"name": "torch.hub:load", "repo_or_dir": "{folder}", "model": "m"}},
    "functools.partial": {"tasks": {"name": "functools:partial", "func": "os.system"}},
    "a class whose constructor acts": {"model": {"name": "subprocess:Popen", "args": ["touch", "{mark}"]}},
    "an own class that is no task family": {"tasks": {"name": "{module}:Acts"}},
    "an own dataclass that is no algorithm": {"algorithm": {"name": "{module}:ActsToo"}},
    "an own class that is no model": {"model": {"name": "{module}:Acts"}},
    "a nested name": {"tasks": {"name": "{module}:Outer.Inner"}},
    "a nested name of the standard library": {"tasks": {"name": "os:path.join"}},
    "a function that the own module imported": {"tasks": {"name": "{module}:system", "command": "touch {mark}"}},
    "a method of the standard library": {"tasks": {"name": "{module}:getter", "key": "HOME"}},
    "a loss": {"loss": "os:system"},
    "a loss that the own module imported": {"loss": "{module}:system"},
    "a metric": {"metric": {"name": "os:system"}},
    "a task metric": {"task_metrics": ["os:system"]},
    "a metric that is a class": {"metric": "{module}:Acts"},
    "a program": {"tasks": {"name": "idlelib.__main__:main"}},
    "metadist's own functions": {"tasks": {"name": "metadist.api:load", "run_dir": "{folder}"}},
}
ENVIRONMENT_ATTACK = {
    "environment": {"name": "gymnasium", "make": "os:system", "arguments": {"command": "touch {mark}"}},
    "model": {"name": "gru"},
    "algorithm": {"name": "rl2"},
}


class Stranger:
    """The files of somebody else in the working directory, and the mark that their code would leave."""

    def __init__(self, folder: Path, module: str, run: Path) -> None:
        self.folder, self.module, self.run = folder, module, run
        self.mark = folder / "mark"

    def filled(self, fragment: dict[str, Any]) -> dict[str, Any]:
        text = json.dumps(fragment).replace("{mark}", str(self.mark)).replace("{folder}", str(self.folder))
        return json.loads(text.replace("{module}", self.module))

    def document(self, fragment: dict[str, Any]) -> dict[str, Any]:
        document = {**tiny.document(), **self.filled(fragment)}
        if "environment" in fragment:
            del document["tasks"]
        return document

    def write_module(self, text: str = MODULE) -> None:
        (self.folder / f"{self.module}.py").write_text(text.replace("{mark}", str(self.mark)))

    def config(self, fragment: dict[str, Any]) -> Path:
        path = self.folder / "theirs.yaml"
        path.write_text(yaml.safe_dump(self.document(fragment)))
        return path

    def run_directory(self, fragment: dict[str, Any]) -> Path:
        folder = self.folder / "their_run"
        shutil.copytree(self.run, folder)
        (folder / "config.yaml").write_text(yaml.safe_dump(self.document(fragment)))
        return folder

    def export(self, fragment: dict[str, Any]) -> Path:
        path = self.folder / "theirs.safetensors"
        tensors = safetensors.torch.load_file(self.run / "model.safetensors")
        metadata = {"format": "metadist", "run_id": "theirs", "config": json.dumps(self.document(fragment))}
        safetensors.torch.save_file(tensors, path, metadata)
        return path


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("run") / "run"
    tiny.train(tiny.experiment("outer.meta_steps=2"), run_dir=str(folder), plots=False)
    return folder


@pytest.fixture
def stranger(tmp_path: Path, run: Path, monkeypatch: pytest.MonkeyPatch, request: Any) -> Iterator[Stranger]:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [str(tmp_path), *sys.path])
    module = "theirs_" + re.sub(r"\W", "_", request.node.name)[-40:]
    made = Stranger(tmp_path, module, run)
    made.write_module()
    yield made
    sys.modules.pop(module, None)
    assert not made.mark.exists(), "somebody else's code has run"


def cli(*words: object) -> str:
    """The one line of a refusal."""
    done = CliRunner().invoke(app, [str(w) for w in words])
    assert done.exit_code == 2, (words, done.output, done.exception)
    (line,) = [line for line in done.output.splitlines() if line.startswith("error: ")]
    return line


# Configs on the user's own command line -------------------------------------------------------------------------------


@pytest.mark.parametrize("attack", ATTACKS)
def test_a_config_calls_only_parts_of_an_experiment(stranger: Stranger, attack: str) -> None:
    with pytest.raises(ConfigError) as caught:
        build(stranger.document(ATTACKS[attack]))
    assert re.match(r"(tasks|model|algorithm)\.name: |loss: |metric: |task_metrics: ", str(caught.value))


def test_an_environment_is_made_by_own_functions_alone(stranger: Stranger) -> None:
    with pytest.raises(ConfigError, match=r"environment\.make: 'os:system' can't be imported"):
        build(stranger.document(ENVIRONMENT_ATTACK))
    nested = copy.deepcopy(ENVIRONMENT_ATTACK)
    nested["environment"]["make"] = "their-module:make"
    with pytest.raises(ConfigError, match=r"environment\.make: 'their-module:make'; expected"):
        build(stranger.document(nested))


@pytest.mark.parametrize(
    "words",
    [("train", "{c}", "--print-config"), ("train", "{c}"), ("plan", "{c}"), ("verify", "{c}"), ("oracle", "{c}")],
)
def test_no_command_runs_a_config_of_commands(stranger: Stranger, words: tuple[str, ...]) -> None:
    fragment = ENVIRONMENT_ATTACK if words[0] == "oracle" else ATTACKS["a command"]
    line = cli(*(w.replace("{c}", str(stranger.config(fragment))) for w in words))
    assert "'os:system' can't be imported: 'os' is a module of Python itself" in line


@pytest.mark.parametrize(
    "fragment",
    [
        {"tasks": {"name": "{module}:Lines"}},
        {"model": {"name": "{module}:network", "width": 7}},
        {"model": {"name": "{module}:narrow"}},
        {"model": {"name": "{module}:wrapped"}},
        {"loss": "{module}:absolute"},
        {"metric": {"name": "{module}:absolute"}},
    ],
)
def test_own_parts_are_built(stranger: Stranger, fragment: dict[str, Any]) -> None:
    assert build(stranger.document(fragment)).learner


def test_authors_of_modules(stranger: Stranger) -> None:
    assert author(stranger.module) == "user"
    assert author("os") == author("sys") == author("subprocess") == author("xml.dom") == "python"
    assert author("torch.hub") == author("yaml") == "installed"
    assert author("metadist.api") == "metadist" and author("nothing_of_this_name") == "missing"


# Run directories, exports, drivers ------------------------------------------------------------------------------------

OWN = {"tasks": {"name": "{module}:Lines"}}
EVERYTHING = {**ATTACKS, "an import that acts": OWN, "an environment": ENVIRONMENT_ATTACK}
REFUSED = r"would run; if you trust the author, allow it with --trust [\w.]+|can't be imported|expected|defined by"


@pytest.mark.parametrize("attack", EVERYTHING)
def test_an_export_imports_nothing(stranger: Stranger, attack: str) -> None:
    stranger.write_module(SIDE_EFFECT)
    path = stranger.export(EVERYTHING[attack])
    with pytest.raises(MetadistError, match=REFUSED):
        build_service(Serving((str(path),)))
    assert stranger.module not in sys.modules


@pytest.mark.parametrize("attack", EVERYTHING)
def test_a_run_directory_imports_nothing(stranger: Stranger, attack: str) -> None:
    stranger.write_module(SIDE_EFFECT)
    with pytest.raises(MetadistError, match=REFUSED):
        metadist.load(str(stranger.run_directory(EVERYTHING[attack])))
    assert stranger.module not in sys.modules


@pytest.mark.parametrize("attack", EVERYTHING)
def test_a_driver_makes_its_workers_import_nothing(stranger: Stranger, attack: str) -> None:
    stranger.write_module(SIDE_EFFECT)
    with pytest.raises(MetadistError, match=REFUSED):
        build_for_driver(yaml.safe_dump(stranger.document(EVERYTHING[attack])))
    assert stranger.module not in sys.modules


def test_commands_name_the_module_and_the_option(stranger: Stranger) -> None:
    stranger.write_module(SIDE_EFFECT)
    run, export = stranger.run_directory(OWN), stranger.export(OWN)
    name = stranger.module
    wanted = f"allow it with --trust {name} (METADIST_TRUST='{name}'; in Python trust=['{name}'])"
    for words in (
        ("evaluate", run),
        ("export", run, "out.safetensors"),
        ("register", run, "name"),
        ("serve", run),
        ("serve", export),
        ("predict", run, "--support", ".", "--query", "."),
        ("predict", export, "--support", ".", "--query", "."),
        ("train", run / "config.yaml", "--print-config"),
        ("train", run / "config.yaml", "--run-dir", run, "--resume"),
        ("plan", run / "config.yaml"),
        ("oracle", run / "config.yaml"),
        ("bench", "tracking", run / "config.yaml"),
        ("train", "sinusoid_maml", f"init_from={run}", "--workers", "0", "tracking.uri=none"),
    ):
        line = cli(*words)
        assert wanted in line and "tasks.name: " in line, line
    with pytest.raises(MetadistError, match="--trust"):
        _load_pyfunc(str(export))


def test_a_hostile_file_is_refused_in_one_line(stranger: Stranger) -> None:
    tensors = safetensors.torch.load_file(stranger.run / "model.safetensors")
    for config in (
        "[" * 50_000,
        '{"tasks": ' * 600 + "1" + "}" * 600,
        "[]",
        "null",
        '{"tasks": {"name": ["a:b"]}}',
        "é{",
    ):
        safetensors.torch.save_file(tensors, "theirs.safetensors", {"config": config})
        assert cli("serve", "theirs.safetensors")


def test_several_modules_are_named_at_once() -> None:
    document = {"tasks": {"name": "mine.tasks:A"}, "model": {"name": "nets:B"}, "metric": {"name": "mine.metrics:c"}}
    with pytest.raises(ConfigError, match="--trust mine.metrics --trust mine.tasks --trust nets"):
        check_trust(document, "file 'x'")
    with pytest.raises(ConfigError, match="modules mine.metrics, nets would run"):
        check_trust(document, "file 'x'", ["mine.tasks"])
    check_trust(document, "file 'x'", ["mine", "nets"])  # a package includes its modules
    for name in ("nets.py", "nets:B", "no-name", ""):
        with pytest.raises(ConfigError, match=f"--trust {name}: expected the name of a module"):
            check_trust(document, "file 'x'", [name])


def test_a_trusted_module_is_used_and_nothing_else(stranger: Stranger) -> None:
    trust = (stranger.module,)
    assert metadist.load(str(stranger.run_directory(OWN)), trust=trust).experiment.learner
    export = stranger.export({**OWN, "model": {"name": "torch.nn:Linear", "in_features": 1, "out_features": 1}})
    with pytest.raises(ConfigError, match="model.name: 'torch.nn:Linear': code of the module torch.nn would run"):
        build_service(Serving((str(export),), trust=trust))
    traps = {"tasks": {"name": "{module}:system", "command": "touch {mark}"}, "model": COMMAND}
    with pytest.raises(ConfigError, match="defined by builtins|of Python itself"):
        build_for_driver(yaml.safe_dump(stranger.document(traps)), [*trust, "os"])


def test_a_trusted_installed_package_may_make_parts(stranger: Stranger) -> None:
    fragment = {"model": {"name": "torch.nn.utils.parametrizations:weight_norm"}}
    with pytest.raises(ConfigError, match="a config may call functions of your own alone; wrap it in a function"):
        build(stranger.document(fragment))
    with pytest.raises(ConfigError, match=r"model: weight_norm\(.*missing a required argument"):  # it may be called
        build_for_driver(yaml.safe_dump(stranger.document(fragment)), ["torch"])


def test_runs_without_own_code_need_no_trust(stranger: Stranger, tmp_path: Path) -> None:
    loaded = metadist.load(str(stranger.run))
    made = metadist.compose(tasks=metadist.Sinusoid(), model=metadist.MLP(hidden=(4,)), algorithm=metadist.MAML())
    check_trust(made.document, "file 'x'")  # composed in Python of metadist's own parts
    loaded.export(tmp_path / "plain.safetensors")
    assert build_service(Serving((str(tmp_path / "plain.safetensors"), f"again={stranger.run}"))).models


def test_loaders_of_strangers_files_never_build_unchecked() -> None:
    """Every module that reads a document of somebody else calls ``build_foreign``, never ``build``."""
    for file in ("experiment/load.py", "experiment/remote.py", "serving/load.py"):
        text = (ROOT / "metadist" / file).read_text()
        assert "build_foreign(" in text and "import build\n" not in text, file


def test_every_import_by_a_name_is_known() -> None:
    """A new import by a name that a file could hold needs the checks of ``core/imports.py``."""
    known = {
        "__init__.py": 2,  # public names, old names
        "benchmarks/__init__.py": 1,  # a fixed list
        "core/imports.py": 1,
        "environments/gymnasium_adapter.py": 1,  # environment.make, checked by config/components.py
        "environments/simulated.py": 1,  # the extras that a class needs
        "serving/ray.py": 1,  # metadist's own application
    }
    found = {}
    for file in sorted((ROOT / "metadist").rglob("*.py")):
        calls = [n for n in ast.walk(ast.parse(file.read_text())) if isinstance(n, ast.Call)]
        names = [ast.unparse(n.func).rpartition(".")[2] for n in calls]
        if count := names.count("import_module") + names.count("__import__"):
            found[file.relative_to(ROOT / "metadist").as_posix()] = count
    assert found == known


def test_every_section_that_names_parts_is_read_for_import_paths() -> None:
    document = {
        "tasks": {"name": "a:B", "options": ["c:d", "s3://bucket/x"], "path": "e/f:g"},
        "environment": {"name": "gymnasium", "make": "h.i:j"},
        "model": "k:l",
        "loss": "m:n",
        "metric": {"name": "o:p"},
        "algorithm": {"name": "maml"},
        "a_later_section": [{"deep": {"er": "q:r"}}],
    }
    assert {path for _, path in import_paths(document)} == {"a:B", "c:d", "h.i:j", "k:l", "m:n", "o:p", "q:r"}


# Pickles --------------------------------------------------------------------------------------------------------------


class Bomb:
    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self) -> tuple[Callable[..., object], tuple[object, ...]]:
        return (Path.touch, (self.mark,))


@pytest.mark.parametrize("name", ["theirs.pt", "theirs.safetensors", "theirs.pkl", "folder"])
def test_no_pickle_is_loaded(stranger: Stranger, name: str) -> None:
    path = stranger.folder / name
    if name == "folder":  # a run directory whose checkpoints are pickles
        path = stranger.run_directory({})
        for file in [*path.rglob("*.safetensors"), *path.rglob("*.arrow")]:
            file.write_bytes(pickle.dumps(Bomb(stranger.mark)))
    else:
        torch.save(Bomb(stranger.mark), path)
    for words in (
        ("serve", path),
        ("predict", path, "--support", ".", "--query", "."),
        ("train", "sinusoid_maml", f"init_from={path}", "--workers", "0", "tracking.uri=none"),
    ):
        done = CliRunner().invoke(app, [str(w) for w in words])
        assert done.exit_code == 2, (words, done.output, done.exception)


def test_no_module_reads_code_as_data() -> None:
    """``torch.load``, pickles, unsafe YAML, ``eval`` and shells: each use is listed with the reason it is safe."""
    known = {
        ("environments/meta_world.py", "pickle.loads"),  # made by Meta-World in this process
        ("storage/torch_files.py", "torch.load"),  # weights_only=True
        ("workers/elsewhere.py", "pickle.loads"),  # of a process that this one started
        ("testing/round_trips.py", "cloudpickle.loads"),  # made by this process
    }
    found = set()
    for file in sorted((ROOT / "metadist").rglob("*.py")):
        for node in ast.walk(ast.parse(file.read_text())):
            if not isinstance(node, ast.Call):
                continue
            name = ast.unparse(node.func)
            options = {k.arg: ast.unparse(k.value) for k in node.keywords}
            unsafe = (
                re.fullmatch(r"(torch|pickle|cloudpickle|dill|joblib|marshal)\.loads?|eval|exec|os\.system", name)
                or (name == "np.load" and options.get("allow_pickle") != "False")
                or (name == "yaml.load" and "_Loader" not in ast.unparse(node))
                or options.get("shell") == "True"
            )
            if unsafe:
                found.add((file.relative_to(ROOT / "metadist").as_posix(), name))
    assert found == known
