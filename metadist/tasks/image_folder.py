"""Define few-shot classification of the user's images: a folder of folders, or Parquet and Arrow files."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np

from metadist.core.errors import ConfigError, DataError, one_of
from metadist.core.random import SPLITS
from metadist.tasks import layout
from metadist.tasks.augmented import AugmentedEpisodes
from metadist.tasks.decode import Decode
from metadist.tasks.folders import SUFFIXES, TABLES, Files, everything_in
from metadist.tasks.image_tables import Columns, shards, splits_of, table
from metadist.tasks.images import ImageSet, cached
from metadist.tasks.location import located

Labels = list[tuple[str, str]]
"""(part, class) of each image."""


@dataclass(frozen=True, kw_only=True)
class ImageFolder(AugmentedEpisodes):
    """Images by class at ``path``, a local path (then also tried in ``METADIST_DATA``) or any fsspec URL.

    Each folder with images is a class, and its path is the class name (``dogs``, ``Greek/character01``). Top folders
    ``train``, ``validation`` and ``test``, in any usual spelling, are splits. Or ``path`` is a .parquet, .arrow or
    .feather file, or a folder of them, with an image column (encoded bytes, or lists of pixels) and a label column.
    What is passed over is named (``data_notes``); a layout in which test classes could be trained on is refused.

    Without such top folders ``split_list`` splits the classes, a JSON file {"train": [class names], "validation": […],
    "test": […]}; without it ``fractions`` does, in the order of the SHA-256 of ``split_seed`` and name, so that the
    split depends on the names alone. With ``split_by: images`` every split has the same classes, and the images of
    each class are split in that way, or by top folders: for data of two classes. Classes with fewer than
    ``min_images`` images are left out.

    Images become squares of ``image_size`` (LANCZOS, centre crop) with 1 or 3 ``channels``. ``invert`` is for dark
    images on a light background; ``white`` is the value of white in images of more than 8 bits (``decode.Decode``).
    """

    path: str
    image_size: int = 28
    channels: Literal[1, 3] = 1
    invert: bool = False
    white: float | None = None
    split_list: str | None = None
    split_by: Literal["classes", "images"] = "classes"
    fractions: tuple[float, float, float] = (0.64, 0.16, 0.2)
    split_seed: int = 0
    min_images: int = 0
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
        if self.white is not None and not self.white > 0:
            raise ConfigError(f"tasks.white = {self.white}: must be above 0; 65535 for 16 bits, 4095 for 12 bits")
        if self.min_images < 0:
            raise ConfigError(f"tasks.min_images = {self.min_images}: must be 0 or more")
        one_of("tasks.split_by", self.split_by, ("classes", "images"))
        if self.split_list is not None and self.split_by == "images":
            raise ConfigError(
                f"tasks.split_list = {self.split_list}: names the classes of splits, and tasks.split_by = images gives "
                "all splits the same classes; remove one of the two"
            )
        object.__setattr__(self, "input_shape", (self.channels, self.image_size, self.image_size))

    @property
    def decode(self) -> Decode:
        """Return the settings that turn encoded bytes into an image."""
        return Decode(self.image_size, self.channels, self.invert, self.white)

    def load(self) -> ImageSet:
        import fsspec

        path = located("tasks.path", self.path)
        if path.lower().endswith(TABLES):
            system, root = fsspec.core.url_to_fs(path)
            if not system.isdir(root):
                state = sorted((k, str(v)) for k, v in system.info(root).items())
                return self._cached(f"{state} {self._columns}", lambda: self._from_table(path))
        listing = everything_in(path)
        files = listing.matching(SUFFIXES)
        if not files.names and (tables := listing.matching(TABLES)).names:
            parts = splits_of(tables) if self.split_list is None else dict.fromkeys(tables.names, "")
            source = f"{path} {tables.identity} {sorted(parts.items())} {self._columns}"
            found = self._cached(source, lambda: self._from_shards(tables, parts))
            return dataclasses.replace(found, notes=_passed_over(tables))
        if not files.names:
            held = f"; it has {', '.join(files.notes)}" if files.notes else ""
            raise DataError(
                f"tasks.path = {path}: has no images in folders; expected {path}/CLASS/IMAGE.png or .jpg …{held}"
            )
        labels = layout.labels(path, files.names, any_layout=self.split_list is not None)
        found = self._cached(
            f"{path} {files.identity} {hashlib.sha256(json.dumps(labels).encode()).hexdigest()}",
            lambda: self._grouped(files.decode(self.decode, files.names), labels, files.names),
        )
        return dataclasses.replace(found, notes=_passed_over(files))

    @property
    def _columns(self) -> Columns:
        return Columns(self.image_column, self.label_column)

    def _cached(self, source: str, build: Callable[[], ImageSet]) -> ImageSet:
        name = "images-" + re.sub(r"\W+", "-", Path(self.path).name)
        by = f" by images {self.fractions} {self.split_seed}" if self.split_by == "images" else ""
        return cached(name, self.decode.source(source + by), build)

    def _from_table(self, path: str) -> ImageSet:
        pixels, names = table(path, self._columns, self.decode)
        if not names:
            raise DataError(f"tasks.path = {path}: has no rows; expected one row for each image")
        return self._grouped(pixels, [("", name) for name in names], [f"row {i}" for i in range(len(names))])

    def _from_shards(self, files: Files, parts: Mapping[str, str]) -> ImageSet:
        pixels, names, rows = shards(files, self._columns, self.decode)
        if not names:
            raise DataError(f"tasks.path = {files.root}: has no rows; expected one row for each image")
        return self._grouped(pixels, [(parts[row.rpartition(" row ")[0]], n) for row, n in zip(rows, names)], rows)

    def _grouped(self, pixels: np.ndarray, labels: Labels, items: Sequence[str]) -> ImageSet:
        """Return the set; with ``split_by: images`` a class of each split is one of its own."""
        if self.split_by == "classes":
            return ImageSet.grouped(pixels, labels)
        if not any(part for part, _ in labels):
            labels = self._split_images(labels, items)
        return ImageSet.grouped(pixels, labels, items)

    def _split_images(self, labels: Labels, items: Sequence[str]) -> Labels:
        members: dict[str, list[int]] = {}
        for i, (_, name) in enumerate(labels):
            members.setdefault(name, []).append(i)
        chosen = list(labels)
        for name, rows in members.items():
            pieces = self._cut(rows, lambda i: items[i])
            for split, piece, fraction in zip(SPLITS, pieces, self.fractions):
                if fraction and not piece and len(rows) >= self.min_images:
                    raise DataError(
                        f"tasks.path = {self.path}: class '{name}' has {len(rows)} images, none of them in the {split} "
                        f"split by tasks.fractions = {list(self.fractions)}; set tasks.min_images, or other fractions"
                    )
                for i in piece:
                    chosen[i] = (split, name)
        return chosen

    def _cut(self, members: Sequence[int], name: Callable[[int], str]) -> list[list[int]]:
        """Cut members into the three splits by ``fractions``, in the order of the hashes of their names."""
        order = sorted(members, key=lambda i: _hash(self.split_seed, name(i)))
        train, validation, _ = self.fractions
        cuts = round(len(order) * train), round(len(order) * (train + validation))
        return [sorted(piece) for piece in (order[: cuts[0]], order[cuts[0] : cuts[1]], order[cuts[1] :])]

    def split_classes(self, images: ImageSet) -> dict[str, list[int]]:
        few = self._too_few(images)
        if self.split_by == "images":
            splits = {s: [i for i, part in enumerate(images.parts) if part == s] for s in SPLITS}
        elif len(set(images.names)) < len(images.names):
            twice = next(n for n in images.names if images.names.count(n) > 1)
            parts = [p for n, p in zip(images.names, images.parts) if n == twice]
            raise DataError(
                f"tasks.path = {self.path}: class '{twice}' is in {' and in '.join(parts)}; splits must hold different "
                "classes, or training sees test classes; tasks.split_by: images makes tasks of the same classes in all "
                "splits"
            )
        elif self.split_list is not None:
            splits = layout.split_list(self.split_list, images.names)
        elif any(images.parts):
            splits = {s: [i for i, part in enumerate(images.parts) if part == s] for s in SPLITS}
        else:
            left = [i for i, name in enumerate(images.names) if name not in few]
            splits = dict(zip(SPLITS, self._cut(left, lambda i: images.names[i])))
        return {s: [i for i in chosen if images.names[i] not in few] for s, chosen in splits.items()}

    def _too_few(self, images: ImageSet) -> set[str]:
        """Return the classes with fewer than ``min_images`` images in all splits together."""
        counts: dict[str, int] = {}
        for name, count in zip(images.names, images.counts):
            counts[name] = counts.get(name, 0) + count
        return {name for name, count in counts.items() if count < self.min_images}

    def splits(self) -> Mapping[str, Sequence[str]]:
        """Return the classes of each split; with ``split_by: images``, the images of each split."""
        if self.split_by == "classes":
            return super().splits()
        images, found = self.source(), {split: list[str]() for split in SPLITS}
        starts = [sum(images.counts[:i]) for i in range(len(images.counts))]
        for split, chosen in self.split_classes(images).items():
            for i in chosen:
                found[split] += images.items[starts[i] : starts[i] + images.counts[i]]
        return found

    def data_notes(self) -> Sequence[str]:
        images, notes = self.source(), list(super().data_notes())
        if few := sorted(self._too_few(images)):
            notes.append(f"{len(few):,} classes with fewer than {self.min_images} images ({_first(few)})")
        if nested := layout.classes_within_classes(images.names):
            notes.append(f"{len(nested):,} classes in the folder of another class ({_first(nested)})")
        if self.split_by == "classes" and (alike := layout.same_but_for_case(self.splits())):
            notes.append(f"{len(alike):,} classes of two splits differ in upper and lower case alone ({_first(alike)})")
        return notes

    def protocol(self, split: str) -> dict[str, Any]:
        return {
            **super().protocol(split),
            "split_list": self.split_list,
            "image_size": self.image_size,
            **({"split_by": "images"} if self.split_by == "images" else {}),
        }


def _passed_over(files: Files) -> tuple[str, ...]:
    return (f"passed over {', '.join(files.notes)}",) if files.notes else ()


def _first(names: Sequence[str]) -> str:
    return ", ".join(names[:5]) + (", …" if len(names) > 5 else "")


def _hash(seed: int, name: str) -> str:
    return hashlib.sha256(f"{seed}:{name}".encode()).hexdigest()
