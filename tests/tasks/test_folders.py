"""Folders as strangers have them: test classes never train in silence, and what is passed over is named."""

from __future__ import annotations

import os
import shutil
import struct
import unicodedata
import zlib
from pathlib import Path

import fsspec
import numpy as np
import pytest
import torch
from PIL import Image

from metadist.core.errors import DataError
from metadist.tasks.decode import Decode
from metadist.tasks.folders import by_class, shown
from metadist.tasks.image_folder import ImageFolder
from metadist.tasks.layout import split_of, split_of_table

SPLITS = ("train", "validation", "test")
CPU = torch.device("cpu")


def tree(root: Path, *folders: str) -> Path:
    """Draw two grey pictures in each folder; each picture has a value of its own."""
    for i, folder in enumerate(folders):
        (root / folder).mkdir(parents=True)
        for j in range(2):
            Image.fromarray(np.full((6, 6), 20 * i + j, np.uint8)).save(root / folder / f"{j}.png")
    return root


def classes(root: Path, **settings: object) -> list[tuple[str, ...]]:
    family = ImageFolder(path=str(root), image_size=6, **settings)
    return [family.class_names(split) for split in SPLITS]


def notes(root: Path, **settings: object) -> str:
    return "; ".join(ImageFolder(path=str(root), image_size=6, **settings).data_notes())


# Splits ---------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "names",
    [
        ("Train", "Val", "Test"),
        ("TRAIN", "Validation", "TEST"),
        ("training_set", "dev", "test_set"),
        ("train2017", "val2017", "test2017"),
        ("meta-train", "meta-val", "meta-test"),
        ("train images", "valid", "testing"),
    ],
)
def test_split_folders_in_every_usual_spelling(tmp_path, names):
    train, validation, test = names
    root = tree(tmp_path / "set", f"{train}/a", f"{train}/b", f"{validation}/c", f"{test}/d")
    assert classes(root) == [("a", "b"), ("c",), ("d",)]


@pytest.mark.parametrize(
    ("folders", "message"),
    [
        (
            ("train/a", "val/b", "test/c", "extras/d"),
            "beside the split folders 'test', 'train', 'val' there is 'extras'",
        ),
        (("Train/a", "misc/b"), "beside the split folders 'Train' there is 'misc', which is no split; move it away"),
        (("train/a", "train/b", "val/c", "test"), "the split folder 'test' holds images that are in no class folder"),
        (("train", "test"), "the split folder 'test' holds images that are in no class folder"),
        (("train/a", "Train2/b", "test/c"), "'Train2' and 'train' are both folders of the train split; keep one"),
        (("data/train/a", "data/val/b", "data/test/c"), "the splits 'data/test' and 'data/train' are not at the top"),
        (("a/train", "a/test", "b/train", "b/test"), "the splits 'a/test' and 'a/train' are not at the top"),
        (("train/a", "test/x/train", "test/x/val"), "the splits 'test/x/train' and 'test/x/val' are not at the top"),
    ],
)
def test_a_layout_that_would_train_on_test_classes_is_refused(tmp_path, folders, message):
    with pytest.raises(DataError, match=message):
        classes(tree(tmp_path / "set", *folders))


def test_a_split_list_says_what_a_layout_leaves_open(tmp_path):
    root = tree(tmp_path / "set", "train/a", "test/b", "extras/c")
    (tmp_path / "list.json").write_text('{"train": ["train/a", "extras/c"], "test": ["test/b"]}')
    assert classes(root, split_list=str(tmp_path / "list.json")) == [("train/a", "extras/c"), (), ("test/b",)]


def test_a_class_may_be_called_train(tmp_path):
    """CIFAR-100 has trains."""
    found = classes(tree(tmp_path / "set", "train", "bus", "tram", "vehicles/test"), fractions=(1.0, 0.0, 0.0))
    assert found[0] == ("bus", "train", "tram", "vehicles/test")


