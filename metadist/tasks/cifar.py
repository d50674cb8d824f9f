"""Define tasks of CIFAR-100: 100 classes of 600 colour photographs, with the splits of CIFAR-FS and FC100.

Krizhevsky, "Learning multiple layers of features from tiny images", 2009. CIFAR-FS: Bertinetto et al. 2019; FC100:
Oreshkin et al. 2018.
"""

from __future__ import annotations

import hashlib
import io
import os
import tarfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from metadist.core.errors import ConfigError, DataError, nearest
from metadist.tasks.augmented import AugmentedEpisodes
from metadist.tasks.decode import Decode, opened
from metadist.tasks.images import ImageSet, cached
from metadist.tasks.layout import split_list
from metadist.tasks.sources import data_folder, download

URL = "https://www.cs.toronto.edu/~kriz/cifar-100-binary.tar.gz"
MD5 = "03b5dce01913d631647c71ecec9e9cb8"
ARCHIVE = "cifar-100-binary.tar.gz"
#: the files of a prepared folder: the official training part in three files, and the official test part
PREPARED = (*(f"cifar100_train500_fs{part}.npz" for part in ("train", "val", "test")), "cifar100_test100.npz")
SPLIT_LISTS = ("cifar_fs", "fc100")
#: CIFAR-FS: the classes of validation and test; the other 64 are for training
CIFAR_FS: Mapping[str, Sequence[str]] = {
    "validation": (
        *("beaver", "beetle", "butterfly", "camel", "cattle", "crab", "crocodile", "flatfish", "lamp", "maple_tree"),
        *("motorcycle", "otter", "sea", "shark", "television", "tractor"),
    ),
    "test": (
        *("baby", "bed", "bicycle", "chimpanzee", "fox", "leopard", "man", "pickup_truck", "plain", "poppy", "rocket"),
        *("rose", "snail", "sweet_pepper", "table", "telephone", "wardrobe", "whale", "woman", "worm"),
    ),
}
#: FC100: the superclasses of validation and test, of 20 classes each; the other 60 classes are for training
FC100: Mapping[str, Sequence[str]] = {
    "validation": (
        "large_carnivores",
        "large_omnivores_and_herbivores",
        "non-insect_invertebrates",
        "small_mammals",
    ),
    "test": ("aquatic_mammals", "insects", "medium_mammals", "people"),
}
_SIDE = 32
_DECODE = Decode(size=_SIDE, channels=3, invert=False)


@dataclass(frozen=True, kw_only=True)
class CifarFS(AugmentedEpisodes):
    """Few-shot classification of CIFAR-100: 3 × 32 × 32 in [0, 1], 600 images a class.

    ``split_list`` is ``cifar_fs``, 64 / 16 / 20 classes; ``fc100``, 60 / 20 / 20 classes of different superclasses; or
    a JSON file {"train": [class names], "validation": […], "test": […]}.

    The data are in ``cifar100/`` in ``METADIST_DATA``: the official cifar-100-binary.tar.gz, or prepared .npz files.
    Where that variable is not set, the official archive is downloaded.
    """

    split_list: str = "cifar_fs"

    input_shape = (3, _SIDE, _SIDE)

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.split_list not in SPLIT_LISTS and not self.split_list.endswith(".json"):
            hint = nearest(self.split_list, SPLIT_LISTS)
            raise ConfigError(f"tasks.split_list = {self.split_list}: must be cifar_fs, fc100 or a .json file{hint}")

    @property
    def decode(self) -> Decode:
        """Return the settings that turn encoded bytes into an image."""
        return _DECODE

    def split_classes(self, images: ImageSet) -> dict[str, list[int]]:
        if self.split_list not in SPLIT_LISTS:
            return split_list(self.split_list, images.names)
        # The part of a class is its superclass.
        parts = CIFAR_FS if self.split_list == "cifar_fs" else FC100
        names = images.names if self.split_list == "cifar_fs" else images.parts
        splits: dict[str, list[int]] = {"train": [], "validation": [], "test": []}
        for i, name in enumerate(names):
            splits[next((split for split, own in parts.items() if name in own), "train")].append(i)
        return splits

    def protocol(self, split: str) -> dict[str, Any]:
        return {**super().protocol(split), "split_list": self.split_list}

    def load(self) -> ImageSet:
        folder = data_folder("cifar100", (ARCHIVE, *PREPARED))
        if folder is None:
            return cached("cifar100", f"{URL} {MD5}", lambda: _official(download(URL, MD5), URL))
        archive, prepared = folder / ARCHIVE, [folder / name for name in PREPARED]
        if archive.is_file():
            data = archive.read_bytes()
            return cached("cifar100", f"{ARCHIVE} {hashlib.sha256(data).hexdigest()}", lambda: _official(data, archive))
        if all(path.is_file() for path in prepared):
            hashes = [hashlib.sha256(path.read_bytes()).hexdigest() for path in prepared]
            return cached("cifar100", f"prepared {hashes}", lambda: _prepared(prepared))
        raise DataError(
            f"METADIST_DATA = {os.environ['METADIST_DATA']} has no CIFAR-100: expected {archive}; download {URL} into "
            f"{folder}, or unset METADIST_DATA for a download"
        )


