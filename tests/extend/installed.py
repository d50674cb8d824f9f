"""Packages as pip leaves them: modules, and a ``.dist-info`` folder that declares entry points."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

#: an algorithm, a task family, an environment, models and trackers that a package of its own may have
GOOD = '''
"""Plug-ins of every kind."""
from dataclasses import dataclass

import torch
from torch import nn

from metadist import MAML, Sinusoid
from metadist.environments import Bandit
from metadist.tracking import Tracker


@dataclass(frozen=True)
class Slow(MAML):
    """MAML at a low rate.

    No list shows this line.
    """

    inner_lr: float = 0.001


@dataclass(frozen=True, kw_only=True)
class Waves(Sinusoid):
    """Sinusoids of short waves."""

    x_range: tuple[float, float] = (-9.0, 9.0)


@dataclass(frozen=True)
class Arms(Bandit):
    pass


@dataclass(frozen=True)
class Narrow:
    """A network of one hidden layer."""

    width: int = 4

    def build(self, input_shape, outputs):
        return nn.Sequential(nn.Linear(input_shape[0], self.width), nn.Tanh(), nn.Linear(self.width, outputs))


def line(width: int = 1):
    """A linear function."""
    return nn.Linear(width, 1)


class Lines(Tracker):
    """Points as lines of a text file."""

    def __init__(self, uri, *, spool, experiment, runs_root):
        self.path = runs_root / uri.partition("://")[2]
        self.lines = [f"{uri} {experiment} {spool.name}"]

    def metrics(self, step, values):
        self.lines += [f"{step} {name}" for name in values]

    def finish(self, status, timeout):
        self.path.write_text("\\n".join([*self.lines, status]))
        return 0


def picky(uri, *, spool, experiment, runs_root):
    raise ValueError(f"{uri} lacks\\na project")


def wrong(uri, *, spool, experiment, runs_root):
    return {"uri": uri}


number = 3
'''

ALL = {
    "algorithms": {"slow": "Slow"},
    "tasks": {"waves": "Waves"},
    "environments": {"arms": "Arms"},
    "models": {"narrow": "Narrow", "line": "line"},
    "trackers": {"lines": "Lines", "picky": "picky", "wrong": "wrong"},
}


def entry_points(module: str, groups: Mapping[str, Mapping[str, str]]) -> str:
    """The text of ``entry_points.txt``: group → name → attribute of ``module``."""
    lines = []
    for group, names in groups.items():
        lines += [f"[metadist.{group}]", *(f"{name} = {module}:{value}" for name, value in names.items())]
    return "\n".join(lines)


def install(folder: Path, project: str, points: str, *, version: str = "1.0", **modules: str) -> Path:
    """Write the package into ``folder``, which is to be on ``sys.path``."""
    folder.mkdir(parents=True, exist_ok=True)
    for name, text in modules.items():
        (folder / f"{name}.py").write_text(text)
    about = folder / f"{project.replace('-', '_')}-{version}.dist-info"
    about.mkdir()
    (about / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {project}\nVersion: {version}\n")
    (about / "entry_points.txt").write_text(points + "\n")
    return folder
