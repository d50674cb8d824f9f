"""Read CIFAR-100 (Krizhevsky 2009) from METADIST_DATA: 100 classes of 500 training and 100 test images, 32 × 32 × 3."""

from __future__ import annotations

import hashlib
import io
import os

import numpy as np

from metadist.core.errors import DataError
from metadist.tasks.images import ImageSet, cached
from metadist.tasks.sources import data_folder

TRAIN = tuple(f"cifar100_train500_fs{split}.npz" for split in ("train", "val", "test"))
TEST = "cifar100_test100.npz"


def cifar100() -> ImageSet:
    """Return all images: the parts are ``train`` and ``test``, and each has all classes."""
    folder = data_folder("cifar100", (*TRAIN, TEST))
    missing = [name for name in (*TRAIN, TEST) if folder is None or not (folder / name).is_file()]
    if folder is None or missing:
        root = os.environ.get("METADIST_DATA", "not set")
        raise DataError(
            f"METADIST_DATA = {root} has no cifar100/{missing[0]}; put the files there, or use tasks.source: omniglot"
        )
    digest = hashlib.sha256(b"".join((folder / name).read_bytes() for name in (*TRAIN, TEST))).hexdigest()
    return cached("cifar100", f"cifar100 {digest}", lambda: _read([str(folder / n) for n in TRAIN], str(folder / TEST)))


def _read(train: list[str], test: str) -> ImageSet:
    from PIL import Image

    pixels: list[np.ndarray] = []
    labels: list[tuple[str, str]] = []
    with np.load(test, allow_pickle=False) as arrays:
        images, names = arrays["images"], arrays["class_names"].tolist()
    for name, own in zip(names, images):
        pixels.append(own)
        labels += [("test", name)] * len(own)
    for path in train:
        with np.load(path, allow_pickle=False) as arrays:
            webp, offsets, names = arrays["webp"], arrays["offsets"], arrays["class_names"].tolist()
        for i, name in enumerate(names):
            mosaic = Image.open(io.BytesIO(webp[offsets[i] : offsets[i + 1]].tobytes())).convert("RGB")
            tiles = np.asarray(mosaic).reshape(20, 32, 25, 32, 3).transpose(0, 2, 1, 3, 4).reshape(500, 32, 32, 3)
            pixels.append(tiles)
            labels += [("train", name)] * len(tiles)
    return ImageSet.grouped(np.concatenate(pixels).transpose(0, 3, 1, 2), labels)
