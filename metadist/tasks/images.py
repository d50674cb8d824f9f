"""Load sets of labelled images: one copy per node, which all its processes memory-map, and one per device."""

from __future__ import annotations

import hashlib
import json
import logging
import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from weakref import WeakValueDictionary

import numpy as np
import torch
from torch import Tensor

from metadist.storage.places import cache_root

log = logging.getLogger(__name__)


@dataclass(frozen=True, eq=False)
class ImageSet:
    """Images u8 [N, channels, height, width] in the order of their classes.

    Each class has a name, a number of images and a part (of the data set, or ""). Classes are in the order of (part,
    name). ``items`` are names of the images, where they matter; ``notes`` name files and folders that hold no images.
    """

    pixels: np.ndarray
    names: tuple[str, ...]
    counts: tuple[int, ...]
    parts: tuple[str, ...]
    sha256: str
    items: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()

    @classmethod
    def of(
        cls,
        pixels: np.ndarray,
        names: Sequence[str],
        counts: Sequence[int],
        parts: Sequence[str],
        items: Sequence[str] = (),
    ) -> ImageSet:
        """Return a set whose ``sha256`` covers the pixels, their shape, the classes and the items."""
        pixels = np.ascontiguousarray(pixels)
        described = [pixels.shape, names, counts, parts, *([items] if items else [])]
        digest = hashlib.sha256(json.dumps(described).encode())
        digest.update(pixels.data)
        return cls(pixels, tuple(names), tuple(counts), tuple(parts), digest.hexdigest(), tuple(items))

    @classmethod
    def grouped(cls, pixels: np.ndarray, labels: Sequence[tuple[str, str]], items: Sequence[str] = ()) -> ImageSet:
        """Return a set from one (part, class name) per image; the images of a class keep their order."""
        order = sorted(range(len(labels)), key=labels.__getitem__)
        if order != list(range(len(labels))):
            pixels = pixels[order]
        counts: dict[tuple[str, str], int] = {}
        for i in order:
            counts[labels[i]] = counts.get(labels[i], 0) + 1
        names, parts = [name for _, name in counts], [part for part, _ in counts]
        return cls.of(pixels, names, list(counts.values()), parts, [items[i] for i in order] if items else [])


def cached(name: str, source: str, build: Callable[[], ImageSet]) -> ImageSet:
    """Return the image set of ``source``, a text that identifies the original bytes and their processing.

    The first process of a node builds the set and writes the decoded array to the cache; the others wait and map the
    same pages. Where the cache is not writable, each process has its own copy.
    """
    from filelock import FileLock

    directory = cache_root()
    entry = directory / f"{name}-{hashlib.sha256(source.encode()).hexdigest()[:16]}.json"
    found = _open(entry)  # without the lock: a complete cache may be read-only
    if found is not None:
        return found
    lock = FileLock(f"{entry}.lock")
    try:
        directory.mkdir(parents=True, exist_ok=True)
        lock.acquire(timeout=1800)
    except OSError as error:
        log.warning(
            "cannot use the cache %s (%s): this process has its own copy; set METADIST_CACHE to a writable folder",
            directory,
            error,
        )
        return build()
    try:
        found = _open(entry)
        if found is not None:
            return found
        built = build()
        try:
            _save(entry, name, built)
        except OSError as error:
            log.warning("cannot write to the cache %s (%s): this process has its own copy", directory, error)
            return built
        return _open(entry) or built
    finally:
        lock.release()


def _open(entry: Path) -> ImageSet | None:
    """Map the set that ``entry`` describes; return None where there is none or it is damaged."""
    try:
        meta = json.loads(entry.read_text())
        # Copy-on-write, not read-only: pages are shared just the same, and torch accepts no read-only arrays.
        pixels = np.load(entry.with_name(meta["file"]), mmap_mode="c", allow_pickle=False)
        found = ImageSet.of(pixels, meta["names"], meta["counts"], meta["parts"], meta.get("items", []))
        if found.sha256 == meta["sha256"]:
            return found
        log.warning("%s is damaged: building it again", entry.with_name(meta["file"]))
    except FileNotFoundError:
        pass
    except (OSError, ValueError, KeyError) as error:
        log.warning("%s is unreadable (%s): building it again", entry, error)
    return None


def _save(entry: Path, name: str, images: ImageSet) -> None:
    array = entry.with_name(f"{name}-{images.sha256[:16]}.npy")
    with replacing(array) as temporary, open(temporary, "wb") as file:
        np.save(file, images.pixels, allow_pickle=False)
    meta = {
        "file": array.name,
        "names": images.names,
        "counts": images.counts,
        "parts": images.parts,
        "sha256": images.sha256,
        "items": images.items,
    }
    with replacing(entry) as temporary:
        temporary.write_text(json.dumps(meta))


@contextmanager
def replacing(target: Path) -> Iterator[Path]:
    """Yield a temporary path that replaces ``target`` if the block succeeds, and is deleted otherwise."""
    temporary = target.with_name(f"{target.name}.{os.getpid()}.tmp")
    try:
        yield temporary
        os.replace(temporary, target)
    finally:
        temporary.unlink(missing_ok=True)


def turned(images: ImageSet) -> ImageSet:
    """Return the images, followed by all of them turned by 90°, 180° and 270° as ``torch.rot90`` does.

    Episodes gather a turned image like any other. A node has one copy.
    """

    def build() -> ImageSet:
        turns = [np.rot90(images.pixels, turn, (-2, -1)) for turn in range(4)]
        return ImageSet.of(np.concatenate(turns), images.names, images.counts, images.parts)

    return cached("turned", images.sha256, build)


_COPIES: WeakValueDictionary[tuple[str, str], Tensor] = WeakValueDictionary()


def on_device(images: ImageSet, device: torch.device) -> Tensor:
    """Return the pixels on ``device``; all families of this process share them."""
    key = (images.sha256, str(device))
    copy = _COPIES.get(key)
    if copy is None:
        copy = _COPIES[key] = torch.from_numpy(images.pixels).to(device)
    return copy
