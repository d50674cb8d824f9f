"""Find the modules of the user's own that a config names, with the modules that they import, and hash their code."""

from __future__ import annotations

import ast
import contextlib
import functools
import hashlib
import importlib.machinery
import importlib.metadata
import importlib.util
import inspect
import operator
import os
import re
import sys
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import metadist
from metadist.config.schema import flatten
from metadist.config.trust import modules_of
from metadist.core.imports import is_users_own

#: folders in a package that hold no modules of it; hidden folders too
SKIPPED = {"__pycache__", "node_modules"}
#: the keys of a config whose import paths can change θ
CODE_KEYS = ("tasks", "environment", "model", "algorithm", "outer", "loss", "metric")
#: the name under which the code of metadist itself is compared
OURSELVES = "metadist"


@dataclass(frozen=True)
class UserModule:
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
            for path in walk(place):
                if path.suffix == ".py":
                    found[path] = f"{self.name}/{path.relative_to(place).as_posix()}"
        return found

    def compiled_files(self) -> list[Path]:
        suffixes = tuple(importlib.machinery.EXTENSION_SUFFIXES)
        return [path for place in self.places for path in walk(place) if path.name.endswith(suffixes)]


def code_modules(document: Mapping[str, Any], *parts: object) -> tuple[str, ...]:
    """Return the modules on which θ depends: those of import paths, and those of the classes of ``parts``.

    Driver and remote workers find the same modules, although a remote worker's config has no other keys.
    """
    named = modules_of({key: document[key] for key in CODE_KEYS if key in document})
    return tuple(sorted({*named, *(type(part).__module__ for part in parts)}))


def named_modules(document: Mapping[str, Any]) -> list[UserModule]:
    """Return the top-level modules of the config's import paths."""
    return [find_module(name) for name in sorted({path.partition(".")[0] for path in modules_of(document)})]


def find_module(name: str) -> UserModule:
    """Find a top-level module, with the working directory importable."""
    if name in sys.stdlib_module_names or name in ("metadist", "__main__"):
        return UserModule(name, "installed")
    if "" not in sys.path and str(Path.cwd()) not in sys.path:
        sys.path.insert(0, str(Path.cwd()))
    try:
        spec = importlib.util.find_spec(name)
    except (ImportError, ValueError, AttributeError):
        spec = None
    if spec is None:
        return UserModule(name, "missing")
    places = spec.submodule_search_locations  # of a package, also of one without __init__.py
    if places is None and spec.has_location:
        places = [str(spec.origin)]
    own = tuple(Path(place).absolute() for place in places or () if is_users_own(Path(place).resolve()))
    if not own:
        return UserModule(name, "installed")
    if own[0].is_file() and own[0].suffix != ".py":
        return UserModule(name, "compiled", own)
    return UserModule(name, "own", own)


def comes_with_metadist(name: str) -> bool:
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


def walk(folder: Path) -> Iterator[Path]:
    """Yield the files below a folder, without skipped and hidden folders; nothing if ``folder`` is a file."""
    for parent, folders, names in os.walk(folder):
        folders[:] = sorted(f for f in folders if f not in SKIPPED and not f.startswith("."))
        yield from (Path(parent) / name for name in sorted(names))


# The code -------------------------------------------------------------------------------------------------------------


def code_hashes(modules: Iterable[str]) -> dict[str, str]:
    """Return the SHA-256 of each module of the user's own among ``modules`` and those that they import, by name.

    Files are read, not run; imports in functions count. An installed package among ``modules`` that does not come with
    metadist stands with its version. ``__main__`` is left out, since other processes have another one.
    """
    found: dict[str, str] = {}
    tops = functools.lru_cache(find_module)
    queue = [name for module in modules for name in _with_packages(module)]
    for top in map(tops, {name for name in queue if "." not in name}):
        if top.kind == "installed" and not comes_with_metadist(top.name) and (versions := _versions(top.name)):
            found[top.name] = versions
    while queue:
        name = queue.pop(0)
        top = tops(name.partition(".")[0])
        if name in found or top.kind not in ("own", "compiled"):
            continue
        if (path := _file_of(top, name)) is not None:
            found[name] = hashlib.sha256(path.read_bytes()).hexdigest()
            queue += _imported(path, name)
    return dict(sorted(found.items()))


