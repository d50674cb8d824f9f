"""Two classes whose images are split, classes with few images, and folders of tables."""

from __future__ import annotations

import io
import json
import urllib.parse

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
from metadist.testing import check_tasks

SPLITS = ("train", "validation", "test")
CPU = torch.device("cpu")


def png(value: int) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(np.full((6, 6), value, np.uint8)).save(buffer, "png")
    return buffer.getvalue()


def fill(root, counts, base=0):
    """Write pictures whose values tell them apart: class c has the values base + 50 c, base + 50 c + 1, …"""
    for c, (name, count) in enumerate(counts.items()):
        (root / name).mkdir(parents=True)
        for i in range(count):
            (root / name / f"{i:02}.png").write_bytes(png(base + 50 * c + i))
    return root


def seen(family, split, tasks=60):
    """Return the values of all pictures in the tasks of a split."""
    task = family.sample(TaskKey.of(0, split, 0, range(tasks)), split)
    x = torch.cat([task.support.x, task.query.x], 1)
    return set((x[..., 0, 0, 0] * 255).round().int().flatten().tolist())


# Images are split -----------------------------------------------------------------------------------------------------


def test_two_classes_whose_images_are_split(tmp_path):
    root = fill(tmp_path / "set", {"cat": 25, "dog": 40})
    with pytest.raises(ConfigError, match="tasks.n_way = 2: the train split has 1 classes"):
        ImageFolder(path=str(root), image_size=6, n_way=2)._checked("train")
    family = ImageFolder(path=str(root), image_size=6, n_way=2, query_shots=2, split_by="images")
    assert all(family.class_names(s) == ("cat", "dog") for s in SPLITS)
    splits = family.splits()
    assert {s: len(names) for s, names in splits.items()} == {"train": 42, "validation": 10, "test": 13}
    values = {s: seen(family, s) for s in SPLITS}
    for split in SPLITS:
        expected = {50 * (name[:3] == "dog") + int(name[4:6]) for name in splits[split]}
        assert values[split] == expected, "the images that splits() states are those of the tasks"
    assert not values["train"] & values["test"] and not values["train"] & values["validation"]
    check_tasks(family, another_process=False)
    assert family.protocol("test")["split_by"] == "images"


def test_the_split_of_images_depends_on_their_names_alone(tmp_path):
    here = ImageFolder(path=str(fill(tmp_path / "a", {"x": 20, "y": 20})), split_by="images")
    there = ImageFolder(path=str(fill(tmp_path / "b", {"y": 20, "x": 20}, base=7)), split_by="images")
    assert {s: sorted(n) for s, n in here.splits().items()} == {s: sorted(n) for s, n in there.splits().items()}
    other = ImageFolder(path=here.path, split_by="images", split_seed=1)
    assert here.splits() != other.splits() and here.data_sha256 != other.data_sha256


def test_split_folders_with_the_same_classes(tmp_path):
    root = tmp_path / "set"
    for i, split in enumerate(("Train", "Val", "Test")):
        fill(root / split, {"cat": 4, "dog": 4}, base=5 * i)
    with pytest.raises(DataError, match="class 'cat' is in .*; tasks.split_by: images makes tasks of the same classes"):
        ImageFolder(path=str(root), image_size=6).prepare(CPU)
    family = ImageFolder(path=str(root), image_size=6, n_way=2, split_by="images")
    assert family.splits()["test"] == [f"Test/{c}/0{i}.png" for c in ("cat", "dog") for i in range(4)]
    assert seen(family, "test") == {10, 11, 12, 13, 60, 61, 62, 63}


def test_a_class_that_is_too_small_for_a_split_is_refused(tmp_path):
    root = fill(tmp_path / "set", {"cat": 25, "dog": 25, "fox": 3})
    settings = {"path": str(root), "image_size": 6, "n_way": 2, "split_by": "images"}
    with pytest.raises(DataError, match="class 'fox' has 3 images, none of them in the validation split"):
        ImageFolder(**settings).prepare(CPU)
    assert ImageFolder(**settings, min_images=10).class_names("train") == ("cat", "dog")
    with pytest.raises(ConfigError, match="tasks.split_list = x.json: .* remove one of the two"):
        ImageFolder(**settings, split_list="x.json")


def test_classes_with_few_images_are_left_out_and_named(tmp_path):
    root = fill(tmp_path / "set", {"a": 6, "b": 2, "c": 6, "d": 6, "e": 1})
    settings = {"path": str(root), "image_size": 6, "fractions": (1.0, 0.0, 0.0)}
    with pytest.raises(ConfigError, match="class 'e' of the train split has 1 images; .* tasks.min_images"):
        ImageFolder(**settings)._checked("train")
    family = ImageFolder(**settings, min_images=3, n_way=3)
    assert family.class_names("train") == ("a", "c", "d") and seen(family, "train") <= set(range(200))
    assert "2 classes with fewer than 3 images (b, e)" in family.data_notes()
    (tmp_path / "list.json").write_text(json.dumps({"train": ["a", "b"], "test": ["c", "d"]}))
    listed = ImageFolder(**settings, min_images=3, split_list=str(tmp_path / "list.json"))
    assert listed.class_names("train") == ("a",)


