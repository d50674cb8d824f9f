"""Small images by class: Omniglot and CIFAR-100 at 8 × 8 or 14 × 14, as one image set for each node."""

from __future__ import annotations

import hashlib
import io
import os
from pathlib import Path

import numpy as np

from metadist.core.errors import ConfigError, DataError
from metadist.core.random import SPLITS
from metadist.tasks.images import ImageSet, cached
from metadist.tasks.omniglot import Omniglot
from metadist.tasks.sources import data_folder

CIFAR = ("cifar100_test100.npz", *(f"cifar100_train500_fs{split}.npz" for split in ("train", "val", "test")))


def class_images(source: str, size: int) -> ImageSet:
    """Return grey images u8 [N, 1, size, size] of ``source`` (``omniglot`` or ``cifar100``).

    The part of a class is its split: Vinyals' for Omniglot, CIFAR-FS's for CIFAR-100 (all 600 images of a class).
    """
    if source == "omniglot":
        whole = Omniglot().load()
        return cached(f"omniglot{size}", f"{whole.sha256} {size} box", lambda: _small_omniglot(whole, size))
    folder = data_folder("cifar100", CIFAR)
    if folder is None:
        raise ConfigError("tasks.data: cifar100 needs METADIST_DATA, a folder with cifar100/; or use omniglot alone")
    missing = [name for name in CIFAR if not (folder / name).is_file()]
    if missing:
        raise DataError(f"METADIST_DATA = {os.environ['METADIST_DATA']} has no cifar100/{missing[0]}")
    digest = hashlib.sha256()
    for name in CIFAR:
        digest.update((folder / name).read_bytes())
    return cached(f"cifar100-{size}", f"{digest.hexdigest()} {size} grey box", lambda: _small_cifar(folder, size))


def _small_omniglot(whole: ImageSet, size: int) -> ImageSet:
    split_of = {c: split for split, classes in Omniglot().split_classes(whole).items() for c in classes}
    labels = [(split_of[c], name) for c, name in enumerate(whole.names) for _ in range(whole.counts[c])]
    return ImageSet.grouped(_shrunk(whole.pixels[:, 0], size), labels)


def _small_cifar(folder: Path, size: int) -> ImageSet:
    from PIL import Image

    parts, labels = [], []
    for name in CIFAR:
        with np.load(folder / name, allow_pickle=False) as arrays:
            names, splits = arrays["class_names"].tolist(), arrays["cifarfs_split"].tolist()
            if "images" in arrays.files:
                images = arrays["images"]
            else:
                webp, offsets = arrays["webp"], arrays["offsets"]
                mosaics = [
                    np.asarray(Image.open(io.BytesIO(webp[first:last].tobytes())).convert("RGB"))
                    for first, last in zip(offsets[:-1], offsets[1:])
                ]
                tiles = np.stack(mosaics).reshape(len(mosaics), 20, 32, 25, 32, 3)
                images = tiles.transpose(0, 1, 3, 2, 4, 5).reshape(len(mosaics), 500, 32, 32, 3)
        flat = images.reshape(-1, 32, 32, 3)
        parts.append(_shrunk(flat, size))
        labels += [(SPLITS[s], n) for n, s in zip(names, splits) for _ in range(images.shape[1])]
    return ImageSet.grouped(np.concatenate(parts), labels)


def _shrunk(images: np.ndarray, size: int) -> np.ndarray:
    """Return images u8 [N, height, width, …] as grey ones [N, 1, size, size]: means over areas."""
    from PIL import Image

    out = np.empty((len(images), 1, size, size), np.uint8)
    for i, image in enumerate(images):
        small = Image.fromarray(image).convert("L").resize((size, size), Image.Resampling.BOX)
        out[i, 0] = np.asarray(small)
    return out
