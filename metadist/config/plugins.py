"""Components of installed packages, which declare them as entry points.

The groups are ``metadist.algorithms``, ``metadist.tasks``, ``metadist.environments``, ``metadist.models`` and
``metadist.trackers``. Entry points are read only for a name that metadist's own tables do not hold, and for
``metadist list``. ``docs/extend.md`` shows a package that declares some.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from importlib import metadata
from typing import Generic, TypeVar

from metadist.core.errors import ConfigError, first_line

T = TypeVar("T")
Component = TypeVar("Component", covariant=True)


@dataclass(frozen=True)
class Kind(Generic[Component]):
    """A kind of component.

    ``plural`` is its word in ``metadist list``; its entry points are in the group ``metadist.<plural>``. ``own`` is the
    table of metadist's names. A plug-in must satisfy ``accepts``; ``expected`` says the same in words. ``makes``: the
    types of the objects that a config may name by import path, or that a function may make.
    """

    plural: str
    own: Mapping[str, Component]
    accepts: Callable[[object], bool]
    expected: str
    makes: tuple[type, ...] = ()

    @property
    def group(self) -> str:
        """The group of entry points."""
        return f"metadist.{self.plural}"


@dataclass(frozen=True)
class Plugin:
    """An entry point: ``name`` stands for the object ``module:attribute`` of ``distribution`` ("project version")."""

    name: str
    distribution: str
    entry_point: metadata.EntryPoint

    def __str__(self) -> str:
        return f"plug-in '{self.name}' of {self.distribution} ({self.entry_point.value})"

    def load(self, kind: Kind[T]) -> T:
        """Import the object. Raises ConfigError, one line that names the distribution, where it is unusable."""
        remedy = f"update or uninstall {self.distribution.partition(' ')[0]}"
        try:
            found: T = self.entry_point.load()
        except SystemExit as error:
            raise ConfigError(f"{self} can't be imported: it ends the process (SystemExit); {remedy}") from error
        except Exception as error:
            raise ConfigError(f"{self} can't be imported: {first_line(error)}; {remedy}") from error
        if not kind.accepts(found):
            raise ConfigError(f"{self} is {_short(found)}; expected {kind.expected}; {remedy}")
        return found


@dataclass(frozen=True)
class Plugins:
    """The plug-ins of one kind: those that can be used, by name, and one line for each problem."""

    usable: Mapping[str, Plugin]
    #: name → why no plug-in of this name can be used
    refused: Mapping[str, str]
    #: distributions whose entry points can't be read
    unreadable: tuple[str, ...]

    @property
    def problems(self) -> list[str]:
        """One line for each plug-in that can't be used."""
        return [*self.refused.values(), *self.unreadable]


def plugins(kind: Kind[T]) -> Plugins:
    """Read the entry points of ``kind``. Imports none of them."""
    found, unreadable = _declared(kind.group)
    usable, refused = dict[str, Plugin](), dict[str, str]()
    for name, declared in found.items():
        where = " and ".join(sorted(p.distribution for p in declared))
        if name in kind.own:
            refused[name] = f"{declared[0]} is ignored: metadist has {kind.plural} of this name; rename the entry point"
        elif len(declared) > 1:
            refused[name] = f"plug-in '{name}' ({kind.group}) is declared by {where}; uninstall one of them"
        else:
            usable[name] = declared[0]
    return Plugins(usable, refused, unreadable)


def find(kind: Kind[T], name: str) -> T | None:
    """Return the object that a plug-in declares as ``name``, or None where none does.

    Raises ConfigError where the plug-in can't be imported or is of the wrong type, and where two packages declare the
    name.
    """
    found = plugins(kind)
    if name in found.refused:
        raise ConfigError(found.refused[name])
    return found.usable[name].load(kind) if name in found.usable else None


def entry_point_names(group: str) -> set[str]:
    """Return the names of all entry points of ``group``."""
    return set(_declared(group)[0])


def _declared(group: str) -> tuple[dict[str, list[Plugin]], tuple[str, ...]]:
    """Name → entry points of ``group``, each distribution once; and a line for each distribution that can't be read."""
    found, unreadable, seen = dict[str, list[Plugin]](), list[str](), set[str]()
    for distribution in metadata.distributions():
        try:
            # One malformed line raises; it must not hide the entry points of other packages.
            declared = [point for point in distribution.entry_points if point.group == group]
            about = f"{distribution.metadata['Name']} {distribution.version}" if declared else ""
        except Exception as error:
            unreadable.append(
                f"the entry points of {_name(distribution)} can't be read: {first_line(error)}; reinstall it"
            )
            continue
        # An older copy further down sys.path is hidden by the first one, as its modules are.
        project = about.partition(" ")[0].lower().replace("-", "_")
        if declared and project not in seen:
            seen.add(project)
            for point in declared:
                found.setdefault(point.name, []).append(Plugin(point.name, about, point))
    return found, tuple(unreadable)


def _name(distribution: metadata.Distribution) -> str:
    try:
        return str(distribution.metadata["Name"])
    except Exception:  # the metadata may be damaged too
        return f"a distribution in {distribution.locate_file('')}"


def _short(value: object) -> str:
    return " ".join(repr(value).split())[:120]


def described(component: object) -> str:
    """Return the first line of the docstring of a class or function."""
    lines = (component.__doc__ or "").strip().splitlines()
    return lines[0] if lines else "no description"
