"""Read labelled images from Parquet and Arrow files: one file, or a folder of shards."""

from __future__ import annotations

import io
import json
import unicodedata
import urllib.parse
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from typing import IO, Any

import numpy as np

from metadist.core.errors import DataError, nearest
from metadist.tasks.decode import Decode
from metadist.tasks.folders import Files
from metadist.tasks.layout import split_of_table


@dataclass(frozen=True)
class Columns:
    """The names of the columns that hold images and labels."""

    image: str
    label: str


def table(path: str, columns: Columns, decode: Decode) -> tuple[np.ndarray, list[str]]:
    """Read images u8 [rows, channels, size, size] and class names [rows] from a Parquet or Arrow (stream or file) file.

    An image is encoded bytes, a struct with ``bytes`` (Hugging Face), or a (nested) list of size × size × 1 or 3 pixel
    values. Labels are text or integers; integers become Hugging Face's class names where the schema has them.
    """
    import fsspec

    system, root = fsspec.core.url_to_fs(path)
    return _read(path, lambda: system.open(root, "rb"), columns, decode, {})


def shards(files: Files, columns: Columns, decode: Decode) -> tuple[np.ndarray, list[str], list[str]]:
    """Read all tables of a folder: images, class names, and the name of each row (``FILE row 3``).

    Where a table has no label column, a folder LABEL_COLUMN=VALUE gives its label (Hive).
    """
    pixels, names, rows = [], [], []
    for name in files.names:
        keys = dict(part.split("=", 1) for part in name.split("/")[:-1] if "=" in part)
        opened = partial(_opened, files, name)
        here, labels = _read(f"{files.root}/{name}", opened, columns, decode, keys)
        pixels.append(here)
        names += labels
        rows += [f"{name} row {i}" for i in range(len(labels))]
    return np.concatenate(pixels), names, rows


def _opened(files: Files, name: str) -> IO[bytes]:
    return io.BytesIO(files.read(name))


def splits_of(files: Files) -> dict[str, str]:
    """Return the split of each table, "" where no table is named after one. Raises DataError where only some are."""
    found = {name: split_of_table(name) for name in files.names}
    without = [name for name, split in found.items() if split is None]
    if without and len(without) < len(found):
        named = next(name for name, split in found.items() if split is not None)
        raise DataError(
            f"tasks.path = {files.root}: '{named}' is named after a split, '{without[0]}' is not; put them in two "
            "folders, or name the classes of each split in tasks.split_list"
        )
    return {name: split or "" for name, split in found.items()}


def _read(
    where: str, opened: Callable[[], IO[bytes]], columns: Columns, decode: Decode, keys: Mapping[str, str]
) -> tuple[np.ndarray, list[str]]:
    data = _table(where, opened)
    wanted = [("image_column", columns.image)]
    wanted += [("label_column", columns.label)] if columns.label not in keys else []
    for key, column in wanted:
        if column not in data.column_names:
            raise DataError(
                f"{where} has no column '{column}' (tasks.{key}), only {data.column_names}"
                f"{nearest(column, data.column_names)}"
            )
    if columns.label in data.column_names:
        labels = data[columns.label].to_pylist()
    else:
        labels = [urllib.parse.unquote(keys[columns.label])] * data.num_rows
    names = _class_names(data.schema.metadata, columns.label)
    for row, label in enumerate(labels):
        if label is None or label != label or label == "":
            raise DataError(f"{where}, row {row}: no label; remove the row, or give it a label")
        if names and label not in names:
            raise DataError(
                f"{where}, row {row}: label {label} is none of the {len(names)} classes in the file's features (0 to "
                f"{len(names) - 1}); remove the row, or give it a label"
            )

    def images() -> Iterator[tuple[str, Callable[[], bytes]]]:
        row = 0
        for chunk in data[columns.image].chunks:
            for value in chunk:
                yield f"{where}, row {row}", partial(_encoded, value, decode.size, f"{where}, row {row}")
                row += 1

    texts = [unicodedata.normalize("NFC", names.get(label, str(label))) for label in labels]
    return decode.all(images(), data.num_rows), texts


def _table(where: str, opened: Callable[[], IO[bytes]]) -> Any:
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        with opened() as file:
            if where.lower().endswith(".parquet"):
                return pq.ParquetFile(file).read()
            magic = file.read(6)
            file.seek(0)
            return (pa.ipc.open_file(file) if magic == b"ARROW1" else pa.ipc.open_stream(file)).read_all()
    except Exception as error:  # every fsspec backend raises its own
        raise DataError(f"cannot read {where} ({error}); expected a Parquet or Arrow file") from error


def _class_names(metadata: Mapping[bytes, bytes] | None, column: str) -> dict[Any, str]:
    try:
        feature = json.loads((metadata or {})[b"huggingface"])["info"]["features"][column]
        return dict(enumerate(feature["names"]))
    except (KeyError, TypeError, ValueError):
        return {}


def _encoded(value: Any, size: int, where: str) -> bytes:
    """Convert one Arrow scalar to the bytes of an encoded image."""
    import pyarrow as pa
    from PIL import Image

    if pa.types.is_struct(value.type) and "bytes" in value.type.names:
        value = value["bytes"]
    if not value.is_valid:
        raise DataError(f"{where}: no image; remove the row")
    if not pa.types.is_nested(value.type):
        if pa.types.is_binary(value.type) or pa.types.is_large_binary(value.type):
            return value.as_py()
        raise DataError(f"{where}: an image is bytes, a struct with 'bytes', or a list of pixels, not {value.type}")
    pixels = value.values
    while pa.types.is_nested(pixels.type):
        pixels = pixels.flatten()
    if len(pixels) not in (size * size, size * size * 3):
        raise DataError(
            f"{where}: {len(pixels)} values are not a {size} × {size} image; set tasks.image_size to the images' size"
        )
    array = np.asarray(pixels.to_numpy(zero_copy_only=False))
    if array.dtype.kind not in "iu" or array.min() < 0 or array.max() > 255:
        raise DataError(f"{where}: pixel values must be integers in 0 … 255, found {pixels.type}")
    buffer = io.BytesIO()
    shape = (size, size) if len(array) == size * size else (size, size, 3)
    Image.fromarray(array.astype(np.uint8).reshape(shape)).save(buffer, "bmp")
    return buffer.getvalue()
