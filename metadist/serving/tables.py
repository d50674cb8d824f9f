"""Predict the rows of a table, by a model in this process or by a server."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor

from metadist.core.errors import ConfigError
from metadist.serving.prediction import ModelSource, opened_model
from metadist.tasks.location import located
from metadist.tasks.table_columns import SUFFIXES, Encoding, TableColumns, read_table


def is_table(path: str) -> bool:
    """Return whether ``path`` is named as a CSV, Parquet, Arrow or Feather file."""
    return path.lower().endswith(SUFFIXES)


def predict_tables(source: ModelSource, support: str, query: str, inner_steps: int | None = None) -> dict[str, Any]:
    """Adapt to the rows of the table ``support``, and predict the target of every row of the table ``query``.

    Returns plain data for JSON: a prediction for each row, in the units of the table, and where ``query`` has the
    target the accuracy or the mean absolute error. Raises ``ConfigError`` for a model that was not trained on tables,
    ``DataError`` for a table without the columns of the model.
    """
    with opened_model(source) as (about, adapt_predict):
        if not about.get("table"):
            raise ConfigError(
                f"predict: model '{about['name']}' was not trained on tables; give folders of images, or arrays x and "
                "y as --support FILE.npz and x as --query FILE.npz"
            )
        encoding = Encoding.from_json(about["table"])
        known, asked = (
            _columns(encoding, option, path) for option, path in (("--support", support), ("--query", query))
        )
        x, y = (torch.from_numpy(t) for t in encoding.rows(known))
        prediction = adapt_predict(x, y, torch.from_numpy(encoding.inputs(asked)), inner_steps).double()
    report = {
        "model": about["name"],
        "algorithm": about["algorithm"],
        "normalization": about["normalization"],
        "support": len(x),
        "accuracy": None,
    }
    truth = all(name in asked.table.column_names for name in encoding.target)
    if encoding.classes:
        return {**report, **_classes(encoding, prediction, encoding.targets(asked) if truth else None)}
    values = encoding.in_units(prediction.reshape(len(prediction), -1).numpy())
    rows = [{"row": i, "predicted": row} for i, row in enumerate(values.tolist())]
    if not truth:
        return {**report, "predictions": rows}
    actual = encoding.in_units(encoding.targets(asked).astype(np.float64))
    return {**report, "predictions": rows, "mae": float(np.abs(values - actual).mean())}


def _columns(encoding: Encoding, option: str, path: str) -> TableColumns:
    where = f"{option} {path}"
    table = read_table(located(option, path), where)
    target = [name for name in encoding.target if name in table.column_names or option == "--support"]
    return TableColumns.of(table, where, None, target, encoding.features, None)


def _classes(encoding: Encoding, logits: Tensor, truth: np.ndarray | None) -> dict[str, Any]:
    best, which = torch.softmax(logits, -1).max(-1)
    rows = [
        {"row": i, "predicted": encoding.classes[c], "probability": round(p, 4)}
        for i, (c, p) in enumerate(zip(which.tolist(), best.tolist()))
    ]
    accuracy = None if truth is None else float((which.numpy() == truth).mean())
    return {"classes": list(encoding.classes), "predictions": rows, "accuracy": accuracy}
