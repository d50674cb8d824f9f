"""``metadist predict``: classify folders of images."""

from __future__ import annotations

import json
from typing import Annotated

import typer

from metadist.cli.terminal import AsJson, Trust, clean_errors, only_results_on_stdout, set_up_logging
from metadist.core.text import show as print  # no call can forget to escape control characters


def predict(
    source: Annotated[
        str,
        typer.Argument(
            metavar="ADDRESS_OR_RUN", help="HOST:PORT of metadist serve, a run directory, or an exported file."
        ),
    ],
    support: Annotated[str, typer.Option(metavar="FOLDER", help="The labelled images: one folder per class.")],
    query: Annotated[
        str, typer.Option(metavar="FOLDER", help="The images to classify; class folders give an accuracy.")
    ],
    model: Annotated[str, typer.Option(help="For a server with several models: the model's name.")] = "",
    inner_steps: Annotated[int | None, typer.Option(help="Adaptation steps; default: as in training.", min=0)] = None,
    normalization: Annotated[
        str | None, typer.Option(help="For a run: transductive or inductive batch norm; default: as in the run.")
    ] = None,
    token_file: Annotated[str | None, typer.Option(metavar="FILE", help="The server's token.")] = None,
    tls_ca: Annotated[
        str | None, typer.Option(metavar="FILE", help="The server's certificate authority (PEM).")
    ] = None,
    trust: Trust = None,
    as_json: AsJson = False,
) -> None:
    """Adapt to a few labelled images per class, and classify other images. Images are converted as in training."""
    set_up_logging()
    with clean_errors():
        from metadist.cli.display import show_predictions
        from metadist.serving.prediction import ModelSource, predict_folders

        with only_results_on_stdout():
            opened = ModelSource(source, model, normalization, token_file, tls_ca, trust or ())
            report = predict_folders(opened, support, query, inner_steps)
        show_predictions(report)
        if as_json:
            print(json.dumps(report))
