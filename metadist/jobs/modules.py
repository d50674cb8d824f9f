"""Choose the Python modules that a job takes along.

A job ships the modules that the config's import paths name, each with its whole package, and the modules that the user
lists (``--module``). Everything else must be installed on the nodes. The shipped files are read, not run, to find the
modules that they import: one that only this machine has is an error, an installed one is a note.
"""

from __future__ import annotations

import ast
import importlib.machinery
import importlib.metadata
import importlib.util
import os
import re
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from metadist.config.schema import flatten
from metadist.core.errors import ConfigError
from metadist.core.imports import is_users_own

#: folders in a package that hold no modules of it; hidden folders too
SKIPPED = {"__pycache__", "node_modules"}


@dataclass(frozen=True)
class Shipment:
    """``files``: source → place below the job's working directory. ``notes``: modules that the nodes must have."""

    files: Mapping[Path, str]
    notes: Sequence[str]


@dataclass(frozen=True)
class _Module:
    """A top-level module. ``places``: its file, or its package's folders, where it is the user's own source."""

    name: str
    kind: Literal["own", "installed", "compiled", "missing"]
    places: tuple[Path, ...] = ()

    def files(self) -> dict[Path, str]:
        """Return source → place below the working directory: one file, or every Python file of the package."""
        found = {}
        for place in self.places:
            if place.is_file():
                found[place] = f"{self.name}.py"
            for path in _walk(place):
                if path.suffix == ".py":
                    found[path] = f"{self.name}/{path.relative_to(place).as_posix()}"
        return found

    def compiled_files(self) -> list[Path]:
        suffixes = tuple(importlib.machinery.EXTENSION_SUFFIXES)
        return [path for place in self.places for path in _walk(place) if path.name.endswith(suffixes)]


def shipment(document: Mapping[str, Any], listed: Sequence[str] = ()) -> Shipment:
    """Return the modules to ship for a config (``document``) and the ``listed`` module or package names.

    Raises ``ConfigError`` for a listed module that cannot be shipped, and for a module of the user's own that shipped
    files import and that neither the config nor the list names.
    """
    modules = {module.name: module for module in [*map(_listed, listed), *_named(document)]}
    notes = [
        f"{module.name} is not shipped: the nodes must have it installed"
        for module in modules.values()
        if module.kind == "compiled" or (module.kind == "installed" and not _comes_with_metadist(module.name))
    ]
    shipped = {name: module for name, module in modules.items() if module.kind == "own"}
    for module in shipped.values():
        notes += [f"{path} is not shipped: it is compiled; install it on the nodes" for path in module.compiled_files()]
    missing, installed = _needed_by(shipped)
    if missing:
        imports = ", ".join(f"{file.name} imports '{name}'" for name, file in sorted(missing.items()))
        options = " ".join(f"--module {name}" for name in sorted(missing))
        raise ConfigError(f"{imports}: the job would not have these modules of this machine; add {options}")
    notes += [
        f"{file.name} imports {name}, which is not shipped: the nodes must have it installed"
        for name, file in sorted(installed.items())
        if name not in modules and not _comes_with_metadist(name)
    ]
    return Shipment({path: place for module in shipped.values() for path, place in module.files().items()}, notes)


def own_names(document: Mapping[str, Any]) -> list[str]:
    """Return the top-level modules of the user's own that a config names by import path."""
    return [module.name for module in _named(document) if module.kind in ("own", "compiled")]


def _named(document: Mapping[str, Any]) -> list[_Module]:
    """Return the top-level modules of the config's import paths, ``package.module:name``."""
    names = set()
    for value in flatten(dict(document)).values():
        module, colon, name = value.partition(":") if isinstance(value, str) else ("", "", "")
        if colon and all(part.isidentifier() for part in [*module.split("."), *name.split(".")]):
            names.add(module.partition(".")[0])
    return [_module(name) for name in sorted(names)]


