"""Define few-shot classification of the user's images: a folder of folders, or one Parquet or Arrow file."""

from __future__ import annotations

import hashlib
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from metadist.core.errors import ConfigError, DataError
from metadist.core.random import SPLITS
from metadist.tasks.episodes import Episodes
from metadist.tasks.images import ImageSet, cached
from metadist.tasks.location import located
from metadist.tasks.sources import Decode, in_folder, split_list, table

TABLES = (".parquet", ".arrow", ".feather")


@dataclass(frozen=True, kw_only=True)
class ImageFolder(Episodes):
    """Images by class at ``path``, a local path (then also tried in ``METADIST_DATA``) or any fsspec URL.

    Each folder with images is a class, and its path is the class name (``dogs``, ``Greek/character01``). Top folders
    ``train``, ``validation`` and ``test`` are splits. Or ``path`` is a .parquet, .arrow or .feather file with an image
    column (encoded bytes, or lists of pixels) and a label column.

    Without such top folders ``split_list`` splits the classes, a JSON file {"train": [class names], "validation": […],
    "test": […]}; without it ``fractions`` does, in the order of the SHA-256 of ``split_seed`` and name, so that the
    split depends on the names alone.

    Images become squares of ``image_size`` (LANCZOS, centre crop) with 1 or 3 ``channels``. ``invert`` is for dark
    images on a light background.
    """

    path: str
    image_size: int = 28
    channels: Literal[1, 3] = 1
    invert: bool = False
    split_list: str | None = None
    fractions: tuple[float, float, float] = (0.64, 0.16, 0.2)
    split_seed: int = 0
    image_column: str = "image"
    label_column: str = "label"

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.image_size < 1:
            raise ConfigError(f"tasks.image_size = {self.image_size}: must be at least 1")
        if self.channels not in (1, 3):
            raise ConfigError(f"tasks.channels = {self.channels}: must be 1 (grey) or 3 (RGB)")
        if len(self.fractions) != 3 or min(self.fractions) < 0 or abs(sum(self.fractions) - 1) > 1e-6:
            raise ConfigError(
                f"tasks.fractions = {list(self.fractions)}: must be three numbers ≥ 0 for {', '.join(SPLITS)} with the "
                "sum 1"
            )
        object.__setattr__(self, "input_shape", (self.channels, self.image_size, self.image_size))

    @property
    def decode(self) -> Decode:
        """Return the settings that turn encoded bytes into an image."""
        return Decode(self.image_size, self.channels, self.invert)

    def load(self) -> ImageSet:
        import fsspec

        path, decode = located("tasks.path", self.path), self.decode
        name = "images-" + re.sub(r"\W+", "-", Path(self.path).name)
        if path.lower().endswith(TABLES):
            system, root = fsspec.core.url_to_fs(path)
            source = (
                f"{sorted((k, str(v)) for k, v in system.info(root).items())} {self.image_column} {self.label_column}"
            )
            return cached(name, decode.source(source), lambda: self._from_table(path, decode))
        files = in_folder(path)
        classes = {n: n.rpartition("/")[0] for n in files.names}
        if not classes:
            raise DataError(f"tasks.path = {path}: has no images in folders; expected {path}/CLASS/IMAGE.png or .jpg …")
        if "" in classes.values():
            stray = next(n for n, c in classes.items() if not c)
            raise DataError(f"tasks.path = {path}: '{stray}' is in no folder; move every image to its class's folder")
        labels = [_label(c) for c in classes.values()]
        if not all(part in SPLITS and name for part, name in labels):
            labels = [("", c) for c in classes.values()]
        return cached(
            name,
            decode.source(f"{path} {files.identity}"),
            lambda: ImageSet.grouped(files.decode(decode, files.names), labels),
        )

    def _from_table(self, path: str, decode: Decode) -> ImageSet:
        pixels, names = table(path, self.image_column, self.label_column, decode)
        if not names:
            raise DataError(f"tasks.path = {path}: has no rows; expected one row for each image")
        return ImageSet.grouped(pixels, [("", name) for name in names])

    def split_classes(self, images: ImageSet) -> dict[str, list[int]]:
        if len(set(images.names)) < len(images.names):
            twice = next(n for n in images.names if images.names.count(n) > 1)
            parts = [p for n, p in zip(images.names, images.parts) if n == twice]
            raise DataError(
                f"tasks.path = {self.path}: class '{twice}' is in {' and in '.join(parts)}; "
                "splits must hold different classes, or training sees test classes"
            )
        if self.split_list is not None:
            return split_list(self.split_list, images.names)
        if any(images.parts):
            return {s: [i for i, part in enumerate(images.parts) if part == s] for s in SPLITS}
        order = sorted(range(len(images.names)), key=lambda i: _hash(self.split_seed, images.names[i]))
        train, validation, _ = self.fractions
        cuts = round(len(order) * train), round(len(order) * (train + validation))
        pieces = order[: cuts[0]], order[cuts[0] : cuts[1]], order[cuts[1] :]
        return {split: sorted(piece) for split, piece in zip(SPLITS, pieces)}

    def protocol(self, split: str) -> dict[str, Any]:
        return {**super().protocol(split), "split_list": self.split_list, "image_size": self.image_size}


def _label(folder: str) -> tuple[str, str]:
    """Split a folder's path into split and class: ``train/dogs`` → (train, dogs)."""
    part, _, name = folder.partition("/")
    return {"val": "validation", "valid": "validation"}.get(part, part), name


def _hash(seed: int, name: str) -> str:
    return hashlib.sha256(f"{seed}:{name}".encode()).hexdigest()
