"""``metadist verify`` and ``metadist plan``."""

from __future__ import annotations

import json
from typing import Annotated

import typer

from metadist.cli.terminal import (
    AsJson,
    Overrides,
    Trust,
    Workers,
    clean_errors,
    only_results_on_stdout,
    set_up_logging,
)
from metadist.core.text import show as print  # no call can forget to escape control characters


def verify(
    config: Annotated[str, typer.Argument(help="A YAML file or the name of a shipped config.")],
    overrides: Overrides = None,
    workers: Annotated[
        str,
        typer.Option(
            metavar="N,N,…", help="Numbers of workers to compare; for several roles learners=1/environments=2."
        ),
    ] = "0,1,2",
    kill: Annotated[
        int, typer.Option(help="Kill this number of workers in every run, each with a shard in flight.", min=0)
    ] = 0,
    meta_steps: Annotated[int | None, typer.Option(help="Number of meta-steps, for shorter runs.", min=1)] = None,
    trust: Trust = None,
    as_json: AsJson = False,
) -> None:
    """Check that every number of workers gives the same final parameters bit for bit; exit code 1 if not."""
    set_up_logging()
    with clean_errors():
        from metadist.cli.display import show_verification
        from metadist.config.document import requested
        from metadist.experiment.live import plain
        from metadist.experiment.verify import counts
        from metadist.experiment.verify import verify as compare

        document = requested(config, overrides, trust=trust)
        with only_results_on_stdout():
            report = compare(document, counts(workers), kill=kill, meta_steps=meta_steps, display=plain())
        show_verification(report)
        if as_json:
            print(json.dumps(report))
        if not report["ok"]:
            raise typer.Exit(1)


def plan(
    config: Annotated[str, typer.Argument(help="A YAML file or the name of a shipped config.")],
    overrides: Overrides = None,
    workers: Workers = None,
    trust: Trust = None,
    as_json: AsJson = False,
) -> None:
    """Show how a new run computes its shards on workers like this machine, with reasons and the needed memory."""
    set_up_logging()
    with clean_errors():
        from metadist.cli.display import show_plan
        from metadist.config.build import build
        from metadist.config.document import requested
        from metadist.experiment.fleet import local_plan

        document = requested(config, overrides, workers, trust)
        with only_results_on_stdout():
            report = local_plan(build(document)).as_dict()
        show_plan(report)
        if as_json:
            print(json.dumps(report))
