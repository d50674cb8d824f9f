"""Read images from folders (any fsspec URL), zip archives, Arrow and Parquet files and downloads; read split lists."""

from __future__ import annotations

import hashlib
import http.client
import io
import json
import logging
import os
import posixpath
import urllib.request
import zipfile
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from metadist.core.errors import ConfigError, DataError, nearest
from metadist.core.random import SPLITS
from metadist.storage.places import cache_root
from metadist.tasks.images import replacing

log = logging.getLogger(__name__)

SUFFIXES = (".png", ".jpg", ".jpeg", ".bmp", ".gif", ".webp", ".tif", ".tiff", ".pgm", ".ppm")


@dataclass(frozen=True)
class Decode:
    """Decode encoded bytes to a square image u8 [channels, size, size].

    The image is turned as its EXIF says, transparent pixels become white, 16 bits become 8, and the longer side is
    cropped about the centre (LANCZOS filter). ``invert`` makes dark ink on light paper bright on dark.
    """

    size: int
    channels: int
    invert: bool

    def __call__(self, where: str, read: Callable[[], bytes]) -> np.ndarray:
        from PIL import Image

        try:
            return self.pixels(Image.open(io.BytesIO(read())))
        except DataError:
            raise
        except Exception as error:  # Pillow raises a dozen types, SyntaxError and struct.error among them
            raise DataError(f"{where} is not a readable image ({error}); replace or remove it") from error

    def pixels(self, image: Any) -> np.ndarray:
        from PIL import Image, ImageOps

        image = ImageOps.exif_transpose(image)
        if image.mode.startswith("I"):
            image = Image.fromarray((np.asarray(image) >> 8).astype(np.uint8))
        elif image.mode in ("RGBA", "LA", "PA") or "transparency" in image.info:
            image = image.convert("RGBA")
            image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
        image = image.convert("L" if self.channels == 1 else "RGB")
        if self.invert:
            image = ImageOps.invert(image)  # before the filter: its rounding is not symmetric
        image = ImageOps.fit(image, (self.size, self.size), Image.Resampling.LANCZOS)
        return np.asarray(image).reshape(self.size, self.size, self.channels).transpose(2, 0, 1)

    def all(self, images: Iterable[tuple[str, Callable[[], bytes]]], count: int) -> np.ndarray:
        """Decode ``count`` images of (name, function that reads the bytes) to u8 [count, channels, size, size]."""
        pixels = np.empty((count, self.channels, self.size, self.size), np.uint8)
        with ThreadPoolExecutor(8) as pool:
            for i, decoded in enumerate(pool.map(lambda image: self(*image), images)):
                pixels[i] = decoded
        return pixels

    def by_class(self, path: str) -> tuple[np.ndarray, list[str], list[str]]:
        """Decode all images below a folder or URL: return float32 in [0, 1], names, and classes (the folders)."""
        files = in_folder(path)
        pixels = files.decode(self, files.names)
        return (
            pixels.astype(np.float32) * np.float32(1 / 255),
            list(files.names),
            [n.rpartition("/")[0] for n in files.names],
        )

    def source(self, what: str) -> str:
        """Return a text that identifies ``what`` as decoded by this version of Pillow, for ``images.cached``."""
        import PIL

        return f"{what} {self} pillow {PIL.__version__}"


@dataclass(frozen=True)
class Files:
    """Image files below one root: relative names in order, a text that identifies all, and a function to read one."""

    root: str
    names: tuple[str, ...]
    identity: str
    read: Callable[[str], bytes]

    def decode(self, decode: Decode, names: Sequence[str]) -> np.ndarray:
        return decode.all(((f"{self.root}/{n}", partial(self.read, n)) for n in names), len(names))


def in_folder(path: str) -> Files:
    """List all images below a folder or fsspec URL. Name, size and change time identify them, not their content."""
    listing: Sequence[tuple[str, object]]
    if "://" in path:
        import fsspec

        system, root = fsspec.core.url_to_fs(path)
        found = {n[len(root) :].strip("/"): info for n, info in system.find(root, detail=True).items() if _is_image(n)}
        listing = [(n, sorted((k, str(v)) for k, v in info.items())) for n, info in sorted(found.items())]

        def read(name: str) -> bytes:
            return system.cat_file(posixpath.join(root, name))
    else:
        # Not fsspec's find, which takes a linked folder for a file.
        below = [Path(folder, n) for folder, _, files in os.walk(path, followlinks=True) for n in files if _is_image(n)]
        listing = sorted((p.relative_to(path).as_posix(), _stamp(p)) for p in below)

        def read(name: str) -> bytes:
            return Path(path, name).read_bytes()

    identity = hashlib.sha256(json.dumps(listing).encode()).hexdigest()
    return Files(path.rstrip("/"), tuple(n for n, _ in listing), identity, read)


def _stamp(path: Path) -> list[int]:
    try:
        stat = path.stat()
    except OSError as error:
        raise DataError(f"{path} cannot be read ({error.strerror}); check the link and the permissions") from error
    return [stat.st_size, stat.st_mtime_ns]


def data_folder(name: str, files: Sequence[str]) -> Path | None:
    """Return the folder ``name`` in METADIST_DATA, or None if that variable is not set.

    Where METADIST_DATA is an fsspec URL, copy the existing ones of ``files`` to this node's cache, once for each state
    of the files.
    """
    root = os.environ.get("METADIST_DATA")
    if not root:
        return None
    if "://" not in root:
        return Path(os.path.expanduser(root)) / name
    import fsspec

    try:
        system, base = fsspec.core.url_to_fs(f"{root.rstrip('/')}/{name}")
        there = {f: f"{base}/{f}" for f in files if system.exists(f"{base}/{f}")}
        state = sorted((f, str(system.ukey(path))) for f, path in there.items())
        copy = cache_root() / "data" / hashlib.sha256(json.dumps([root, name, state]).encode()).hexdigest()[:16] / name
        for f, path in there.items():
            if not (copy / f).is_file():
                copy.mkdir(parents=True, exist_ok=True)
                with replacing(copy / f) as temporary:
                    system.get_file(path, str(temporary))
    except Exception as error:  # every fsspec backend raises its own
        raise DataError(f"METADIST_DATA = {root} cannot be reached ({' '.join(str(error).split())})") from error
    return copy


