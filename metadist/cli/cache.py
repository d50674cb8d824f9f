"""``metadist cache``."""

from __future__ import annotations

from typing import Annotated

import typer

from metadist.cli.terminal import clean_errors, say
from metadist.core.text import show as print  # no call can forget to escape control characters


def cache(
    action: Annotated[str, typer.Argument(metavar="[size|clean]", help="Show what it holds, or empty it.")] = "size",
    days: Annotated[float, typer.Option(help="clean: only what was not used for this many days.", min=0)] = 0.0,
) -> None:
    """Show or empty the cache of this machine: decoded images, copies of remote data, and files of remote runs.

    Everything is made again where it is needed. Records of remote runs that MLflow does not have yet stay.
    """
    with clean_errors():
        from metadist.core.errors import one_of
        from metadist.storage.places import cache_root
        from metadist.storage.usage import entries, remove
        from metadist.tracking import undelivered

        one_of("cache", action, ("size", "clean"))
        root = cache_root()
        found = entries(root)
        print(f"cache           {root}")
        freed = 0
        for entry in found:
            waiting = undelivered(entry.path / "tracking")
            old = entry.idle_days >= days
            kept = f"kept: {waiting} records wait for MLflow (metadist ui)" if waiting else ""
            if action == "clean" and old and not waiting:
                freed += remove(entry)
            if action == "size" or kept:
                print(f"{_size(entry.bytes):>10}  {entry.idle_days:6.1f} days  {entry.name}  {kept}".rstrip())
        total = sum(entry.bytes for entry in found)
        print(f"freed           {_size(freed)}" if action == "clean" else f"total           {_size(total)}")
        if action == "size" and found:
            say("metadist cache clean empties it")


def _size(count: float) -> str:
    for unit in ("B", "KiB", "MiB", "GiB"):
        if count < 1024 or unit == "GiB":
            break
        count /= 1024
    return f"{count:.0f} {unit}" if unit == "B" else f"{count:.1f} {unit}"
