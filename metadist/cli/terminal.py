"""What every command shares: its common options, errors as one line, and a stdout that holds results alone."""

from __future__ import annotations

import logging
import sys
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, redirect_stdout
from typing import Annotated, Any

import typer

Overrides = Annotated[
    list[str] | None, typer.Argument(metavar="[KEY=VALUE]…", help="Override config keys: outer.lr=1e-3")
]
AsJson = Annotated[bool, typer.Option("--json", help="Print one JSON object as the last line of stdout.")]
Workers = Annotated[
    str | None,
    typer.Option(
        "--workers", metavar="N", help="Number of workers; 0 computes in this process; learners=2 for a role."
    ),
]


@contextmanager
def clean_errors() -> Iterator[None]:
    """A user's mistake is one line on stderr and exit code 2."""
    from metadist.core.errors import MetadistError

    try:
        yield
    except MetadistError as error:
        say(f"error: {' '.join(str(error).split())}")
        raise typer.Exit(2) from None
    except KeyboardInterrupt:
        say("interrupted")
        raise typer.Exit(130) from None


def only_results_on_stdout() -> AbstractContextManager[Any]:
    """Ray reports dead workers on stdout, and so may a user's own code; both belong on stderr."""
    return redirect_stdout(sys.stderr)


def say(message: str) -> None:
    print(message, file=sys.stderr, flush=True)


def set_up_logging(verbose: bool = False) -> None:
    logging.basicConfig(level=logging.WARNING, format="%(levelname)s %(name)s: %(message)s", stream=sys.stderr)
    logging.getLogger("metadist").setLevel(logging.INFO if verbose else logging.WARNING)


def numbers(option: str, text: str) -> list[int]:
    """``0,1,2`` as a list."""
    from metadist.core.errors import ConfigError

    parts = [p.strip() for p in text.split(",")]
    if not all(p.isdecimal() for p in parts) or len(set(parts)) < len(parts):
        raise ConfigError(f"{option} {text}: expected different whole numbers, such as 0,1,2")
    return [int(p) for p in parts]