def _official(data: bytes, where: str | Path) -> ImageSet:
    """Read the official archive: a record is superclass, class, and 3 × 32 × 32 bytes; the names are in text files."""
    try:
        with tarfile.open(fileobj=io.BytesIO(data)) as archive:
            members = {Path(m.name).name: m for m in archive.getmembers() if m.isfile()}

            def read(name: str) -> bytes:
                file = archive.extractfile(members[name])
                assert file is not None
                return file.read()

            fine, coarse = (read(f"{kind}_label_names.txt").decode().split() for kind in ("fine", "coarse"))
            records = np.frombuffer(read("train.bin") + read("test.bin"), np.uint8).reshape(-1, 2 + 3 * _SIDE**2)
            labels = [(coarse[a], fine[b]) for a, b in records[:, :2]]
    except (tarfile.TarError, KeyError, ValueError, IndexError, EOFError, OSError) as error:
        raise DataError(f"{where} is not the official archive of CIFAR-100 ({error}); download {URL} again") from error
    return ImageSet.grouped(records[:, 2:].reshape(-1, 3, _SIDE, _SIDE), labels)


def _prepared(paths: Sequence[Path]) -> ImageSet:
    """Read prepared files: images u8 [classes, rows, 32, 32, 3], or a lossless mosaic of 20 × 25 images a class."""
    pixels, labels = list[np.ndarray](), list[tuple[str, str]]()
    for path in paths:
        try:
            with np.load(path, allow_pickle=False) as arrays:
                images = arrays["images"] if "images" in arrays.files else _mosaics(arrays)
                names, coarse = arrays["class_names"].tolist(), arrays["coarse_names"].tolist()
        except (OSError, ValueError, KeyError, EOFError) as error:
            raise DataError(f"{path} is not readable ({error}); replace the file, or remove it") from error
        pixels.append(images.reshape(-1, _SIDE, _SIDE, 3).transpose(0, 3, 1, 2))
        labels += [label for label in zip(coarse, names) for _ in range(images.shape[1])]
    return ImageSet.grouped(np.concatenate(pixels), labels)


def _mosaics(arrays: Mapping[str, np.ndarray]) -> np.ndarray:
    """Return the images of one WebP mosaic a class: u8 [classes, 500, 32, 32, 3]."""
    data, offsets = arrays["webp"].tobytes(), arrays["offsets"].tolist()
    found = []
    for first, last in zip(offsets, offsets[1:]):
        mosaic = np.asarray(opened(data[first:last]).convert("RGB"))
        found.append(mosaic.reshape(20, _SIDE, 25, _SIDE, 3).transpose(0, 2, 1, 3, 4).reshape(500, _SIDE, _SIDE, 3))
    return np.stack(found)