# Folders of tables ----------------------------------------------------------------------------------------------------


def shard(rows, label=True):
    columns = {"image": pa.array([png(value) for _, value in rows])}
    return pa.table({**columns, "label": [name for name, _ in rows]} if label else columns)


ROWS = [(name, 50 * c + i) for c, name in enumerate("abcd") for i in range(5)]


def test_a_folder_of_shards_is_one_table(tmp_path):
    pq.write_table(shard(ROWS), tmp_path / "whole.parquet")
    root = tmp_path / "set.parquet"  # as Spark names its folders
    (root / "deep").mkdir(parents=True)
    for i, name in enumerate(("part-0.parquet", "part-1.snappy.parquet", "deep/part-2.arrow")):
        rows = ROWS[7 * i : 7 * i + 7]
        if name.endswith(".arrow"):
            with pa.ipc.new_file(root / name, shard(rows).schema) as sink:
                sink.write_table(shard(rows))
        else:
            pq.write_table(shard(rows), root / name)
    (root / "_SUCCESS").touch()
    (root / ".part-0.parquet.crc").touch()
    whole = ImageFolder(path=str(tmp_path / "whole.parquet"), image_size=6)
    family = ImageFolder(path=str(root), image_size=6)
    assert family.splits() == whole.splits()
    counts = lambda f: dict(zip(f.source().names, f.source().counts))  # noqa: E731
    assert counts(family) == counts(whole) == dict.fromkeys("abcd", 5)
    assert "; ".join(family.data_notes()) == (
        "passed over 1 file of other kinds (without a suffix 1), 1 hidden files and folders (.part-0.parquet.crc 1)"
    )
    fsspec.filesystem("memory").put(str(root), "/shards", recursive=True)
    assert ImageFolder(path="memory://shards", image_size=6).data_sha256 == family.data_sha256
    pq.write_table(shard(ROWS[:3]), root / "part-9.parquet")
    assert ImageFolder(path=str(root), image_size=6).data_sha256 != family.data_sha256, "a changed folder is read anew"


@pytest.mark.parametrize("form", ["train-0000{}-of-00002.parquet", "{}/x.parquet", "default/{}/0000.parquet"])
def test_tables_named_after_splits(tmp_path, form):
    names = ("train", "validation", "test")
    files = [form.format(i) if "0000{}" in form else form.format(n) for i, n in enumerate(names)]
    files = [f.replace("train-", f"{n}-") for f, n in zip(files, names)]
    for name, classes in zip(files, ("ab", "c", "d")):
        (tmp_path / "set" / name).parent.mkdir(parents=True, exist_ok=True)
        pq.write_table(shard([row for row in ROWS if row[0] in classes]), tmp_path / "set" / name)
    family = ImageFolder(path=str(tmp_path / "set"), image_size=6)
    assert [family.class_names(s) for s in SPLITS] == [("a", "b"), ("c",), ("d",)]
    pq.write_table(shard(ROWS[:5]), tmp_path / "set" / files[2])
    with pytest.raises(DataError, match="class 'a' is in test and in train; .* tasks.split_by: images"):
        ImageFolder(path=str(tmp_path / "set"), image_size=6).prepare(CPU)
    images = ImageFolder(path=str(tmp_path / "set"), image_size=6, split_by="images")
    assert images.splits()["test"] == [f"{files[2]} row {i}" for i in range(5)]
    pq.write_table(shard(ROWS[5:9]), tmp_path / "set" / "more.parquet")
    with pytest.raises(DataError, match="is named after a split, 'more.parquet' is not"):
        ImageFolder(path=str(tmp_path / "set"), image_size=6).prepare(CPU)


def test_labels_in_the_names_of_folders(tmp_path):
    """As Hive writes them."""
    for name in ("a b", "ü", "c"):
        folder = tmp_path / "set" / f"label={urllib.parse.quote(name)}"
        folder.mkdir(parents=True)
        pq.write_table(shard(ROWS[:4], label=False), folder / "0.parquet")
    family = ImageFolder(path=str(tmp_path / "set"), image_size=6)
    assert sorted(sum((tuple(family.class_names(s)) for s in SPLITS), ())) == ["a b", "c", "ü"]


@pytest.mark.parametrize(
    ("labels", "message"),
    [
        (pa.array([0.0, float("nan"), 1.0]), "row 1: no label"),
        (pa.array(["a", "b", ""]), "row 2: no label"),
        (pa.array([0, 1, -1]), "row 2: label -1 is none of the 2 classes in the file's features"),
    ],
)
def test_rows_without_a_label_are_refused(tmp_path, labels, message):
    data = pa.table({"image": pa.array([png(i) for i in range(3)]), "label": labels})
    if pa.types.is_integer(labels.type):
        features = {"info": {"features": {"label": {"names": ["a", "b"], "_type": "ClassLabel"}}}}
        data = data.replace_schema_metadata({b"huggingface": json.dumps(features).encode()})
    (tmp_path / "set").mkdir()
    pq.write_table(data, tmp_path / "set" / "x.parquet")
    for path in (tmp_path / "set", tmp_path / "set" / "x.parquet"):
        with pytest.raises(DataError, match=message):
            ImageFolder(path=str(path), image_size=6).prepare(CPU)
