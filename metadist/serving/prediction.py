"""Classify folders of images, by a model in this process or by a server."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from metadist.core.errors import ConfigError, DataError
from metadist.core.task import Examples
from metadist.serving.load import image_decoder, open_model

AdaptPredict = Callable[[Tensor, Tensor, Tensor, "int | None"], Tensor]
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
    with _opened(source) as (about, adapt_predict):
        images = about.get("images")
        if about["kind"] != "classification" or images is None:
            raise ConfigError(
                f"predict: model '{about['name']}' ({about['kind']}) does not classify images; use the Python client "
                "or HTTP"
            )
        decode = image_decoder((images["size"], images["channels"], images["invert"]))
        x, names, labels = decode.by_class(_folder("--support", support))
        classes = sorted(set(labels))
        if not names or "" in classes:
            wrong = f"'{names[labels.index('')]}' is in no class folder" if "" in classes else "there are no images"
            raise DataError(f"--support {support}: {wrong}; expected {support}/CLASS/IMAGE.png, one folder per class")
        if not 2 <= len(classes) <= about["outputs"]:
            raise DataError(
                f"--support {support}: {len(classes)} classes; model '{about['name']}' takes 2 to {about['outputs']}"
            )
        queries, files, truths = decode.by_class(_folder("--query", query))
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
def _opened(source: ModelSource) -> Iterator[tuple[Mapping[str, Any], AdaptPredict]]:
    """Open the model; yield its description (``ServedModel.describe``) and a function that adapts and predicts."""
    if _is_address(source.location):
        with _remote(source) as opened:
            yield opened
        return
    model = open_model(source.location, normalization=source.normalization, trust=source.trust)

    def compute(x: Tensor, y: Tensor, query: Tensor, steps: int | None) -> Tensor:
        learner = model.learner
        support = Examples(x.to(model.dtype), y)
        phi = learner.adapt(model.state, support, model.check_steps(steps))
        return learner.predict(model.state, phi, query.to(model.dtype), support)

    yield model.describe(), compute


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