def test_names_of_splits():
    assert [split_of(n) for n in ("Train", "valid_split", "TEST-IMAGES", "３train")] == [*SPLITS[:2], "test", "train"]
    assert [split_of(n) for n in ("trainer", "constrain", "contest", "latest", "value", "images_background")] == [
        None
    ] * 6
    tables = (
        "train-00000-of-00002.parquet",
        "data/test-0.parquet",
        "default/Validation/0000.parquet",
        "part-0.parquet",
    )
    assert [split_of_table(n) for n in tables] == ["train", "test", "validation", None]


@pytest.mark.parametrize("here", ["train/", ""])
def test_two_unicode_forms_of_a_name_are_one_class(tmp_path, here):
    nfc, nfd = unicodedata.normalize("NFC", "é"), unicodedata.normalize("NFD", "é")
    with pytest.raises(DataError, match="class 'é' is in test and in train|are one name, 'é', in two Unicode forms"):
        classes(tree(tmp_path / "both", *((f"train/{nfc}", f"test/{nfd}") if here else (nfc, nfd, "b"))))
    names = [f"{letter}́" for letter in "aeioucn"]  # as macOS writes them, or as Linux does
    mac = tree(tmp_path / "mac", *(here + n for n in names))
    linux = tree(tmp_path / "linux", *(here + unicodedata.normalize("NFC", n) for n in names))
    assert classes(mac) == classes(linux), "the split depends on the names alone"
    (tmp_path / "list.json").write_text(f'{{"train": ["{names[0]}"]}}')
    assert classes(linux, split_list=str(tmp_path / "list.json"))[0] == ("á",)


def test_classes_that_differ_in_case_alone_are_named(tmp_path):
    root = tree(tmp_path / "set", "train/Dog", "train/b", "test/dog")
    assert "2 classes of two splits differ in upper and lower case alone (Dog, dog)" in notes(root)


@pytest.mark.parametrize("bad", [b"caf\xe9", b"a\x1b[31mb", b"a\nb"])
def test_names_that_no_terminal_can_show_are_refused(tmp_path, bad):
    root = tree(tmp_path / "set", "a", "b")
    os.rename(os.fsencode(root / "b"), os.fsencode(root) + b"/" + bad)
    with pytest.raises(DataError, match="has bytes that are not UTF-8, or control characters; rename") as error:
        classes(root)
    assert str(error.value) == shown(str(error.value)) and str(error.value).encode()


# What is passed over --------------------------------------------------------------------------------------------------


def test_hidden_files_and_folders_are_no_classes(tmp_path):
    root = tree(tmp_path / "set", "a", "b", "a/.ipynb_checkpoints", ".git/x", "__MACOSX/a", "b/@eaDir/1.png")
    (root / "a" / ".DS_Store").touch()
    (root / "a" / "notes.txt").touch()
    assert sorted(sum(classes(root), ())) == ["a", "b"]
    assert notes(root) == (
        "passed over 1 file of other kinds (.txt 1), "
        "5 hidden files and folders (.DS_Store 1, .git 1, .ipynb_checkpoints 1, @eaDir 1, __MACOSX 1)"
    )


def test_the_same_by_url(tmp_path):
    root = tree(tmp_path / "set", "Train/a", "Train/b", "Test/c", "Train/a/.ipynb_checkpoints")
    memory = fsspec.filesystem("memory")
    memory.put(str(root), "/strangers", recursive=True)
    for url in ("memory://strangers", f"file://{root}"):
        family = ImageFolder(path=url, image_size=6)
        assert [family.class_names(s) for s in SPLITS] == [("a", "b"), (), ("c",)]
        assert "hidden files and folders (.ipynb_checkpoints" in "; ".join(family.data_notes())
    memory.put(str(root / "Train" / "a"), "/strangers/extras/d", recursive=True)
    with pytest.raises(DataError, match="there is 'extras', which is no split"):
        ImageFolder(path="memory://strangers", image_size=6).prepare(CPU)


