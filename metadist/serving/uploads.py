"""Classify uploaded picture files: a form with files becomes the request of ``adapt_predict``, its answer has names."""

from __future__ import annotations

import base64
import math
import unicodedata
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np

from metadist.core.errors import DataError
from metadist.serving.model import InvalidInput
from metadist.tasks.decode import Decode, opened

#: the largest picture, in pixels: a small file can hold a huge one
MOST_PIXELS = 50_000_000
SUPPORT, QUERY = "support/", "query"
EXPECTED = (
    "expected a form (multipart/form-data) with files: support/CLASS=@… for each labelled picture, query=@… for each "
    "picture to classify, and optionally model and inner_steps"
)


@dataclass(frozen=True)
class Upload:
    """The fields of a form: the model's name, inner steps, labelled pictures (class, file), pictures to classify."""

    model: str
    inner_steps: int | None
    support: tuple[tuple[str, bytes], ...]
    query: tuple[tuple[str, bytes], ...]

    @property
    def classes(self) -> list[str]:
        """Return the names of the classes in the order of their numbers."""
        return sorted({name for name, _ in self.support})

    def request(self, images: Mapping[str, Any]) -> dict[str, Any]:
        """Return the body of ``/v1/adapt_predict``, with pictures decoded as ``images`` of a model's description says.

        Raises InvalidInput for a file that is no picture.
        """
        classes = self.classes
        numbers = [classes.index(name) for name, _ in self.support]
        body = {"x": _packed(self.support, images), "query": _packed(self.query, images), "y": numbers}
        return {**body, "model": self.model, "inner_steps": self.inner_steps}

    def answer(self, logits: Sequence[Sequence[float | None]]) -> dict[str, Any]:
        """Return the class of each picture and the probability of every class, from logits [queries, classes]."""
        rows = [_row(file, row[: len(self.classes)], self.classes) for (file, _), row in zip(self.query, logits)]
        return {"classes": self.classes, "predictions": rows}


def _row(file: str, logits: Sequence[float | None], classes: Sequence[str]) -> dict[str, Any]:
    values = [-math.inf if v is None else v for v in logits]
    weights = [math.exp(v - max(values)) for v in values]
    probabilities = {name: round(w / sum(weights), 6) for name, w in zip(classes, weights)}
    return {"image": file, "predicted": classes[values.index(max(values))], "probabilities": probabilities}


def parse(body: bytes, content_type: str) -> Upload:
    """Parse a form. Raises InvalidInput for other bodies, unknown fields, missing files and impossible class names."""
    fields, files = _parts(body, content_type)
    for name in [*fields, *(name for name, *_ in files)]:
        if name not in ("model", "inner_steps", QUERY) and not name.startswith(SUPPORT):
            raise InvalidInput(f"unknown field {name[:40]!r}; {EXPECTED}")
    support = tuple((_class_name(n.removeprefix(SUPPORT)), data) for n, _, data in files if n.startswith(SUPPORT))
    query = tuple((file, data) for n, file, data in files if n == QUERY)
    steps = fields.get("inner_steps", "")
    if steps and not (steps.isascii() and steps.isdigit()):
        raise InvalidInput("inner_steps: expected a whole number")
    if not query or len({name for name, _ in support}) < 2:
        raise InvalidInput(f"{len(support)} labelled pictures of fewer than 2 classes, or no query; {EXPECTED}")
    return Upload(fields.get("model", ""), int(steps) if steps else None, support, query)


def _parts(body: bytes, content_type: str) -> tuple[dict[str, str], list[tuple[str, str, bytes]]]:
    """Return the plain fields, and (field, file name, content) of each file."""
    from python_multipart import exceptions
    from python_multipart.multipart import create_form_parser

    fields: dict[str, str] = {}
    files: list[tuple[str, str, bytes]] = []

    def on_field(field: Any) -> None:
        fields[_text(field.field_name)] = _text(field.value or b"")

    def on_file(file: Any) -> None:
        file.file_object.seek(0)
        files.append((_text(file.field_name), _text(file.file_name or b""), file.file_object.read()))
        file.close()

    if not content_type.startswith("multipart/form-data"):
        raise InvalidInput(EXPECTED)
    # The caller bounds the body: no file needs the disk.
    memory = {"MAX_MEMORY_FILE_SIZE": len(body) + 1}
    try:
        parser = create_form_parser({"Content-Type": content_type.encode()}, on_field, on_file, config=memory)
        parser.write(body)
        parser.finalize()
        parser.close()
    except (exceptions.FormParserError, ValueError) as error:
        raise InvalidInput(f"the form cannot be read; {EXPECTED}") from error
    return fields, files


def _text(data: bytes) -> str:
    return data.decode("utf-8", "replace")


def _class_name(name: str) -> str:
    name = unicodedata.normalize("NFC", name)
    if not name or any(unicodedata.category(c) in ("Cc", "Cs") or c == "�" for c in name):
        raise InvalidInput(
            f"the class name {name[:40]!r} is empty, or has control characters or bytes that are not UTF-8"
        )
    return name


def _packed(pictures: Sequence[tuple[str, bytes]], images: Mapping[str, Any]) -> dict[str, Any]:
    """Return pictures as one tensor in JSON: float32 [N, channels, size, size] in [0, 1], as in training."""
    decode = Decode(images["size"], images["channels"], images["invert"], images.get("white"))
    pixels = []
    for name, data in pictures:
        _check_size(name, data)
        try:
            pixels.append(decode(repr(name[:80]), partial(bytes, data)))
        except DataError as error:
            raise InvalidInput(str(error)) from None
    x = np.stack(pixels).astype("<f4") * np.float32(1 / 255)
    return {"shape": list(x.shape), "dtype": "float32", "data": base64.b64encode(x.tobytes()).decode()}


def _check_size(name: str, data: bytes) -> None:
    try:
        width, height = opened(data).size
    except Exception:  # the decoder names what is wrong
        return
    if width * height > MOST_PIXELS:
        raise InvalidInput(f"{name[:80]!r} has {width} × {height} pixels; send at most {MOST_PIXELS:,}")
