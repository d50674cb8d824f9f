"""List the pictures below a folder, a URL or in a zip archive, with a report of everything that is passed over."""

from __future__ import annotations

import hashlib
import io
import json
import os
import posixpath
import unicodedata
import zipfile
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np

from metadist.core.errors import DataError
from metadist.tasks.decode import Decode

#: the kinds of pictures that are read; a kind that this version of Pillow lacks is refused by name
SUFFIXES = (
    *(".png", ".apng", ".jpg", ".jpeg", ".jpe", ".jfif", ".jp2", ".j2k", ".jpx", ".bmp", ".dib", ".gif", ".webp"),
    *(".avif", ".tif", ".tiff", ".pgm", ".ppm", ".pbm", ".pnm", ".tga", ".pcx", ".sgi", ".qoi"),
)
#: the kinds of tables that are read
TABLES = (".parquet", ".arrow", ".feather")
#: files of other kinds that often lie in folders of pictures; a folder may hold these alone
BESIDE = (
    *(".txt", ".md", ".rst", ".csv", ".tsv", ".json", ".jsonl", ".xml", ".yaml", ".yml", ".toml", ".ini", ".html"),
    *(".htm", ".pdf", ".py", ".ipynb", ".sh", ".log", ".db", ".zip", ".gz", ".tar", ".lock", ".crc", *TABLES),
)
#: folders that systems and archives add; all whose names begin with a dot are passed over too
SYSTEM_FOLDERS = ("__MACOSX", "__pycache__", "@eaDir", "$RECYCLE.BIN", "System Volume Information", "lost+found")


@dataclass(frozen=True)
class Files:
    """Image files below one root: relative names in order, a text that identifies all, and a function to read one.

    ``notes`` name and count the files and folders that are passed over.
    """

    root: str
    names: tuple[str, ...]
    identity: str
    read: Callable[[str], bytes]
    notes: tuple[str, ...] = ()

    def decode(self, decode: Decode, names: Sequence[str]) -> np.ndarray:
        """Decode the files ``names`` to u8 [len(names), channels, size, size]."""
        return decode.all(((f"{self.root}/{shown(n)}", partial(self.read, n)) for n in names), len(names))


@dataclass(frozen=True)
class Listing:
    """All files below one root: (relative name, size and time of change) in order, and a function to read one."""

    root: str
    entries: tuple[tuple[str, object], ...]
    read: Callable[[str], bytes]
    notes: tuple[str, ...]

    def matching(self, suffixes: tuple[str, ...]) -> Files:
        """Return the files whose names end with one of ``suffixes``. Raises DataError for a lost class.

        A folder without any of them is such a class, unless it holds nothing but texts, tables and the like.
        """
        entries = [entry for entry in self.entries if entry[0].lower().endswith(suffixes)]
        names = tuple(n for n, _ in entries)
        others = [n for n, _ in self.entries if not n.lower().endswith(suffixes)]
        with_pictures = {above for n in names for above in _above(n)}
        lost: dict[str, list[str]] = {}
        for n in others:
            folder = posixpath.dirname(n)
            if names and folder and folder not in with_pictures and not _is_companion(n):
                lost.setdefault(folder, []).append(n)
        if lost:
            folder, held = next(iter(sorted(lost.items())))
            raise DataError(
                f"{self.root}/{shown(folder)} has no picture of a known kind, but {len(held)} other files "
                f"({_by_suffix(held)}); convert them to .png, or move the folder away"
            )
        for name in names:
            _check_name(self.root, name)
        kinds = (f"{_count(len(others), 'file')} of other kinds ({_by_suffix(others)})",) if others else ()
        identity = hashlib.sha256(json.dumps(entries).encode()).hexdigest()
        return Files(self.root, names, identity, self.read, (*kinds, *self.notes))


def in_folder(path: str) -> Files:
    """List all images below a folder or fsspec URL. Name, size and change time identify them, not their content."""
    return everything_in(path).matching(SUFFIXES)


def by_class(decode: Decode, path: str) -> tuple[np.ndarray, list[str], list[str]]:
    """Decode all images below a folder or URL: return float32 in [0, 1], names, and classes (the folders)."""
    files = in_folder(path)
    pixels = files.decode(decode, files.names)
    classes = [unicodedata.normalize("NFC", posixpath.dirname(n)) for n in files.names]
    return pixels.astype(np.float32) * np.float32(1 / 255), [shown(n) for n in files.names], classes


