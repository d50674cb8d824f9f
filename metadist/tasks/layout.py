"""Read splits and classes out of the folders of a data set, or of the names of its tables."""

from __future__ import annotations

import json
import posixpath
import re
import unicodedata
from collections.abc import Iterable, Mapping, Sequence

from metadist.core.errors import ConfigError, DataError, nearest
from metadist.core.random import SPLITS
from metadist.tasks.folders import shown

#: the spellings of the names of splits, without case, punctuation and digits: Train, val2017, test_set, train-images
_SPLIT = re.compile(
    r"(?:meta)?(?:(train|training)|(val|valid|validation|dev)|(test|testing))"
    r"(?:set|data|dataset|images?|imgs?|split|classes|shards?|folder)?"
)
EXPECTED = "expected PATH/train/CLASS/IMAGE, PATH/validation/CLASS/IMAGE and PATH/test/CLASS/IMAGE, or PATH/CLASS/IMAGE"


def split_of(name: str) -> str | None:
    """Return the split that a folder or file is named after, or None: ``Train``, ``val``, ``test_images2`` …"""
    found = _SPLIT.fullmatch(re.sub(r"[\W_\d]+", "", unicodedata.normalize("NFKC", name).casefold()))
    return None if found is None else SPLITS[[group is not None for group in found.groups()].index(True)]


def split_of_table(name: str) -> str | None:
    """Return the split that a table's folder or file is named after: ``train/0.parquet``, ``test-0-of-2.parquet``."""
    *folders, base = name.split("/")
    return next((s for s in map(split_of, (*folders, re.split(r"[-_.\d]", base)[0])) if s is not None), None)


def labels(root: str, files: Sequence[str], *, any_layout: bool = False) -> list[tuple[str, str]]:
    """Return (split, class) of each file, whose names are relative to ``root``; the split is "" without split folders.

    A class is the path of a folder in NFC, without the split folder at its top. Raises DataError for layouts in which
    test classes could be trained on. ``any_layout``: take such a layout as classes, which a split list tells apart.
    """
    folders = {posixpath.dirname(n) for n in files}
    if "" in folders:
        stray = next(n for n in files if "/" not in n)
        raise DataError(f"tasks.path = {root}: '{stray}' is in no folder; move every image to its class's folder")
    named = _split_folders(root, folders, any_layout)
    labelled = {f: _label(f, named) for f in folders}
    _refuse_two_spellings(root, labelled)
    return [labelled[posixpath.dirname(n)] for n in files]


def _label(folder: str, named: Mapping[str, str]) -> tuple[str, str]:
    top, _, rest = folder.partition("/")
    return (named[top], unicodedata.normalize("NFC", rest)) if named else ("", unicodedata.normalize("NFC", folder))


def _split_folders(root: str, folders: set[str], any_layout: bool) -> dict[str, str]:
    """Return the split of each top folder; empty where the top folders are classes."""
    tops = sorted({f.partition("/")[0] for f in folders})
    named = {top: split for top in tops if (split := split_of(top)) is not None}
    others = [top for top in tops if top not in named]
    flat = [top for top in named if top in folders]
    if not others and not flat and len(set(named.values())) == len(named):
        _refuse_nested(root, folders)
        return named
    if any_layout:
        return {}
    if len(flat) < len(named) or len(set(named.values())) > 1:
        raise DataError(f"tasks.path = {root}: {_confusion(named, others, flat)}")
    _refuse_nested(root, folders)
    return {}


def _confusion(named: Mapping[str, str], others: Sequence[str], flat: Sequence[str]) -> str:
    """Return what is wrong with folders some of which are named after splits."""
    splits = ", ".join(f"'{top}'" for top in named)
    if flat:
        return f"the split folder '{flat[0]}' holds images that are in no class folder; {EXPECTED}, or tasks.split_list"
    if others:
        more = ", ".join(f"'{top}'" for top in others[:3]) + (", …" if len(others) > 3 else "")
        return (
            f"beside the split folders {splits} there is {more}, which is no split; move it away, or name the classes "
            "of each split in tasks.split_list"
        )
    twice = next(split for split in named.values() if list(named.values()).count(split) > 1)
    same = " and ".join(f"'{top}'" for top, split in named.items() if split == twice)
    return f"{same} are both folders of the {twice} split; keep one of them"


def _refuse_nested(root: str, folders: Iterable[str]) -> None:
    """Refuse two splits side by side below the top: PATH/data/train, or PATH/CLASS/train."""
    seen: dict[str, tuple[str, str]] = {}
    for parts in (folder.split("/") for folder in sorted(folders)):
        for depth in range(1, len(parts)):
            if (split := split_of(parts[depth])) is None:
                continue
            path = "/".join(parts[: depth + 1])
            first, other = seen.setdefault("/".join(parts[:depth]), (split, path))
            if first != split:
                raise DataError(
                    f"tasks.path = {root}: the splits '{other}' and '{path}' are not at the top; {EXPECTED}; choose "
                    "another tasks.path, or name the classes of each split in tasks.split_list"
                )


def _refuse_two_spellings(root: str, labelled: Mapping[str, tuple[str, str]]) -> None:
    seen: dict[tuple[str, str], str] = {}
    for folder, label in sorted(labelled.items()):
        if (other := seen.setdefault(label, folder)) != folder:
            raise DataError(
                f"tasks.path = {root}: the folders {ascii(other)} and {ascii(folder)} are one name, '{label[1]}', in "
                "two Unicode forms (NFC, NFD); join them"
            )


def classes_within_classes(names: Iterable[str]) -> list[str]:
    """Return the classes whose folder lies in the folder of another class."""
    known = set(names)
    return sorted(n for n in known if any(n[:i] in known for i, c in enumerate(n) if c == "/"))


def same_but_for_case(splits: Mapping[str, Sequence[str]]) -> list[str]:
    """Return the classes whose names differ from those of another split in upper and lower case alone."""
    found: dict[str, dict[str, str]] = {}
    for split, names in splits.items():
        for name in names:
            found.setdefault(name.casefold(), {})[split] = name
    return sorted(name for spellings in found.values() if len(spellings) > 1 for name in spellings.values())


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
    for split in lists:
        if split not in SPLITS:
            raise ConfigError(
                f"tasks.split_list = {path}: '{shown(split)}' is not one of {', '.join(SPLITS)}{nearest(split, SPLITS)}"
            )
    index = {name: i for i, name in enumerate(known)}

    def number(name: object) -> int:
        text = unicodedata.normalize("NFC", str(name))
        if text not in index:
            raise ConfigError(f"tasks.split_list = {path}: there is no class '{shown(text)}'{nearest(text, known)}")
        return index[text]

    return {split: [number(name) for name in names] for split, names in lists.items()}