def _listed(name: str) -> _Module:
    """Return the module that a ``--module`` option names. Raises ``ConfigError`` if a job cannot ship it."""
    if not all(part.isidentifier() for part in name.split(".")) or name.endswith(".py"):
        raise ConfigError(f"--module {name}: expected the name of a module or package, such as mine or mine.tasks")
    module = _module(name.partition(".")[0])
    if module.kind == "missing":
        raise ConfigError(
            f"--module {name}: there is no module '{module.name}'; expected a file or package in the working directory "
            "or on PYTHONPATH"
        )
    if module.kind != "own":
        raise ConfigError(f"--module {name}: '{module.name}' is {module.kind}; install it on the nodes instead")
    return module


def _module(name: str) -> _Module:
    """Find a top-level module, with the working directory importable."""
    if name in sys.stdlib_module_names or name in ("metadist", "__main__"):
        return _Module(name, "installed")
    if "" not in sys.path and str(Path.cwd()) not in sys.path:
        sys.path.insert(0, str(Path.cwd()))
    try:
        spec = importlib.util.find_spec(name)
    except (ImportError, ValueError, AttributeError):
        spec = None
    if spec is None:
        return _Module(name, "missing")
    places = spec.submodule_search_locations  # of a package, also of one without __init__.py
    if places is None and spec.has_location:
        places = [str(spec.origin)]
    own = tuple(Path(place).absolute() for place in places or () if is_users_own(Path(place).resolve()))
    if not own:
        return _Module(name, "installed")
    if own[0].is_file() and own[0].suffix != ".py":
        return _Module(name, "compiled", own)
    return _Module(name, "own", own)


def _comes_with_metadist(name: str) -> bool:
    """Return whether nodes that have metadist have this module: Python's own, metadist, or a dependency of metadist."""
    if name in sys.stdlib_module_names or name in ("metadist", "__main__"):
        return True
    try:
        requirements = importlib.metadata.requires("metadist") or []
    except importlib.metadata.PackageNotFoundError:
        return False
    required = {_canonical(re.split(r"[^\w.-]", text)[0]) for text in requirements if "extra ==" not in text}
    return any(_canonical(found) in required for found in importlib.metadata.packages_distributions().get(name, ()))


def _canonical(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()


def _needed_by(shipped: Mapping[str, _Module]) -> tuple[dict[str, Path], dict[str, Path]]:
    """Return the modules that shipped files import and that are not shipped: (the user's own, installed ones), each
    with a file that imports it. The search continues in the user's own, so that one error names all of them."""
    missing: dict[str, Path] = {}
    installed: dict[str, Path] = {}
    queue = [file for module in shipped.values() for file in module.files()]
    while queue:
        file = queue.pop(0)
        for name in sorted(_imports(file) - shipped.keys() - missing.keys() - installed.keys()):
            module = _module(name)
            if module.kind == "own":
                missing[name] = file
                queue += module.files()
            elif module.kind in ("installed", "compiled"):
                installed[name] = file
    return missing, installed


def _imports(path: Path) -> set[str]:
    """Return the top-level names of a file's absolute imports, except those for type checkers alone."""
    try:
        nodes: list[ast.AST] = [ast.parse(path.read_bytes())]
    except (SyntaxError, ValueError):  # nothing can import such a file
        return set()
    names = set()
    while nodes:
        node = nodes.pop()
        if isinstance(node, ast.Import):
            names |= {alias.name.partition(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and not node.level and node.module:
            names.add(node.module.partition(".")[0])
        if isinstance(node, ast.If) and ast.unparse(node.test).rpartition(".")[2] == "TYPE_CHECKING":
            nodes += node.orelse
        else:
            nodes += ast.iter_child_nodes(node)
    return names


def _walk(folder: Path) -> Iterator[Path]:
    """Yield the files below a folder, without skipped and hidden folders; nothing if ``folder`` is a file."""
    for parent, folders, names in os.walk(folder):
        folders[:] = sorted(f for f in folders if f not in SKIPPED and not f.startswith("."))
        yield from (Path(parent) / name for name in sorted(names))
