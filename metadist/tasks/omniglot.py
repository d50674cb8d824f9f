"""Define tasks of Omniglot: 1,623 handwritten characters of 50 alphabets, each drawn once by 20 people.

Lake, Salakhutdinov & Tenenbaum, "Human-level concept learning through probabilistic program induction", Science 2015;
the data are MIT-licensed, github.com/brendenlake/omniglot.
"""

from __future__ import annotations

import hashlib
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any, get_args

import numpy as np

from metadist.core.errors import ConfigError, DataError, nearest
from metadist.tasks.decode import Decode
from metadist.tasks.episodes import Episodes, Rotations
from metadist.tasks.folders import Files, in_folder, in_zip
from metadist.tasks.images import ImageSet, cached
from metadist.tasks.layout import split_list
from metadist.tasks.sources import data_folder, download

URL = "https://raw.githubusercontent.com/brendenlake/omniglot/master/python"
#: part → (MD5 of its archive, classes, drawings)
PARTS = {
    "images_background": ("68d2efa1b9178cc56df9314c21c6e718", 964, 19280),
    "images_evaluation": ("6b91aef0f799c5bb55b94e3f2daec811", 659, 13180),
}
#: The validation alphabets of Vinyals et al., "Matching networks for one shot learning" (NIPS 2016), from the
#: background
#: set, and their training alphabets from the evaluation set (together with Gurmukhi's first 41 characters; its last 4
#: are
#: test classes), as listed in jakesnell/prototypical-networks, data/omniglot/splits/vinyals: 1028 / 172 / 423 classes.
VALIDATION = ("Armenian", "Bengali", "Early_Aramaic", "Hebrew", "Mkhedruli_(Georgian)")
VINYALS_TRAIN = ("Angelic", "Atemayar_Qelisayer", "Atlantean", "Aurek-Besh", "Avesta", "Ge_ez", "Glagolitic")
SPLIT_LISTS = ("vinyals", "lake")
DECODE = Decode(size=28, channels=1, invert=True)


@dataclass(frozen=True, kw_only=True)
class Omniglot(Episodes):
    """Few-shot classification of Omniglot characters: 28 × 28, ink 1 on 0, LANCZOS from 105 × 105.

    ``split_list`` is ``vinyals``; ``lake``, the official background and evaluation sets with Vinyals' five validation
    alphabets of the background set: 792 / 172 / 659 classes; or a JSON file {"train": ["Alphabet/character01", …],
    "validation": […], "test": […]}.

    ``rotations`` (training) and ``evaluation_rotations`` (validation and test) say how quarter turns are used:
    ``classes``, each turned character is another class (×4); ``slot``, each class of an episode has a random turn; or
    ``none``.

    The data are in ``omniglot/`` in ``METADIST_DATA``: omniglot28.npz, or images_background and images_evaluation as
    folders or .zip files (.zip alone where ``METADIST_DATA`` is an fsspec URL). Where that variable is not set, the
    official archives are downloaded.
    """

    split_list: str = "vinyals"
    rotations: Rotations = "classes"
    evaluation_rotations: Rotations = "none"

    input_shape = (1, 28, 28)

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("rotations", "evaluation_rotations"):
            value, allowed = getattr(self, name), get_args(Rotations)
            if value not in allowed:
                raise ConfigError(
                    f"tasks.{name} = {value}: must be one of {', '.join(allowed)}{nearest(value, allowed)}"
                )
        if self.split_list not in SPLIT_LISTS and not self.split_list.endswith(".json"):
            hint = nearest(self.split_list, SPLIT_LISTS)
            raise ConfigError(f"tasks.split_list = {self.split_list}: must be vinyals, lake or a .json file{hint}")

    @property
    def decode(self) -> Decode:
        """Return the settings that turn encoded bytes into an image."""
        return DECODE

    def rotations_in(self, split: str) -> Rotations:
        return self.rotations if split == "train" else self.evaluation_rotations

    def split_classes(self, images: ImageSet) -> dict[str, list[int]]:
        if self.split_list not in SPLIT_LISTS:
            return split_list(self.split_list, images.names)
        splits: dict[str, list[int]] = {"train": [], "validation": [], "test": []}
        for i, (name, part) in enumerate(zip(images.names, images.parts)):
            splits[_split(name, part, self.split_list)].append(i)
        return splits

    def protocol(self, split: str) -> dict[str, Any]:
        return {**super().protocol(split), "split_list": self.split_list}

    def load(self) -> ImageSet:
        folder = data_folder("omniglot", ("omniglot28.npz", *(f"{part}.zip" for part in PARTS)))
        if folder is None:
            archives = {f"{URL}/{part}.zip": md5 for part, (md5, _, _) in PARTS.items()}
            return cached(
                "omniglot28",
                DECODE.source(str(archives)),
                lambda: _build([in_zip(download(url, md5), url) for url, md5 in archives.items()]),
            )
        prepared = folder / "omniglot28.npz"
        if prepared.is_file():
            data = hashlib.sha256(prepared.read_bytes()).hexdigest()
            return cached("omniglot28", f"{prepared.name} {data}", lambda: _read(prepared))
        official = [_official(folder, part) for part in PARTS]
        return cached("omniglot28", DECODE.source(str([f.identity for f in official])), lambda: _build(official))