@pytest.mark.parametrize("suffix", ["jfif", "jpe", "jp2", "avif", "tga", "qoi", "pbm"])
def test_more_kinds_of_pictures(tmp_path, suffix):
    root = tree(tmp_path / "set", "a", "b", "c")
    shutil.rmtree(root / "c")
    (root / "c").mkdir()
    kind = {"jfif": "jpeg", "jpe": "jpeg", "jp2": "jpeg2000", "pbm": "ppm"}.get(suffix, suffix)
    colour = Image.fromarray(np.full((16, 16, 3), 200, np.uint8))
    (colour.convert("1") if suffix == "pbm" else colour).save(root / "c" / f"1.{suffix.upper()}", kind)
    assert sorted(sum(classes(root), ())) == ["a", "b", "c"]


@pytest.mark.parametrize("name", ["1.heic", "1.nef", "1.npy", "1"])
def test_a_class_of_unknown_pictures_is_refused(tmp_path, name):
    root = tree(tmp_path / "set", "a", "b", "c")
    (root / "a" / name).touch()
    assert f"1 file of other kinds ({Path(name).suffix or 'without a suffix'} 1)" in notes(root)
    (root / "d" / "deep").mkdir(parents=True)
    (root / "d" / "deep" / name).touch()
    with pytest.raises(DataError, match="d/deep has no picture of a known kind, but 1 other files"):
        classes(root)


def test_folders_of_texts_are_no_classes(tmp_path):
    root = tree(tmp_path / "set", "a", "b")
    (root / "annotations").mkdir()
    (root / "annotations" / "a.xml").touch()
    (root / "nothing").mkdir()
    assert notes(root) == "passed over 1 file of other kinds (.xml 1), 1 empty folder (nothing)"


def test_a_folder_without_permission_is_refused(tmp_path):
    root = tree(tmp_path / "set", "a", "b")
    (root / "b").chmod(0)
    try:
        if os.access(root / "b", os.R_OK):
            pytest.skip("this user reads everything")
        with pytest.raises(DataError, match="b cannot be read"):
            classes(root)
    finally:
        (root / "b").chmod(0o700)


def test_a_link_to_a_folder_above_is_not_followed(tmp_path):
    root = tree(tmp_path / "set", "a", "b", "c")
    before = ImageFolder(path=str(root), image_size=6).data_sha256
    os.symlink("..", root / "a" / "up")
    os.symlink(root, root / "b" / "root")
    family = ImageFolder(path=str(root), image_size=6)
    assert family.data_sha256 == before
    assert list(family.data_notes()) == ["passed over 2 links to a folder above itself (a/up, b/root)"]


def test_a_folder_that_is_there_twice_is_refused(tmp_path):
    root = tree(tmp_path / "set", "train/a", "test/b")
    os.symlink("train", root / "val")
    with pytest.raises(DataError, match="'train' and 'val' are one folder, by a link; .* remove the link"):
        classes(root)


def test_images_of_two_splits_are_counted(tmp_path):
    root = tree(tmp_path / "set", "train/a", "test/b")
    shutil.copy(root / "train" / "a" / "0.png", root / "test" / "b" / "9.png")
    assert notes(root) == "1 images are in the train split and in the test split, pixel by pixel"


def test_classes_within_classes_are_named(tmp_path):
    assert notes(tree(tmp_path / "set", "a", "a/old", "b")) == "1 classes in the folder of another class (a/old)"


def test_predict_reads_folders_alike(tmp_path):
    root = tree(tmp_path / "set", "a", "b", "a/.ipynb_checkpoints")
    x, names, labels = by_class(Decode(6, 1, False), str(root))
    assert names == ["a/0.png", "a/1.png", "b/0.png", "b/1.png"] and labels == ["a", "a", "b", "b"]
    assert x.dtype == np.float32 and x.shape == (4, 1, 6, 6)