def in_zip(data: bytes, where: str) -> Files:
    """List the images in a zip archive; ``where`` names the archive in messages."""
    try:
        archive = zipfile.ZipFile(io.BytesIO(data))
    except zipfile.BadZipFile as error:
        raise DataError(f"{where} is not a zip archive ({error}); download it again") from error

    def read(name: str) -> bytes:
        try:
            return archive.read(name)
        except (zipfile.BadZipFile, OSError, ValueError, EOFError) as error:
            raise DataError(f"{where} is damaged at {name} ({error}); download it again") from error

    return Files(
        where, tuple(sorted(n for n in archive.namelist() if _is_image(n))), hashlib.sha256(data).hexdigest(), read
    )


def _is_image(name: str) -> bool:
    # macOS adds "._name.png" and "__MACOSX/" to archives.
    return name.lower().endswith(SUFFIXES) and not posixpath.basename(name).startswith(".") and "__MACOSX" not in name


def download(url: str, md5: str) -> bytes:
    """Return the file at ``url``, from the cache or the network. Raises DataError where its MD5 is not ``md5``."""
    target = cache_root() / posixpath.basename(url)
    try:
        data = target.read_bytes()
        if hashlib.md5(data, usedforsecurity=False).hexdigest() == md5:
            return data
        log.warning("%s is damaged: downloading it again", target)
    except OSError:
        pass
    log.info("downloading %s", url)
    by_hand = "or download the file by hand and set METADIST_DATA"
    try:
        with urllib.request.urlopen(url, timeout=60) as response:
            data = response.read()
    except (OSError, http.client.HTTPException) as error:
        raise DataError(f"cannot download {url} ({error}); try again, {by_hand}") from error
    found = hashlib.md5(data, usedforsecurity=False).hexdigest()
    if found != md5:
        raise DataError(f"{url} arrived with MD5 {found}, not {md5} ({len(data)} bytes); try again, {by_hand}")
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        with replacing(target) as temporary:
            temporary.write_bytes(data)
    except OSError as error:
        log.warning("cannot keep %s in the cache (%s)", target, error)
    return data


def table(path: str, image_column: str, label_column: str, decode: Decode) -> tuple[np.ndarray, list[str]]:
    """Read images u8 [rows, channels, size, size] and class names [rows] from a Parquet or Arrow (stream or file) file.

    An image is encoded bytes, a struct with ``bytes`` (Hugging Face), or a (nested) list of size × size × 1 or 3 pixel
    values. Labels are text or integers; integers become Hugging Face's class names where the schema has them.
    """
    import fsspec
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        system, root = fsspec.core.url_to_fs(path)
        with system.open(root, "rb") as file:
            if path.lower().endswith(".parquet"):
                data = pq.read_table(file)
            else:
                magic = file.read(6)
                file.seek(0)
                data = (pa.ipc.open_file(file) if magic == b"ARROW1" else pa.ipc.open_stream(file)).read_all()
    except Exception as error:  # every fsspec backend raises its own
        raise DataError(f"cannot read {path} ({error}); expected a Parquet or Arrow file") from error
    for key, column in (("image_column", image_column), ("label_column", label_column)):
        if column not in data.column_names:
            raise DataError(
                f"{path} has no column '{column}' (tasks.{key}), only {data.column_names}"
                f"{nearest(column, data.column_names)}"
            )
    labels = data[label_column].to_pylist()
    if None in labels:
        raise DataError(f"{path}, row {labels.index(None)}: no label; remove the row, or give it a label")
    names = _class_names(data.schema.metadata, label_column)

    def images() -> Iterator[tuple[str, Callable[[], bytes]]]:
        row = 0
        for chunk in data[image_column].chunks:
            for value in chunk:
                yield f"{path}, row {row}", partial(_encoded, value, decode.size, f"{path}, row {row}")
                row += 1

    return decode.all(images(), data.num_rows), [names.get(label, str(label)) for label in labels]


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


def split_list(path: str, known: Sequence[str]) -> dict[str, list[int]]:
    """Read a JSON file {"train": [class names], "validation": […], "test": […]}: split → indices in ``known``."""
    import fsspec

    try:
        system, root = fsspec.core.url_to_fs(path)
        lists = json.loads(system.cat_file(root))
    except Exception as error:  # every fsspec backend raises its own
        raise ConfigError(f"tasks.split_list = {path}: cannot be read as JSON ({error})") from error
    if not isinstance(lists, dict) or not all(isinstance(names, list) for names in lists.values()) or not lists:
        raise ConfigError(
            f"tasks.split_list = {path}: must be {{split: [class names]}} with the splits {', '.join(SPLITS)}"
        )
    index = {name: i for i, name in enumerate(known)}
    for split, names in lists.items():
        if split not in SPLITS:
            raise ConfigError(
                f"tasks.split_list = {path}: '{split}' is not one of {', '.join(SPLITS)}{nearest(split, SPLITS)}"
            )
        for name in names:
            if name not in index:
                raise ConfigError(f"tasks.split_list = {path}: there is no class '{name}'{nearest(str(name), known)}")
    return {split: [index[name] for name in names] for split, names in lists.items()}