def _split(name: str, part: str, lists: str) -> str:
    alphabet, _, character = name.partition("/")
    if part == "images_background":
        return "validation" if alphabet in VALIDATION else "train"
    if lists == "vinyals" and (alphabet in VINYALS_TRAIN or alphabet == "Gurmukhi" and character <= "character41"):
        return "train"
    return "test"


def _official(folder: Path, part: str) -> Files:
    if (folder / part).is_dir():
        return in_folder(str(folder / part))
    archive = folder / f"{part}.zip"
    if archive.is_file():
        return in_zip(archive.read_bytes(), str(archive))
    raise DataError(
        f"METADIST_DATA = {os.environ['METADIST_DATA']} has no Omniglot: expected {folder}/omniglot28.npz, {archive} "
        f"or the folder {folder / part}; download {URL}/{part}.zip into {folder}, or unset METADIST_DATA for a download"
    )


def _build(official: list[Files]) -> ImageSet:
    """Build the set from the two official folders or archives, Alphabet/characterNN/FILE.png."""
    pixels, labels = [], []
    for files, (part, (_, classes, drawings)) in zip(official, PARTS.items()):
        # Paths in an archive begin with the part's name; an unpacked folder is the part itself.
        names = {n: "/".join(n.split("/")[-3:-1]) for n in files.names if len(n.split("/")) >= 3}
        if (len(set(names.values())), len(names)) != (classes, drawings):
            raise DataError(
                f"{files.root} is incomplete: {len(set(names.values()))} characters and {len(names)} drawings instead "
                f"of {classes} and {drawings}; unpack {URL}/{part}.zip again"
            )
        pixels.append(files.decode(DECODE, list(names)))
        labels += [(part, name) for name in names.values()]
    return ImageSet.grouped(np.concatenate(pixels), labels)


def _read(path: Path) -> ImageSet:
    """Read omniglot28.npz: images u8 [1623, 20, 28, 28] with ink 255, class_names, class_is_background."""
    try:
        with np.load(path, allow_pickle=False) as arrays:
            images, names, background = (arrays[n] for n in ("images", "class_names", "class_is_background"))
    except (OSError, ValueError, KeyError, EOFError) as error:
        raise DataError(f"{path} is not readable ({error}); replace the file, or remove it") from error
    parts = np.where(background, *PARTS).repeat(images.shape[1]).tolist()
    labels = list(zip(parts, names.repeat(images.shape[1]).tolist()))
    return ImageSet.grouped(images.reshape(-1, 1, 28, 28), labels)
