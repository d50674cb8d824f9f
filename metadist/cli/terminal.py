"""Common parts of the commands: options, errors in one line, and a stdout that contains only results."""

from __future__ import annotations

import io
import logging
import os
import sys
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, redirect_stdout
from typing import Annotated, Any

import typer

from metadist.core.text import printable, show

Overrides = Annotated[
    list[str] | None, typer.Argument(metavar="[KEY=VALUE]…", help="Override config keys: outer.lr=1e-3")
]
AsJson = Annotated[bool, typer.Option("--json", help="Print one JSON object as the last line of stdout.")]
Workers = Annotated[
    str | None,
    typer.Option(
        "--workers", metavar="N", help="Number of workers; 0: compute in this process; learners=2: for one role."
    ),
]

Weights = Annotated[
    str | None,
    typer.Option(metavar="KIND", help="trained or averaged; default: averaged, where the run averages its parameters."),
]
Trust = Annotated[
    list[str] | None,
    typer.Option(
        "--trust",
        metavar="MODULE",
        envvar="METADIST_TRUST",
        help="Let a run or model that may be somebody else's run the code of this module; repeat it for several.",
    ),
]


@contextmanager
def clean_errors() -> Iterator[None]:
    """Turn a MetadistError into one line on stderr and exit code 2."""
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
    """Redirect stdout to stderr: Ray reports dead workers on stdout, and a user's code may print."""
    return redirect_stdout(sys.stderr)


def say(message: str) -> None:
    """Print a message to stderr."""
    show(message, file=sys.stderr, flush=True)


class LogFormatter(logging.Formatter):
    """Write control characters as escapes, and indent further lines: a text in a record can't imitate a record."""

    def __init__(self) -> None:
        super().__init__("%(levelname)s %(name)s: %(message)s")

    def format(self, record: logging.LogRecord) -> str:
        return printable(super().format(record), keep="\n\t").replace("\n", "\n    ")


def provide_streams() -> None:
    """Open the standard streams that the caller has closed, and print characters that they lack as ``?``.

    Otherwise the next file that is opened becomes stdout.
    """
    for descriptor, name, mode in ((0, "stdin", "r"), (1, "stdout", "w"), (2, "stderr", "w")):
        if getattr(sys, name) is None:
            opened = os.open(os.devnull, os.O_RDWR)
            if opened != descriptor:
                os.dup2(opened, descriptor)
                os.close(opened)
            setattr(sys, name, os.fdopen(descriptor, mode, encoding="utf-8"))
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="replace")


def set_up_logging(verbose: bool = False) -> None:
    """Send warnings to stderr; with ``verbose`` also what metadist does."""
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(LogFormatter())
    logging.basicConfig(level=logging.WARNING, handlers=[handler])
    logging.getLogger("metadist").setLevel(logging.INFO if verbose else logging.WARNING)


def numbers(option: str, text: str) -> list[int]:
    """Return ``0,1,2`` as a list. Raises ConfigError where a number occurs twice or is not a whole number."""
    from metadist.core.errors import ConfigError

    parts = [p.strip() for p in text.split(",")]
    if not all(p.isdecimal() for p in parts) or len(set(parts)) < len(parts):
        raise ConfigError(f"{option} {text}: expected different whole numbers, such as 0,1,2")
    return [int(p) for p in parts]
