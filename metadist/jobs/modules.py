"""Choose the Python modules that a job takes along.

A job ships the modules that the config's import paths name, each with its whole package, and the modules that the user
lists (``--module``). Everything else must be installed on the nodes. The shipped files are read, not run, to find the
modules that they import: one that only this machine has is an error, an installed one is a note.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from metadist.config.modules import UserModule, comes_with_metadist, find_module, imports_of, named_modules
from metadist.core.errors import ConfigError


@dataclass(frozen=True)
class Shipment:
    """``files``: source → place below the job's working directory. ``notes``: modules that the nodes must have."""

    files: Mapping[Path, str]
    notes: Sequence[str]


def shipment(document: Mapping[str, Any], listed: Sequence[str] = ()) -> Shipment:
    """Return the modules to ship for a config (``document``) and the ``listed`` module or package names.

    Raises ``ConfigError`` for a listed module that cannot be shipped, and for a module of the user's own that shipped
    files import and that neither the config nor the list names.
    """
    modules = {module.name: module for module in [*map(_listed, listed), *named_modules(document)]}
    notes = [
        f"{module.name} is not shipped: the nodes must have it installed"
        for module in modules.values()
        if module.kind == "compiled" or (module.kind == "installed" and not comes_with_metadist(module.name))
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
        if name not in modules and not comes_with_metadist(name)
    ]
    return Shipment({path: place for module in shipped.values() for path, place in module.files().items()}, notes)


def own_names(document: Mapping[str, Any]) -> list[str]:
    """Return the top-level modules of the user's own that a config names by import path."""
    return [module.name for module in named_modules(document) if module.kind in ("own", "compiled")]


def _listed(name: str) -> UserModule:
    """Return the module that a ``--module`` option names. Raises ``ConfigError`` if a job cannot ship it."""
    if not all(part.isidentifier() for part in name.split(".")) or name.endswith(".py"):
        raise ConfigError(f"--module {name}: expected the name of a module or package, such as mine or mine.tasks")
    module = find_module(name.partition(".")[0])
    if module.kind == "missing":
        raise ConfigError(
            f"--module {name}: there is no module '{module.name}'; expected a file or package in the working directory "
            "or on PYTHONPATH"
        )
    if module.kind != "own":
        raise ConfigError(f"--module {name}: '{module.name}' is {module.kind}; install it on the nodes instead")
    return module


def _needed_by(shipped: Mapping[str, UserModule]) -> tuple[dict[str, Path], dict[str, Path]]:
    """Return the modules that shipped files import and that are not shipped: (the user's own, installed ones), each
    with a file that imports it. The search continues in the user's own, so that one error names all of them."""
    missing: dict[str, Path] = {}
    installed: dict[str, Path] = {}
    queue = [file for module in shipped.values() for file in module.files()]
    while queue:
        file = queue.pop(0)
        imported = {module.partition(".")[0] for module, level, _ in imports_of(file) if not level}
        for name in sorted(imported - shipped.keys() - missing.keys() - installed.keys()):
            module = find_module(name)
            if module.kind == "own":
                missing[name] = file
                queue += module.files()
            elif module.kind in ("installed", "compiled"):
                installed[name] = file
    return missing, installed
