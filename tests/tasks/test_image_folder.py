import io
import json
import os
import pickle
import shutil

import fsspec
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image

from metadist.core.errors import ConfigError, DataError
from metadist.core.random import TaskKey
from metadist.tasks.image_folder import ImageFolder

CPU = torch.device("cpu")
NAMES = ("ant", "bee", "cat", "dog", "eel", "fox", "gnu", "hen", "ibis", "jay")
SPLITS = ("train", "validation", "test")


def encoded(pixels, kind="png"):
    buffer = io.BytesIO()
    Image.fromarray(np.asarray(pixels, np.uint8)).save(buffer, kind)
    return buffer.getvalue()


def picture(c, i, size=12):
    return np.full((size, size, 3), 10 * c + i)


def fill(folder, names=NAMES, images=3):
    for c, name in enumerate(names):
        (folder / name).mkdir(parents=True)
        for i in range(images):
            (folder / name / f"{i}.png").write_bytes(encoded(picture(c, i)))
    return str(folder)


def pixels(family):
    """Return the whole set, u8 [N, channels, size, size]."""
    return family._ready().pixels.numpy()


def test_a_folder_of_folders(tmp_path):
    family = ImageFolder(path=fill(tmp_path / "animals"), n_way=2, k_shot=1, query_shots=2, image_size=8)
    assert family.input_shape == (1, 8, 8)
    splits = [set(family.class_names(s)) for s in SPLITS]
    assert [len(s) for s in splits] == [6, 2, 2] and set.union(*splits) == set(NAMES)
    assert pixels(family)[:, 0, 0, 0].tolist() == [10 * c + i for c in range(10) for i in range(3)]
    task = family.sample(TaskKey.of(0, "test", 0, range(5)), "test")
    assert task.support.x.shape == (5, 2, 1, 8, 8)
    values = (task.support.x[:, :, 0, 0, 0] * 255).round().long() // 10
    assert {NAMES[c] for c in values.flatten().tolist()} <= splits[2]
    copy = pickle.loads(pickle.dumps(family))
    assert torch.equal(copy.sample(TaskKey.of(0, "test", 0, range(5)), "test").query.x, task.query.x)


def test_the_split_depends_on_the_names_alone(tmp_path):
    here = ImageFolder(path=fill(tmp_path / "here"))
    there = ImageFolder(path=fill(tmp_path / "elsewhere" / "moved", NAMES[::-1], images=2))
    assert all(here.class_names(s) == there.class_names(s) for s in SPLITS)
    other = ImageFolder(path=here.path, split_seed=1)
    assert any(here.class_names(s) != other.class_names(s) for s in SPLITS)
    halves = ImageFolder(path=here.path, fractions=(0.5, 0.0, 0.5))
    assert [len(halves.class_names(s)) for s in SPLITS] == [5, 0, 5]


def test_top_folders_and_lists_are_splits(tmp_path):
    root = tmp_path / "animals"
    for split, names in (("train", NAMES[:5]), ("val", NAMES[5:7]), ("test", NAMES[7:])):
        fill(root / split, names)
    family = ImageFolder(path=str(root))
    assert [family.class_names(s) for s in SPLITS] == [NAMES[:5], NAMES[5:7], NAMES[7:]]
    chosen = tmp_path / "split.json"
    chosen.write_text(json.dumps({"train": ["jay", "ant"], "test": ["bee"]}))
    assert ImageFolder(path=str(root), split_list=str(chosen)).class_names("train") == ("jay", "ant")
    shutil.copytree(root / "train" / "ant", root / "test" / "ant")
    with pytest.raises(DataError, match="class 'ant' is in test and in train; splits must hold different classes"):
        ImageFolder(path=str(root)).prepare(CPU)


def test_folders_in_folders_and_links(tmp_path):
    fill(tmp_path / "real")
    (tmp_path / "root" / "Greek").mkdir(parents=True)
    for name in NAMES[:4]:
        os.symlink(tmp_path / "real" / name, tmp_path / "root" / "Greek" / name)
    family = ImageFolder(path=str(tmp_path / "root"), fractions=(1.0, 0.0, 0.0))
    assert family.class_names("train") == tuple(f"Greek/{n}" for n in NAMES[:4])


