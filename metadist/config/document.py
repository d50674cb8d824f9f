"""Read config files, apply overrides and the worker options of the command line."""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from metadist.config.groups import ROLES
from metadist.config.schema import Document, parse_document, parse_yaml
from metadist.config.trust import check_trust
from metadist.core.errors import ConfigError, nearest

#: the largest number of remote workers of a role, where the config does not say
MOST_OUTSIDE = 16


def config_folders() -> list[Path]:
    """Return the folders of shipped configs: in the wheel inside the package, in a checkout next to it."""
    here = Path(__file__).parents[1]
    return [folder for folder in (here / "configs", here.parent / "configs") if folder.is_dir()]


def shipped_configs() -> dict[str, Path]:
    """Return the shipped configs: name → file."""
    return {path.stem: path for folder in reversed(config_folders()) for path in sorted(folder.glob("*.yaml"))}


def requested(
    config: str, overrides: Sequence[str] | None, workers: str | None = None, trust: Sequence[str] | None = None
) -> Document:
    """Return the document of a command line: a config with ``KEY=VALUE`` overrides and ``--workers``."""
    document = override(read_document(config, trust or ()), overrides or [])
    return document if workers is None else set_workers(document, workers)


def read_document(config: str, trust: Sequence[str] = ()) -> Document:
    """Read the YAML file at a path, or the shipped config of that name.

    A config in a run directory may be somebody else's: it may name only modules that are in ``trust``.
    """
    path = Path(config)
    if not os.path.isfile(config):  # False where even the name is impossible
        shipped = shipped_configs()
        if os.path.exists(config):
            raise ConfigError(
                f"config '{config}' is a folder; expected a YAML file"
                if path.is_dir()
                else f"config '{config}' is no file"
            )
        if config not in shipped:
            raise ConfigError(
                f"config '{config}' is neither a file nor a shipped config: "
                f"{', '.join(sorted(shipped))}{nearest(config, shipped)}"
            )
        path = shipped[config]
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"config '{config}' can't be read: {error}") from error
    document = parse_document(text, str(config))
    if path.parent.joinpath("run.json").is_file():
        check_trust(document, f"config '{config}' of a run directory", trust)
    return document


def override(document: Document, assignments: Sequence[str]) -> Document:
    """Apply ``a.b=value`` to a copy. Values are YAML; lists are indexed: ``workers.0.cpus=2``."""
    document = json.loads(json.dumps(document))
    for assignment in assignments:
        path, equals, text = assignment.partition("=")
        if not equals or not path:
            raise ConfigError(f"override '{assignment}': expected KEY=VALUE, such as outer.lr=1e-3")
        *parents, last = path.split(".")
        where: Any = document
        for key in parents:
            where = _step_into(where, key, path)
        value = parse_yaml(text, f"override '{assignment}'")
        if isinstance(where, list):
            where[_index(where, last, path)] = value
        elif isinstance(where, dict):
            where[last] = value
        else:
            raise ConfigError(f"override '{path}': '{parents[-1]}' is the value {where!r} and has no key '{last}'")
    return document


def _step_into(where: Any, key: str, path: str) -> Any:
    if isinstance(where, list):
        return where[_index(where, key, path)]
    if not isinstance(where, dict):
        raise ConfigError(f"override '{path}': {where!r} has no key '{key}'")
    if where.get(key) is None:
        where[key] = {}
    return where[key]


def _index(items: list[Any], key: str, path: str) -> int:
    if not key.isdecimal() or int(key) >= len(items):
        raise ConfigError(f"override '{path}': '{key}' is not an index below {len(items)}")
    return int(key)


def set_workers(document: Document, workers: str) -> Document:
    """Return the config with other numbers of workers.

    ``N`` sets the number of learners and leaves the environment workers as they are; 0 computes everything in this
    process. ``learners=1,environments=2`` sets the number for each role. A role without a group in the config gets a
    new group.
    """
    groups = document.get("workers") or [{"role": "learner"}]
    if not isinstance(groups, list) or not all(isinstance(g, dict) for g in groups):
        raise ConfigError(f"workers: expected a list of groups, such as [{{role: learner, max: 2}}], got {groups!r}")
    groups = [dict(g) for g in groups]
    for role, count in _counts(workers, "environment" in document).items():
        chosen = [g for g in groups if g.get("role", "learner") == role and not g.get("outside")]
        if not chosen:
            chosen = [{"role": role, "gpus": 0 if role == "environment" else "auto"}]
            groups += chosen
        for group in chosen:
            group.update(min=count, max=count)
    if workers.strip() == "0":
        for group in groups:
            group.update(min=0, max=0)
    return {**document, "workers": groups}


def set_outside(document: Document, listen: str) -> Document:
    """Return the config with remote workers for every role that its workers have; they connect to ``listen``."""
    groups = [dict(g) for g in document.get("workers") or [{"role": "learner"}]]
    roles = {g.get("role", "learner") for g in groups if g.get("max", 1) or g.get("role", "learner") == "learner"}
    for role in sorted(roles):
        outside = [g for g in groups if g.get("outside") and g.get("role", "learner") == role]
        if not outside:
            groups.append({"role": role, "min": 0, "max": MOST_OUTSIDE, "outside": True})
        for group in outside:
            group["max"] = group.get("max") or MOST_OUTSIDE
    return {**document, "workers": groups, "outside": {**(document.get("outside") or {}), "listen": listen}}


def _counts(workers: str, trials: bool) -> dict[str, int]:
    """Return the number of workers for each role that the text of ``--workers`` names."""
    counts: dict[str, int] = {}
    for part in workers.split(","):
        name, equals, number = part.partition("=")
        role = name.strip().removesuffix("s") if equals else "learner"
        number = number if equals else part
        if not number.strip().isdecimal():
            raise ConfigError(
                f"--workers {workers}: expected a number, such as 2, or role=number, such as learners=1,environments=2"
            )
        if role not in ROLES:
            raise ConfigError(f"--workers {workers}: '{role}' is not one of {', '.join(ROLES)}{nearest(role, ROLES)}")
        if role in counts:
            raise ConfigError(f"--workers {workers}: {role}s are given twice")
        if role == "environment" and not trials:
            raise ConfigError(f"--workers {workers}: supervised tasks have no environments; expected learners alone")
        counts[role] = int(number)
    if counts.get("environment") and counts.get("learner") == 0:
        raise ConfigError(
            f"--workers {workers}: environments alone learn nothing; expected at least learners=1, or 0 to compute "
            "all in this process"
        )
    return counts
