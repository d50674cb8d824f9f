"""Predictions on folders of images: by a run in this process, or by a server."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from metadist.core.errors import ConfigError, DataError
from metadist.serving.load import decoder


def predict_folders(
    source: str,
    support: str,
    query: str,
    *,
    model: str = "",
    inner_steps: int | None = None,
    normalization: str | None = None,
    token_file: str | None = None,
    tls_ca: str | None = None,
) -> dict[str, Any]:
    """Adapt to ``support/CLASS/IMAGE``, predict every image below ``query``; an accuracy where those lie in folders of the same names."""
    with _opened(source, model, normalization, token_file, tls_ca) as (about, adapt_predict):
        images = about.get("images")
        if about["kind"] != "classification" or images is None:
            raise ConfigError(
                f"predict: model '{about['name']}' ({about['kind']}) doesn't classify images; use the Python client or HTTP"
            )
        decode = decoder((images["size"], images["channels"], images["invert"]))
        x, names, labels = decode.by_class(_folder("--support", support))
        classes = sorted(set(labels))
        if not names or "" in classes:
            wrong = f"'{names[labels.index('')]}' is in no folder" if "" in classes else "no images there"
            raise DataError(f"--support {support}: {wrong}; expected {support}/CLASS/IMAGE.png, a folder per class")
        if not 2 <= len(classes) <= about["outputs"]:
            raise DataError(
                f"--support {support}: {len(classes)} classes; model '{about['name']}' tells 2 to {about['outputs']} apart"
            )
        queries, files, truths = decode.by_class(_folder("--query", query))
        if not files:
            raise DataError(f"--query {query}: no images there")
        y = torch.tensor([classes.index(label) for label in labels])
        logits = adapt_predict(torch.from_numpy(x), y, torch.from_numpy(queries), inner_steps)
    shares = torch.softmax(logits[:, : len(classes)].double(), -1)
    rows = []
    for file, truth, share in zip(files, truths, shares):
        best = int(share.argmax())
        row = {"image": file, "predicted": classes[best], "probability": round(float(share[best]), 4)}
        rows.append({**row, "class": truth} if truth in classes else row)
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


def _folder(option: str, path: str) -> str:
    if "://" not in path and not Path(path).is_dir():
        raise DataError(f"{option} {path}: no such folder")
    return path


@contextlib.contextmanager
def _opened(
    source: str, model: str, normalization: str | None, token_file: str | None, tls_ca: str | None
) -> Iterator[tuple[dict, Any]]:
    """What the model is, and how it is asked: in this process where ``source`` is a run or a file, else by a client."""
    if _is_address(source):
        from metadist.serving.client import Client

        if normalization is not None:
            raise ConfigError("--normalization: the server decides; give it to 'metadist serve'")
        with Client(source, token_file=token_file, tls_ca=tls_ca) as client:
            models = {m["name"]: m for m in client.models()}
            name = model or next(iter(models))
            if name not in models or (not model and len(models) > 1):
                raise ConfigError(f"--model '{model}': the server at {source} has {', '.join(models)}; choose one")

            def ask(x: Tensor, y: Tensor, query: Tensor, steps: int | None) -> Tensor:
                return client.adapt_predict(x, y, query, model=name, inner_steps=steps)

            yield models[name], ask
        return
    from metadist.core.task import Examples
    from metadist.serving.load import open_model

    opened = open_model(source, normalization=normalization)

    def compute(x: Tensor, y: Tensor, query: Tensor, steps: int | None) -> Tensor:
        learner = opened.learner
        support = Examples(x.to(opened.dtype), y)
        phi = learner.adapt(opened.state, support, opened.check_steps(steps))
        return learner.predict(opened.state, phi, query.to(opened.dtype), support)

    yield opened.describe(), compute


def _is_address(source: str) -> bool:
    if source.startswith(("grpc://", "grpcs://")):
        return True
    host, _, port = source.rpartition(":")
    return bool(host) and port.isdecimal() and "/" not in source and not Path(source).exists()
