"""Import objects by ``package.module:name``, and tell whose module defines them.

A config names parts by import path. Before such a part is called, its kind and its author are checked: a config must
not run any function of any module.
"""

from __future__ import annotations

import functools
import importlib
import importlib.metadata
import importlib.util
import inspect
import re
import site
import sys
import sysconfig
import traceback
from collections.abc import Iterable
from pathlib import Path
from typing import Literal

from metadist.core.errors import ConfigError, nearest

Author = Literal["metadist", "user", "installed", "python", "missing"]
"""Whose a module is: metadist's; the user's; an installed package's that does not require metadist; Python's own."""


def split_path(path: str) -> tuple[str, str] | None:
    """Return (module, name) of ``package.module:name``; None for any other text, such as nested names."""
    module, colon, name = path.partition(":")
    fits = colon and name.isidentifier() and all(part.isidentifier() for part in module.split("."))
    return (module, name) if fits else None


def import_path(path: str, key: str) -> object:
    """Import ``package.module:name``, with the working directory importable. Calls nothing.

    Raises ConfigError that names ``key`` where there is no such name, and for modules of Python itself, which define
    no part of an experiment.
    """
    parts = split_path(path)
    if parts is None:
        raise ConfigError(f"{key}: '{path}' can't be imported: {_remedy(path)}")
    module, name = parts
    if module == "__main__":
        raise ConfigError(
            f"{key}: '{path}' can't be imported: it was defined in a notebook, on stdin or in a file whose name is "
            f"no module's; move it into a file such as mine.py, and name it mine:{name}"
        )
    _search_working_directory()
    places = _places(module.partition(".")[0])
    if places == [] or any(map(_is_pythons, places or ())):
        raise ConfigError(
            f"{key}: '{path}' can't be imported: '{module}' is a module of Python itself; expected a module of your own"
        )
    imported = _imported(module, path, key)
    if not hasattr(imported, name):
        names = [n for n in vars(imported) if not n.startswith("_")]
        raise ConfigError(f"{key}: module '{module}' has no '{name}'{nearest(name, names)}")
    return getattr(imported, name)


def _remedy(path: str) -> str:
    if "<" in path or "." in path.partition(":")[2]:
        return (
            "it is a lambda, or defined inside a function or a class; expected a name at the top level of a module, "
            "package.module:Name"
        )
    return "expected package.module:Name"


def _imported(module: str, path: str, key: str) -> object:
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise ConfigError(
            f"{key}: '{path}': {error}; modules are looked for in the working directory and on PYTHONPATH"
        ) from error
    except SystemExit as error:
        raise ConfigError(f"{key}: '{path}' can't be imported: it ends the process (SystemExit)") from error
    except Exception as error:
        line = traceback.extract_tb(error.__traceback__)[-1]
        where = "" if isinstance(error, SyntaxError) else f" ({line.filename}, line {line.lineno})"
        raise ConfigError(f"{key}: '{path}' can't be imported: {type(error).__name__}: {error}{where}") from error


def _search_working_directory() -> None:
    if "" not in sys.path and str(Path.cwd()) not in sys.path:
        sys.path.insert(0, str(Path.cwd()))


# Whose a module is ----------------------------------------------------------------------------------------------------


def author(module: str) -> Author:
    """Return whose the top-level package of ``module`` is. Imports nothing.

    An installed package that requires metadist counts as the user's: it was written for metadist.
    """
    top = module.partition(".")[0]
    if top in ("metadist", "__main__"):
        return "metadist" if top == "metadist" else "user"
    places = _places(top)
    if places is None:  # a module that was made by hand has no place
        return "user" if top in sys.modules else "missing"
    if not places or any(map(_is_pythons, places)):
        return "python"
    return "user" if any(map(is_users_own, places)) or _requires_metadist(top) else "installed"


def _places(top: str) -> list[Path] | None:
    """Return the file or folders of a top-level module; none for a built-in one, None where there is no such module."""
    if top in sys.builtin_module_names:
        return []
    try:
        spec = importlib.util.find_spec(top)
    except (ImportError, ValueError, AttributeError):
        return None
    if spec is None:
        return None
    if spec.origin in ("built-in", "frozen"):
        return []
    places = list(spec.submodule_search_locations or ()) or ([str(spec.origin)] if spec.has_location else [])
    return [Path(place).resolve() for place in places]


def is_users_own(path: Path) -> bool:
    """Return whether a file or folder is neither installed nor Python's own."""
    if not path.exists() or {"site-packages", "dist-packages"} & set(path.parts):
        return False
    return not _is_pythons(path) and not any(Path(folder).resolve() in path.parents for folder in _installed())


def _is_pythons(path: Path) -> bool:
    if {"site-packages", "dist-packages"} & set(path.parts):
        return False
    return any(Path(sysconfig.get_path(name)).resolve() in path.parents for name in ("stdlib", "platstdlib"))


@functools.cache
def _installed() -> tuple[str, ...]:
    return (*site.getsitepackages(), site.getusersitepackages())


def _requires_metadist(top: str) -> bool:
    for name in importlib.metadata.packages_distributions().get(top, ()):
        for text in importlib.metadata.requires(name) or ():
            if re.split(r"[^\w.-]", text)[0].lower() == "metadist":
                return True
    return False


def home_of(found: object, path: str) -> str:
    """Return the module that defines ``found``, which ``path`` names; "builtins" where it is not written in Python.

    A function or class belongs to the module that defines it, not to one that imports it. Another object, such as a
    ``functools.partial``, belongs to the module that ``path`` names.
    """
    found = inspect.unwrap(found) if callable(found) else found  # of decorators, functools.cache too
    found = found.__func__ if inspect.ismethod(found) else found
    if inspect.isbuiltin(found) or inspect.ismethoddescriptor(found):
        return "builtins"
    if inspect.isfunction(found) or inspect.isclass(found):
        return found.__module__ or "builtins"
    return path.partition(":")[0]


def within(module: str, packages: Iterable[str]) -> bool:
    """Return whether a module is one of ``packages`` or in one of them."""
    return any(f"{module}.".startswith(f"{package}.") for package in packages)


# Names for other processes --------------------------------------------------------------------------------------------


def path_of(part: object) -> str:
    """Return the import path of a class or function, for a config that other processes read.

    A program that runs as a file (``python lines.py``) is the module ``lines`` for them; a program that runs by
    ``python -m`` has its module's name. A part that was defined in a notebook or on stdin keeps ``__main__``, which
    ``import_path`` refuses.
    """
    module, name = str(getattr(part, "__module__", "")), str(getattr(part, "__qualname__", ""))
    return f"{_program() if module == '__main__' and _in_program(part, name) else module}:{name}"


def _in_program(part: object, name: str) -> bool:
    return "." in name or "<" in name or getattr(sys.modules["__main__"], name, None) is part


def _program() -> str:
    """Return the name by which other processes import the program; ``__main__`` where they can't."""
    main = sys.modules["__main__"]
    spec = getattr(main, "__spec__", None)
    if spec is not None:  # python -m package.module
        return str(spec.name)
    file = str(getattr(main, "__file__", None) or "")
    name = Path(file).stem
    if not name.isidentifier():
        return "__main__"
    try:
        found = importlib.util.find_spec(name)
    except (ImportError, ValueError, AttributeError):
        return "__main__"
    same = found is not None and found.origin is not None and Path(found.origin).resolve() == Path(file).resolve()
    return name if same else "__main__"
