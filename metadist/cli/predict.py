"""``metadist predict``: predict folders of images, or files of arrays."""

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
    support: Annotated[
        str, typer.Option(metavar="FOLDER", help="The labelled images: one folder per class. Or FILE.npz with x and y.")
    ],
    query: Annotated[
        str,
        typer.Option(
            metavar="FOLDER", help="The images to classify; class folders give an accuracy. Or FILE.npz with x."
        ),
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
    """Adapt to a few labelled images per class, and classify other images. Images are converted as in training.

    A model of tables takes two tables (CSV, Parquet, Arrow) with the columns of its training. Other models take arrays:
    x [N, …] and y [N, …] in a .npz file as the support set, x in another one as the queries.
    """
    set_up_logging()
    with clean_errors():
        from metadist.cli.display import show_predictions
        from metadist.serving.prediction import ModelSource, predict_arrays, predict_folders
        from metadist.serving.tables import is_table, predict_tables

        with only_results_on_stdout():
            opened = ModelSource(source, model, normalization, token_file, tls_ca, trust or ())
            arrays = predict_arrays if support.endswith(".npz") else predict_folders
            report = (predict_tables if is_table(support) else arrays)(opened, support, query, inner_steps)
        show_predictions(report)
        if as_json:
            print(json.dumps(report))
