"""Refuse code of modules that the user has not allowed, in configs that come from somebody else.

A config on the user's own command line may name parts in any module. A config from an exported file, a run directory,
a registry or a driver may name metadist's own parts and installed plug-ins alone, and modules that the user allows by
name (``--trust my_module``). Decision 31 has the reasons.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Mapping, Sequence

from metadist.config.schema import Document, flatten
from metadist.core.errors import ConfigError
from metadist.core.imports import split_path, within


def import_paths(document: Mapping[str, object]) -> Iterator[tuple[str, str]]:
    """Yield (key, import path) for every text that reads ``package.module:name``."""
    for key, value in flatten(dict(document)).items():
        for text in value if isinstance(value, list) else [value]:
            if isinstance(text, str) and split_path(text):
                yield key, text


def modules_of(document: Mapping[str, object]) -> list[str]:
    """Return the modules that a document names by import path, in alphabetical order."""
    return sorted({path.partition(":")[0] for _, path in import_paths(document)})


def check_trust(document: Document, source: str, trust: Sequence[str] = ()) -> None:
    """Raise ConfigError where the document names a module that is neither metadist's nor in ``trust``. Imports nothing.

    ``source`` says in words where the document comes from. A trusted package includes its modules.
    """
    allowed = ("metadist", *allowed_modules(trust))
    try:
        named = list(import_paths(document))
    except RecursionError:
        raise ConfigError(f"{source}: its config is nested too deeply") from None
    refused = [(key, path) for key, path in named if not within(path.partition(":")[0], allowed)]
    if not refused:
        return
    names = ", ".join(f"{key}: '{path}'" for key, path in refused)
    modules = sorted({path.partition(":")[0] for _, path in refused})
    if "__main__" in modules:
        raise ConfigError(
            f"{source}: {names}: '__main__' can't be imported: it was a notebook, stdin or a file whose name is no "
            "module's; train from a file such as mine.py, or pass the experiment to metadist.load as made_from="
        )
    several = "s" if len(modules) > 1 else ""
    raise ConfigError(
        f"{source}: {names}: code of the module{several} {', '.join(modules)} would run; if you trust the "
        f"author, allow it with {' '.join(f'--trust {name}' for name in modules)} (METADIST_TRUST="
        f"'{' '.join(modules)}'; in Python trust={modules})"
    )


def allowed_modules(trust: Sequence[str] = ()) -> tuple[str, ...]:
    """Return the modules in ``trust`` and in METADIST_TRUST, an environment variable with names between spaces."""
    return *trusted(trust), *trusted(os.environ.get("METADIST_TRUST", "").split())


def trusted(names: Iterable[str]) -> tuple[str, ...]:
    """Return the names of trusted modules; one text is one name. Raises ConfigError where a name is no module's."""
    listed = (names,) if isinstance(names, str) else tuple(names)
    for name in listed:
        if name.endswith(".py") or not all(part.isidentifier() for part in name.split(".")):
            raise ConfigError(
                f"--trust {name}: expected the name of a module or package, such as mine (for mine.py) or mine.tasks"
            )
    return listed