# Pixels ---------------------------------------------------------------------------------------------------------------

RAMP = np.arange(36).reshape(6, 6)


def decoded(tmp_path: Path, image: Image.Image, suffix: str = ".tif", **settings: object) -> np.ndarray:
    path = tmp_path / f"picture{suffix}"
    image.save(path)
    return Decode(6, 1, False, **settings)(path.name, path.read_bytes)[0]


@pytest.mark.parametrize("suffix", [".tif", ".png"])
def test_twelve_bits_in_sixteen(tmp_path, suffix):
    image = Image.fromarray((RAMP * 117).astype(np.uint16))
    with pytest.raises(
        DataError, match="a 16-bit image whose largest value is 4095: black as 16 bits; set tasks.white"
    ):
        decoded(tmp_path, image, suffix)
    assert np.array_equal(decoded(tmp_path, image, suffix, white=4095), RAMP * 117 // 16)
    assert decoded(tmp_path, image, suffix, white=65535).max() == 15, "sixteen bits, and dark"
    full = Image.fromarray((RAMP * 1800).astype(np.uint16))
    assert np.array_equal(decoded(tmp_path, full, suffix), RAMP * 1800 >> 8)
    assert np.array_equal(decoded(tmp_path, full, suffix, white=65535), RAMP * 1800 >> 8)


def test_floating_point_numbers(tmp_path):
    image = Image.fromarray((RAMP / 35).astype(np.float32))
    with pytest.raises(DataError, match=r"picture.tif: floating-point values in 0 … 1; set tasks.white"):
        decoded(tmp_path, image)
    assert np.array_equal(decoded(tmp_path, image, white=1.0), np.rint(RAMP / 35 * 255))
    assert np.array_equal(decoded(tmp_path, Image.fromarray((RAMP * 7).astype(np.float32))), RAMP * 7), "as before"
    for values in (RAMP - 3, RAMP * 100):
        with pytest.raises(DataError, match="floating-point values in"):
            decoded(tmp_path, Image.fromarray(values.astype(np.float32)))
    with pytest.raises(DataError, match="NaN or Inf"):
        decoded(tmp_path, Image.fromarray(np.where(RAMP == 3, np.nan, RAMP).astype(np.float32)))


def test_values_beyond_sixteen_bits_do_not_wrap(tmp_path):
    image = Image.fromarray((RAMP * 10_000).astype(np.int32))
    with pytest.raises(DataError, match="its values are 0 to 350000, not 0 to 65535; set tasks.white"):
        decoded(tmp_path, image)
    found = decoded(tmp_path, image, white=350_000)
    assert np.array_equal(found, RAMP * 10_000 * 256 // 350_001) and found.max() == 255


def test_twelve_bit_colours_are_refused(tmp_path):
    def chunk(kind, data):
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    def png(rgb):
        rows = zlib.compress(b"".join(b"\0" + row.astype(">u2").tobytes() for row in rgb))
        head = chunk(b"IHDR", struct.pack(">IIBBBBB", 6, 6, 16, 2, 0, 0, 0))
        return b"\x89PNG\r\n\x1a\n" + head + chunk(b"IDAT", rows) + chunk(b"IEND", b"")

    rgb = np.repeat(RAMP[:, :, None] * 117, 3, axis=2)
    with pytest.raises(DataError, match="16-bit colours that are black as 16 bits"):
        Decode(6, 3, False)("x.png", lambda: png(rgb))
    assert np.array_equal(Decode(6, 3, False)("x.png", lambda: png(rgb * 16))[0], RAMP * 117 * 16 >> 8)


def test_formats_that_start_programs_are_not_read(tmp_path):
    path = tmp_path / "x.png"
    path.write_text("%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 6 6\n%%EndComments\nshowpage\n")
    with pytest.raises(DataError, match="x.png is not a readable image"):
        Decode(6, 1, False)(path.name, path.read_bytes)