def everything_in(path: str) -> Listing:
    """List all files below a folder or fsspec URL, but hidden ones and those of the system.

    A link to a folder that holds the link is not followed. Raises DataError where a folder is there twice, by a link,
    or cannot be read.
    """
    import fsspec

    read: Callable[[str], bytes]
    found: list[tuple[str, object]]
    if "://" in path and not path.startswith(("file://", "local://")):
        system, root = fsspec.core.url_to_fs(path)
        below = {n[len(root) :].strip("/"): info for n, info in system.find(root, detail=True).items()}
        found = [(n, sorted((k, str(v)) for k, v in info.items())) for n, info in sorted(below.items()) if n]
        notes: list[str] = []

        def read(name: str) -> bytes:
            return system.cat_file(posixpath.join(root, name))
    else:
        # Not fsspec's find, which takes a linked folder for a file.
        folder = fsspec.core.url_to_fs(path)[1] if "://" in path else path
        walk = _Walk(folder)
        found, notes = sorted(walk.files()), walk.notes()

        def read(name: str) -> bytes:
            return Path(folder, name).read_bytes()

    kept, hidden = [], Counter[str]()
    for entry in found:
        if part := next((part for part in entry[0].split("/") if is_hidden(part)), None):
            hidden[part] += 1
        else:
            kept.append(entry)
    if hidden:
        notes.insert(0, f"{sum(hidden.values()):,} hidden files and folders ({_most(hidden)})")
    return Listing(path.rstrip("/"), tuple(kept), read, tuple(notes))


class _Walk:
    """Walk through a local folder and its links to other folders."""

    def __init__(self, root: str) -> None:
        self._root, self._seen = root, dict[str, str]()
        self._loops, self._empty = list[str](), list[str]()

    def files(self) -> Iterator[tuple[str, object]]:
        """Yield (relative name, [size, time of change in ns]) of every file."""
        yield from self._below("", (os.path.realpath(self._root),))

    def notes(self) -> list[str]:
        """Return what the walk passed over."""
        loops = [f"{_count(len(self._loops), 'link')} to a folder above itself ({_first(self._loops)})"]
        empty = [f"{_count(len(self._empty), 'empty folder')} ({_first(self._empty)})"]
        return (loops if self._loops else []) + (empty if self._empty else [])

    def _below(self, folder: str, above: tuple[str, ...]) -> Iterator[tuple[str, object]]:
        path = os.path.join(self._root, folder)
        try:
            entries = sorted(os.scandir(path), key=lambda entry: entry.name)
        except OSError as error:
            raise DataError(f"{shown(path)} cannot be read ({error.strerror}); check the permissions") from error
        if folder and not entries:
            self._empty.append(folder)
        for entry in entries:
            name = posixpath.join(folder, entry.name)
            if not os.path.isdir(entry.path):
                known = entry.name.lower().endswith((*SUFFIXES, *TABLES)) and not is_hidden(entry.name)
                yield name, _stamp(Path(entry.path)) if known else []
            elif is_hidden(entry.name):
                yield posixpath.join(name, "*"), []
            else:
                yield from self._folder(name, entry.path, above)

    def _folder(self, name: str, path: str, above: tuple[str, ...]) -> Iterator[tuple[str, object]]:
        real = os.path.realpath(path)
        if real in above:
            self._loops.append(name)
            return
        if (other := self._seen.setdefault(real, name)) != name:
            raise DataError(
                f"{self._root}: '{shown(other)}' and '{shown(name)}' are one folder, by a link; its pictures would be "
                "there twice; remove the link"
            )
        yield from self._below(name, (*above, real))


def _stamp(path: Path) -> list[int]:
    try:
        stat = path.stat()
    except OSError as error:
        raise DataError(f"{path} cannot be read ({error.strerror}); check the link and the permissions") from error
    return [stat.st_size, stat.st_mtime_ns]


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

    held = (n for n in archive.namelist() if n.lower().endswith(SUFFIXES) and not any(map(is_hidden, n.split("/"))))
    return Files(where, tuple(sorted(held)), hashlib.sha256(data).hexdigest(), read)


def shown(name: str) -> str:
    """Return a name of the file system for messages: control characters and undecodable bytes are escaped."""
    return "".join(c if unicodedata.category(c) not in ("Cc", "Cs") else ascii(c)[1:-1] for c in name)


def _check_name(root: str, name: str) -> None:
    if name != (safe := shown(name)):
        raise DataError(
            f"{root}: the name '{safe}' has bytes that are not UTF-8, or control characters; rename the file or folder"
        )


def is_hidden(part: str) -> bool:
    """Return whether a part of a path is hidden, or made by the system."""
    # macOS adds "._name.png" and "__MACOSX/" to archives.
    return part.startswith(".") or part in SYSTEM_FOLDERS


def _is_companion(name: str) -> bool:
    base = posixpath.basename(name).lower()
    return base.endswith(BESIDE) or base.startswith(("readme", "license", "licence", "_success", "thumbs.db"))


def _above(name: str) -> Iterator[str]:
    """Yield all folders of a relative name."""
    while name := posixpath.dirname(name):
        yield name


def _by_suffix(names: Iterable[str]) -> str:
    return _most(Counter(shown(posixpath.splitext(n)[1].lower()) or "without a suffix" for n in names))


def _most(counts: Counter[str]) -> str:
    """Return the most frequent keys with their counts."""
    listed = [f"{shown(key)} {count}" for key, count in sorted(counts.items(), key=lambda item: (-item[1], item[0]))]
    return ", ".join(listed[:5]) + (", …" if len(listed) > 5 else "")


def _first(names: Sequence[str]) -> str:
    return ", ".join(map(shown, names[:5])) + (", …" if len(names) > 5 else "")


def _count(n: int, what: str) -> str:
    return f"{n:,} {what}" + "s" * (n != 1)