def test_pictures_of_every_kind(tmp_path):
    folder = tmp_path / "set" / "one"
    folder.mkdir(parents=True)
    grey = np.arange(144, dtype=np.uint8).reshape(12, 12)
    clear = np.zeros((12, 12, 4), np.uint8)
    clear[3:6, 3:6, 3] = 255
    exif = Image.Exif()
    exif[0x0112] = 3  # upside down
    for name, image in (
        ("a.png", Image.fromarray(grey)),
        ("b.png", Image.fromarray(grey.astype(np.uint16) * 257)),
        ("c.png", Image.fromarray(clear)),
        ("d.png", Image.fromarray(np.tile(grey, (1, 3)))),
        ("e.PNG", Image.fromarray(np.stack([grey, grey // 2, grey // 3], -1))),
    ):
        image.save(folder / name)
    Image.fromarray(grey[::-1, ::-1].copy()).save(folder / "f.webp", exif=exif, lossless=True)
    (folder / "notes.txt").touch()
    (folder / "._a.png").touch()
    settings = {"path": str(folder.parent), "image_size": 12, "fractions": (1.0, 0.0, 0.0)}
    family = ImageFolder(**settings)
    images = pixels(family)
    assert images.shape == (6, 1, 12, 12)
    assert np.array_equal(images[0, 0], grey) and np.array_equal(images[1, 0], grey), "16 bits are cut to 8"
    assert images[2, 0, 4, 4] == 0 and images[2, 0, 0, 0] == 255, "transparent is white"
    assert np.array_equal(images[3, 0], grey), "a wide picture is cropped about its centre"
    assert np.abs(images[5, 0].astype(int) - grey).max() <= 1, "turned as its EXIF says"
    colour = pixels(ImageFolder(**settings, channels=3))
    assert colour.shape == (6, 3, 12, 12) and np.array_equal(colour[4], [grey, grey // 2, grey // 3])
    assert np.array_equal(pixels(ImageFolder(**settings, invert=True)), 255 - images)


def table(form):
    labels = [c for c in range(10) for _ in range(3)]
    pictures = [picture(c, i, 8) for c in range(10) for i in range(3)]
    schema = None
    if form == "struct":
        image = pa.array([{"bytes": encoded(p), "path": None} for p in pictures])
        features = {"info": {"features": {"label": {"names": list(NAMES), "_type": "ClassLabel"}}}}
        schema = {b"huggingface": json.dumps(features).encode()}
    elif form == "bytes":
        image = pa.array([encoded(p) for p in pictures])
    elif form == "flat":
        image = pa.FixedSizeListArray.from_arrays(
            pa.array(np.concatenate([p[:, :, 0].ravel() for p in pictures]), pa.uint8()), 64
        )
    else:
        image = pa.array([p.tolist() for p in pictures], pa.list_(pa.list_(pa.list_(pa.int64()))))
    if form != "struct":
        labels = [NAMES[c] for c in labels]
    order = np.random.default_rng(0).permutation(30)
    return pa.table({"image": image, "label": pa.array(labels)}).replace_schema_metadata(schema).take(order), order


@pytest.mark.parametrize("form", ["struct", "bytes", "flat", "nested"])
def test_parquet(tmp_path, form):
    data, order = table(form)
    pq.write_table(data, tmp_path / "set.parquet", row_group_size=7)
    family = ImageFolder(path=str(tmp_path / "set.parquet"), image_size=8, channels=3)
    assert sorted(sum((family.class_names(s) for s in SPLITS), ())) == sorted(NAMES)
    expected = [10 * c + i for c in range(10) for i in [r % 3 for r in order if r // 3 == c]]
    assert pixels(family)[:, 2, 3, 3].tolist() == expected, "grouped by class, in the order of the rows"


@pytest.mark.parametrize("writer", ["new_file", "new_stream"])
def test_arrow(tmp_path, writer):
    data, _ = table("bytes")
    with getattr(pa.ipc, writer)(tmp_path / "set.arrow", data.schema) as sink:
        sink.write_table(data)
    assert pixels(ImageFolder(path=str(tmp_path / "set.arrow"))).shape == (30, 1, 28, 28)


def test_any_fsspec_url(tmp_path):
    memory = fsspec.filesystem("memory")
    for c, name in enumerate(NAMES):
        for i in range(3):
            memory.pipe(f"/animals/{name}/{i}.png", encoded(picture(c, i)))
    pq.write_table(table("bytes")[0], tmp_path / "t.parquet")
    memory.pipe("/tables/t.parquet", (tmp_path / "t.parquet").read_bytes())
    local = ImageFolder(path=fill(tmp_path / "animals"))
    assert ImageFolder(path="memory://animals").data_sha256 == local.data_sha256
    assert pixels(ImageFolder(path="memory://tables/t.parquet")).shape == (30, 1, 28, 28)
    with pytest.raises(DataError, match="nothing at that address"):
        ImageFolder(path="memory://nowhere").prepare(CPU)


def test_relative_paths_are_found_below_the_data_folder(tmp_path, monkeypatch):
    fill(tmp_path / "data" / "animals")
    monkeypatch.setenv("METADIST_DATA", str(tmp_path / "data"))
    assert len(ImageFolder(path="animals").class_names("train")) == 6
    with pytest.raises(DataError, match=f"animls: no such folder or file; looked for .* and {tmp_path}/data/animls"):
        ImageFolder(path="animls").prepare(CPU)


def test_a_changed_folder_is_read_anew(tmp_path):
    family = ImageFolder(path=fill(tmp_path / "animals"))
    before = family.data_sha256
    (tmp_path / "animals" / "ant" / "0.png").write_bytes(encoded(picture(9, 9)))
    assert pickle.loads(pickle.dumps(family)).data_sha256 != before


def broken(tmp_path, what):
    root = tmp_path / "set"
    fill(root)
    if what == "corrupt":
        (root / "cat" / "1.png").write_bytes((root / "cat" / "1.png").read_bytes()[:50])
    elif what == "stray":
        (root / "stray.png").write_bytes(encoded(picture(0, 0)))
    elif what == "empty":
        shutil.rmtree(root)
        root.mkdir()
    elif what == "dangling":
        os.symlink("/nowhere.png", root / "cat" / "9.png")
    else:
        data, _ = table("nested" if what == "size" else "bytes")
        if what == "column":
            data = data.rename_columns(["picture", "label"])
        elif what == "row":
            rows = data["image"].to_pylist()
            rows[4] = b"junk"
            data = data.set_column(0, "image", pa.array(rows))
        elif what == "null":
            data = data.set_column(1, "label", pa.array(["a"] * 29 + [None]))
        elif what == "text":
            data = data.set_column(0, "image", pa.array(["a"] * 30))
        path = tmp_path / "t.parquet"
        pq.write_table(data, path)
        if what == "cut":
            path.write_bytes(path.read_bytes()[:100])
        return str(path)
    return str(root)


@pytest.mark.parametrize(
    ("what", "message"),
    [
        ("corrupt", "set/cat/1.png is not a readable image .* replace or remove it"),
        ("stray", "'stray.png' is in no folder"),
        ("empty", "has no images in folders; expected .*CLASS"),
        ("dangling", "cat/9.png cannot be read"),
        ("column", r"no column 'image' \(tasks.image_column\), only \['picture', 'label'\]"),
        ("row", "t.parquet, row 4 is not a readable image"),
        ("null", "row 29: no label"),
        ("text", "row 0: an image is bytes"),
        ("size", "row 0: 192 values are not a 28 × 28 image; set tasks.image_size"),
        ("cut", "cannot read .*t.parquet"),
    ],
)
def test_bad_data_are_named(tmp_path, what, message):
    with pytest.raises(DataError, match=message):
        ImageFolder(path=broken(tmp_path, what)).prepare(CPU)


def test_impossible_settings_are_named():
    for settings, message in (
        ({"fractions": (0.5, 0.5, 0.5)}, "tasks.fractions = .* with the sum 1"),
        ({"channels": 2}, "tasks.channels = 2"),
        ({"image_size": 0}, "tasks.image_size = 0"),
    ):
        with pytest.raises(ConfigError, match=message):
            ImageFolder(path="x", **settings)
