"""``metadist worker``: compute on this machine for a run whose driver is on another machine."""

from __future__ import annotations

import signal
from typing import Annotated, Any

import typer

from metadist.cli.terminal import Trust, clean_errors, only_results_on_stdout, say, set_up_logging


class _Stop:
    """Finish the shard at the first Ctrl-C or SIGTERM, and give it back immediately at the second."""

    def __init__(self) -> None:
        self.asked = False
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, self._handle)

    def __call__(self) -> bool:
        return self.asked

    def _handle(self, number: int, frame: Any) -> None:
        self.asked = True
        for each in (signal.SIGINT, signal.SIGTERM):
            signal.signal(each, signal.default_int_handler)
        say("\nfinishing this shard; press Ctrl-C again to give it back immediately")


def worker(
    connect: Annotated[
        str,
        typer.Option(
            metavar="HOST:PORT", help="The address where the run's driver takes remote workers (train … --outside)."
        ),
    ],
    token_file: Annotated[
        str | None,
        typer.Option(metavar="FILE", help="A copy of the driver's outside.token_file."),
    ] = None,
    tls_ca: Annotated[
        str | None, typer.Option(metavar="FILE", help="The PEM certificate of the driver or of its authority.")
    ] = None,
    role: Annotated[str, typer.Option(help="learner, or environment for rollouts only.")] = "learner",
    name: Annotated[str | None, typer.Option(help="The worker's name in the run; default: the host's name.")] = None,
    device: Annotated[
        str | None, typer.Option(help="cpu, cuda, cuda:1, …; default: the device of the run's config.")
    ] = None,
    patience: Annotated[
        float, typer.Option(metavar="SECONDS", help="How long to wait for a driver that can't be reached.", min=0)
    ] = 600.0,
    stay: Annotated[bool, typer.Option("--stay", help="Wait for the next run when one is over.")] = False,
    trust: Trust = None,
) -> None:
    """Join a run from outside its Ray cluster, and compute shards until the run is over.

    The run's config may name metadist's own parts, installed plug-ins, and the modules that --trust allows.
    """
    set_up_logging()
    with clean_errors():
        stop = _Stop()
        from metadist.experiment.remote import WorkerOptions, work
        from metadist.workers.remote.client import Shell

        with only_results_on_stdout():
            options = WorkerOptions(token_file, tls_ca, role, name, device, patience, stay, trust or ())
            reason = work(connect, options, Shell(say, stop))
        say(f"done: {reason}")
        if stop.asked:
            raise typer.Exit(130)
