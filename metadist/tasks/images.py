"""Sets of labelled images: one copy per node, in the cache and memory-mapped by every process, and one per device."""

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

log = logging.getLogger(__name__)


def cache_directory() -> Path:
    """``METADIST_CACHE``, or ~/.cache/metadist. Whatever is in it may be deleted at any time."""
    return Path(os.environ.get("METADIST_CACHE") or "~/.cache/metadist").expanduser()


@dataclass(frozen=True, eq=False)
class ImageSet:
    """Images u8 [N, channels, height, width], class after class; of each class its name, its number of images and its
    part (the part of the data set that it comes from, or ""). Classes are in the order of (part, name)."""

    pixels: np.ndarray
    names: tuple[str, ...]
    counts: tuple[int, ...]
    parts: tuple[str, ...]
    sha256: str

    @classmethod
    def of(cls, pixels: np.ndarray, names: Sequence[str], counts: Sequence[int], parts: Sequence[str]) -> ImageSet:
        """``sha256`` covers the pixels, their shape and the classes."""
        pixels = np.ascontiguousarray(pixels)
        digest = hashlib.sha256(json.dumps([pixels.shape, names, counts, parts]).encode())
        digest.update(pixels.data)
        return cls(pixels, tuple(names), tuple(counts), tuple(parts), digest.hexdigest())

    @classmethod
    def grouped(cls, pixels: np.ndarray, labels: Sequence[tuple[str, str]]) -> ImageSet:
        """From one (part, class name) per image; the images of a class keep their order."""
        order = sorted(range(len(labels)), key=labels.__getitem__)
        if order != list(range(len(labels))):
            pixels = pixels[order]
        counts: dict[tuple[str, str], int] = {}
        for i in order:
            counts[labels[i]] = counts.get(labels[i], 0) + 1
        return cls.of(pixels, [name for _, name in counts], list(counts.values()), [part for part, _ in counts])


def cached(name: str, source: str, build: Callable[[], ImageSet]) -> ImageSet:
    """The image set made from ``source`` (a text that identifies the original bytes and what is done to them).

    The first process on a node builds it and writes the decoded array to the cache; the others wait for that and map
    the same pages. Where the cache can't be written, each process holds its own copy.
    """
    from filelock import FileLock

    directory = cache_directory()
    entry = directory / f"{name}-{hashlib.sha256(source.encode()).hexdigest()[:16]}.json"
    found = _open(entry)  # without the lock: a cache that was filled beforehand may be read-only
    if found is not None:
        return found
    lock = FileLock(f"{entry}.lock")
    try:
        directory.mkdir(parents=True, exist_ok=True)
        lock.acquire(timeout=1800)
    except OSError as error:
        log.warning(
            "cannot use the cache %s (%s): this process holds its own copy; set METADIST_CACHE", directory, error
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
            log.warning("cannot write to the cache %s (%s): this process holds its own copy", directory, error)
            return built
        return _open(entry) or built
    finally:
        lock.release()


def _open(entry: Path) -> ImageSet | None:
    """The set that ``entry`` describes, mapped; None where there is none or where it is damaged."""
    try:
        meta = json.loads(entry.read_text())
        # Copy-on-write, not read-only: the same shared pages, and torch takes no read-only arrays.
        pixels = np.load(entry.with_name(meta["file"]), mmap_mode="c", allow_pickle=False)
        found = ImageSet.of(pixels, meta["names"], meta["counts"], meta["parts"])
        if found.sha256 == meta["sha256"]:
            return found
        log.warning("%s is damaged: building it anew", entry.with_name(meta["file"]))
    except FileNotFoundError:
        pass
    except (OSError, ValueError, KeyError) as error:
        log.warning("%s is unreadable (%s): building it anew", entry, error)
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
    }
    with replacing(entry) as temporary:
        temporary.write_text(json.dumps(meta))


@contextmanager
def replacing(target: Path) -> Iterator[Path]:
    """A temporary path beside ``target`` that takes its place if the block succeeds and goes away if it doesn't."""
    temporary = target.with_name(f"{target.name}.{os.getpid()}.tmp")
    try:
        yield temporary
        os.replace(temporary, target)
    finally:
        temporary.unlink(missing_ok=True)


def turned(images: ImageSet) -> ImageSet:
    """The images, then all of them turned by 90°, by 180° and by 270° as ``torch.rot90`` does: a turned image is one to
    gather like any other. Like the images, a node holds them once."""

    def build() -> ImageSet:
        turns = [np.rot90(images.pixels, turn, (-2, -1)) for turn in range(4)]
        return ImageSet.of(np.concatenate(turns), images.names, images.counts, images.parts)

    return cached("turned", images.sha256, build)


_COPIES: WeakValueDictionary[tuple[str, str], Tensor] = WeakValueDictionary()


def on_device(images: ImageSet, device: torch.device) -> Tensor:
    """The pixels on ``device``, shared by all families of this process that use them."""
    key = (images.sha256, str(device))
    copy = _COPIES.get(key)
    if copy is None:
        copy = _COPIES[key] = torch.from_numpy(images.pixels).to(device)
    return copy
