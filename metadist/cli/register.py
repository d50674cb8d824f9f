"""``metadist register``: add a run's model to MLflow's registry."""

from __future__ import annotations

from typing import Annotated

import typer

from metadist.cli.terminal import Trust, clean_errors, only_results_on_stdout, say, set_up_logging


def register(
    run: Annotated[str, typer.Argument(metavar="RUN", help="The run directory that train printed.")],
    name: Annotated[str, typer.Argument(help="The registered model that receives a new version.")],
    trust: Trust = None,
) -> None:
    """Register a run's best parameters as an MLflow model: candidate, and champion unless another validated better."""
    set_up_logging()
    with clean_errors():
        from metadist.experiment.registration import register_run

        with only_results_on_stdout():
            version = register_run(run, name, trust or ())
        say(f"registered models:/{name}/{version}")
