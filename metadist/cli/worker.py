"""``metadist worker``: this machine computes for a run whose driver is elsewhere."""

from __future__ import annotations

import signal
from typing import Annotated, Any

import typer

from metadist.cli.terminal import clean_errors, only_results_on_stdout, say, set_up_logging


class _Stop:
    """The first Ctrl-C or SIGTERM finishes the shard that is being computed; the second gives it back at once."""

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
        say("\nfinishing this shard; press Ctrl-C again to give it back at once")


def worker(
    connect: Annotated[
        str,
        typer.Option(
            metavar="HOST:PORT", help="Where the run's driver takes workers from outside (train … --outside)."
        ),
    ],
    token_file: Annotated[
        str | None, typer.Option(metavar="FILE", help="The token that the driver wants: its outside.token_file.")
    ] = None,
    tls_ca: Annotated[
        str | None, typer.Option(metavar="FILE", help="The PEM certificate of the driver or of its authority.")
    ] = None,
    role: Annotated[str, typer.Option(help="learner, or environment for rollouts alone.")] = "learner",
    name: Annotated[str | None, typer.Option(help="What the run calls this worker; default: the host's name.")] = None,
    device: Annotated[str | None, typer.Option(help="cpu, cuda, cuda:1, …; default: as the run's config says.")] = None,
    patience: Annotated[
        float, typer.Option(metavar="SECONDS", help="How long to wait for a driver that isn't there (again).", min=0)
    ] = 600.0,
    stay: Annotated[bool, typer.Option("--stay", help="Wait for the next run when one is over.")] = False,
) -> None:
    """Join a run from outside its Ray cluster: compute shards until it is over.

    The worker builds what the run's config names, import paths included: connect to drivers that you trust.
    """
    set_up_logging()
    with clean_errors():
        stop = _Stop()
        from metadist.experiment.remote import work

        with only_results_on_stdout():
            reason = work(
                connect,
                token_file=token_file,
                tls_ca=tls_ca,
                role=role,
                name=name,
                device=device,
                patience=patience,
                stay=stay,
                say=say,
                stopped=stop,
            )
        say(f"done: {reason}")
        if stop.asked:
            raise typer.Exit(130)
