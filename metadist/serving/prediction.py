"""Predict folders of images, or files of arrays, by a model in this process or by a server."""

from __future__ import annotations

import sys
import zipfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from metadist.core.errors import ConfigError, DataError, first_line
from metadist.core.tree import Tree, as_lists, at, first, mapped, of_names
from metadist.serving.load import open_model
from metadist.tasks.decode import Decode
from metadist.tasks.folders import by_class

AdaptPredict = Callable[[Tree, Tree, Tree, "int | None"], Tree]
"""(support x [N, …], support y [N], queries [Q, …], inner steps) → logits [Q, classes]."""


@dataclass(frozen=True)
class ModelSource:
    """The model of a prediction.

    ``location`` is a run directory, an exported file, a registered model, or HOST:PORT of ``metadist serve``.
    ``model``, ``token_file`` and ``tls_ca`` apply to a server, ``normalization`` and ``trust`` (the modules
    that the model's config may name) apply to the others.
    """

    location: str
    model: str = ""
    normalization: str | None = None
    token_file: str | None = None
    tls_ca: str | None = None
    trust: Sequence[str] = ()


def predict_folders(source: ModelSource, support: str, query: str, inner_steps: int | None = None) -> dict[str, Any]:
    """Adapt to ``support/CLASS/IMAGE`` and classify every image below ``query``.

    Returns plain data for JSON: the model, the classes, a prediction for each image, and the accuracy if the images of
    ``query`` are in folders of the same names. Raises ``ConfigError`` for a model without images, ``DataError`` for
    wrong folders.
    """
    with opened_model(source) as (about, adapt_predict):
        images = about.get("images")
        if about["kind"] != "classification" or images is None:
            raise ConfigError(
                f"predict: model '{about['name']}' ({about['kind']}) does not classify images; give arrays x and y as "
                "--support FILE.npz and x as --query FILE.npz"
            )
        decode = Decode(images["size"], images["channels"], images["invert"], images.get("white"))
        x, names, labels = by_class(decode, _folder("--support", support))
        classes = sorted(set(labels))
        if not names or "" in classes:
            wrong = f"'{names[labels.index('')]}' is in no class folder" if "" in classes else "there are no images"
            raise DataError(f"--support {support}: {wrong}; expected {support}/CLASS/IMAGE.png, one folder per class")
        if len(classes) < 2 or (len(classes) > about["outputs"] and not about["any_classes"]):
            most = "or more" if about["any_classes"] else f"to {about['outputs']}"
            raise DataError(f"--support {support}: {len(classes)} classes; model '{about['name']}' takes 2 {most}")
        queries, files, truths = by_class(decode, _folder("--query", query))
        if not files:
            raise DataError(f"--query {query}: there are no images")
        y = torch.tensor([classes.index(label) for label in labels])
        logits = adapt_predict(torch.from_numpy(x), y, torch.from_numpy(queries), inner_steps)
    rows = _rows(logits, classes, files, truths)
    judged = [row["class"] == row["predicted"] for row in rows if "class" in row]
    return {
        "model": about["name"],
        "algorithm": about["algorithm"],
        "normalization": about["normalization"],
        "classes": classes,
        "support": len(names),
        "predictions": rows,
        "accuracy": sum(judged) / len(judged) if judged else None,
    }


def predict_arrays(source: ModelSource, support: str, query: str, inner_steps: int | None = None) -> dict[str, Any]:
    """Adapt to the arrays x [N, …] and y [N, …] of the file ``support`` (.npz), and predict x [Q, …] of ``query``.

    The arrays of a dict or tuple have names such as x.ids and x.0.
    Returns plain data for JSON: a prediction for each row, and where ``query`` has y the accuracy, or for values the
    mean squared error. Raises ``DataError`` for wrong files, ``InvalidInput`` where arrays do not fit the model.
    """
    given, asked = _arrays("--support", support, ("x", "y")), _arrays("--query", query, ("x",))
    with opened_model(source) as (about, adapt_predict):
        prediction = mapped(Tensor.double, adapt_predict(given["x"], given["y"], asked["x"], inner_steps))
    report = {
        "model": about["name"],
        "algorithm": about["algorithm"],
        "normalization": about["normalization"],
        "support": len(first(given["x"])),
        "accuracy": None,
    }
    target = asked.get("y")
    if target is not None:
        _check_truths(query, target, len(first(prediction)), about["kind"] == "classification")
    if about["kind"] != "classification":
        rows = [{"row": i, "predicted": as_lists(at(prediction, i))} for i in range(len(first(prediction)))]
        return {**report, "predictions": rows, **_squared_error(prediction, target)}
    best, which = torch.softmax(prediction, -1).max(-1)
    rows = [
        {"row": i, "predicted": c, "probability": round(p, 4)}
        for i, (c, p) in enumerate(zip(which.tolist(), best.tolist()))
    ]
    accuracy = None if target is None else float((which == target).double().mean())
    return {**report, "classes": sorted(set(given["y"].tolist())), "predictions": rows, "accuracy": accuracy}