def main_hashes(document: Mapping[str, Any]) -> dict[str, str]:
    """Return the SHA-256 of the source of each class and function of ``__main__`` that a config names, by that name.

    What has no source, in an interactive session, is left out.
    """
    found: dict[str, str] = {}
    for value in flatten(dict(document)).values():
        if not isinstance(value, str):
            continue
        module, _, name = value.partition(":")
        if module != "__main__" or not all(part.isidentifier() for part in name.split(".")):
            continue
        with contextlib.suppress(AttributeError, OSError, TypeError):
            named = operator.attrgetter(name)(sys.modules["__main__"])
            parts = [part for part in getattr(named, "__mro__", [named]) if part.__module__ == "__main__"]
            source = "\n".join(inspect.getsource(part) for part in parts)
            found[value] = hashlib.sha256(source.encode()).hexdigest()
    return found


@functools.lru_cache(maxsize=1)
def own_hash() -> str:
    """Return the SHA-256 of metadist's own code in this process."""
    root, digest = Path(metadist.__file__).parent, hashlib.sha256()
    rooms = [root / "__init__.py", *(room.parent for room in sorted(root.glob("*/__init__.py")))]
    for path in (path for room in rooms for path in ([room] if room.is_file() else walk(room))):
        if path.suffix == ".py":
            digest.update(path.relative_to(root).as_posix().encode() + b"\0" + path.read_bytes() + b"\0")
    return digest.hexdigest()


def _with_packages(module: str) -> list[str]:
    """Return ``a``, ``a.b`` and ``a.b.c`` for ``a.b.c``: importing a module runs its packages too."""
    parts = module.split(".")
    return [".".join(parts[: i + 1]) for i in range(len(parts))]


def _file_of(top: UserModule, name: str) -> Path | None:
    """Return the file of a module of the user's own; None for a package without a file, and where there is none."""
    rest = name.split(".")[1:]
    for place in top.places:
        if place.is_file():
            return place if not rest else None
        folder = place.joinpath(*rest)
        suffixes = [".py", *importlib.machinery.EXTENSION_SUFFIXES]
        candidates = [folder / "__init__.py", *(folder.with_name(folder.name + s) for s in suffixes if rest)]
        if path := next((path for path in candidates if path.is_file()), None):
            return path
    return None


def _imported(path: Path, name: str) -> list[str]:
    """Return the modules that a file may import, by their whole names; some of them may be no modules."""
    package = name if path.name == "__init__.py" else name.rpartition(".")[0]
    found = []
    for base, level, names in imports_of(path):
        if level:
            above = package.split(".")[: len(package.split(".")) - level + 1]
            base = ".".join([*above, base]) if base else ".".join(above)
        found += [dotted for module in [base, *(f"{base}.{n}" for n in names)] for dotted in _with_packages(module)]
    return [dotted for dotted in dict.fromkeys(found) if dotted]


def _versions(name: str) -> str:
    names = importlib.metadata.packages_distributions().get(name, ())
    return ", ".join(f"{n} {importlib.metadata.version(n)}" for n in sorted(set(names)))


def imports_of(path: Path) -> list[tuple[str, int, list[str]]]:
    """Return a file's imports, except those for type checkers alone: (module, level of a relative one, names in it)."""
    try:
        nodes: list[ast.AST] = [ast.parse(path.read_bytes())]
    except (SyntaxError, ValueError):  # nothing can import such a file
        return []
    found: list[tuple[str, int, list[str]]] = []
    while nodes:
        node = nodes.pop()
        if isinstance(node, ast.Import):
            found += [(alias.name, 0, []) for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            found.append((node.module or "", node.level, [alias.name for alias in node.names]))
        if isinstance(node, ast.If) and ast.unparse(node.test).rpartition(".")[2] == "TYPE_CHECKING":
            nodes += node.orelse
        else:
            nodes += ast.iter_child_nodes(node)
    return found