def _check_truths(query: str, target: Tree, rows: int, classes: bool) -> None:
    """Raise ``DataError`` for targets that are not one for each of ``rows`` predictions: others would broadcast."""
    shape = tuple(first(target).shape)
    if shape[:1] != (rows,):
        raise DataError(f"--query {query}: y has {shape[0] if shape else 'no'} rows and x {rows}")
    if classes and (not isinstance(target, Tensor) or len(shape) > 1):
        raise DataError(f"--query {query}: y has shape {list(shape)}; expected classes [{rows}]")


def _squared_error(prediction: Tree, target: Tree) -> dict[str, float]:
    """Return the mean squared error where both are one array of as many numbers, else nothing."""
    single = isinstance(prediction, Tensor) and isinstance(target, Tensor)
    if not single or prediction.numel() != target.numel():
        return {}
    return {"mse": float((prediction - target.view_as(prediction)).square().mean())}


def _arrays(option: str, path: str, needed: Sequence[str]) -> dict[str, Tree]:
    """Return x and y of a ``.npz`` file: an array, or a dict or tuple of arrays (x.ids, x.0)."""
    found = {}
    try:
        with np.load(path, allow_pickle=False) as file:
            for part in ("x", "y"):
                names = [name for name in file.files if name.partition(".")[0] == part]
                if names:
                    found[part] = of_names({n.partition(".")[2]: torch.from_numpy(file[n]) for n in names})
    except (OSError, ValueError, TypeError, zipfile.BadZipFile) as error:
        raise DataError(f"{option} {path}: can't be read as arrays ({first_line(error)})") from None
    if missing := [name for name in needed if name not in found]:
        raise DataError(f"{option} {path}: has no array {' and no '.join(missing)}; expected {', '.join(needed)}")
    return found


def _rows(logits: Tensor, classes: Sequence[str], files: Sequence[str], truths: Sequence[str]) -> list[dict[str, Any]]:
    """Return the predicted class and its probability for each image, and the true class where it is known."""
    probabilities = torch.softmax(logits[:, : len(classes)].double(), -1)
    rows = []
    for file, truth, row_probabilities in zip(files, truths, probabilities):
        best = int(row_probabilities.argmax())
        row = {"image": file, "predicted": classes[best], "probability": round(float(row_probabilities[best]), 4)}
        rows.append({**row, "class": truth} if truth in classes else row)
    return rows


def _folder(option: str, path: str) -> str:
    if "://" not in path and not Path(path).is_dir():
        raise DataError(f"{option} {path}: no such folder")
    return path


@contextmanager
def opened_model(source: ModelSource) -> Iterator[tuple[Mapping[str, Any], AdaptPredict]]:
    """Open the model; yield its description (``ServedModel.describe``) and a function that adapts and predicts."""
    if _is_address(source.location):
        with _remote(source) as opened:
            yield opened
        return
    # The limits of requests protect a server; here the user's own memory decides.
    limits: dict[str, Any] = {"support": sys.maxsize, "queries": sys.maxsize}
    model = open_model(source.location, normalization=source.normalization, trust=source.trust, **limits)
    yield model.describe(), model.adapt_predict


@contextmanager
def _remote(source: ModelSource) -> Iterator[tuple[Mapping[str, Any], AdaptPredict]]:
    from metadist.serving.client import Client

    if source.normalization is not None:
        raise ConfigError("--normalization: the server decides it; give the option to 'metadist serve'")
    with Client(source.location, token_file=source.token_file, tls_ca=source.tls_ca) as client:
        models = {m["name"]: m for m in client.models()}
        name = source.model or next(iter(models))
        if name not in models or (not source.model and len(models) > 1):
            raise ConfigError(
                f"--model '{source.model}': the server at {source.location} has {', '.join(models)}; choose one of them"
            )

        def ask(x: Tensor, y: Tensor, query: Tensor, steps: int | None) -> Tensor:
            return client.adapt_predict(x, y, query, model=name, inner_steps=steps)

        yield models[name], ask


def _is_address(source: str) -> bool:
    if source.startswith(("grpc://", "grpcs://")):
        return True
    host, _, port = source.rpartition(":")
    return bool(host) and port.isdecimal() and "/" not in source and not Path(source).exists()
