"""Small images by class: the pixels are means over areas, splits are over classes, and tasks are keyed draws."""

from pathlib import Path

import numpy as np
import pytest
import torch

from metadist.core.errors import ConfigError
from metadist.core.random import SPLITS, TaskKey
from metadist.tasks.small_images import SmallImages


@pytest.fixture
def drawings(tmp_path, monkeypatch):
    """An Omniglot of 30 characters, 10 of each split: image i of class c has the grey value 8 c + i, above it half."""
    values = (8 * np.arange(30)[:, None] + np.arange(20)).astype(np.uint8)
    images = values[:, :, None, None] * np.ones((28, 28), np.uint8)
    images[:, :, :14] //= 2
    names = np.array([f"{a}/character{i:02}" for a in ("Greek", "Hebrew", "Tibetan") for i in range(1, 11)])
    (tmp_path / "omniglot").mkdir()
    np.savez(
        tmp_path / "omniglot" / "omniglot28.npz",
        images=images,
        class_names=names,
        class_is_background=np.arange(30) < 20,
    )
    monkeypatch.setenv("METADIST_DATA", str(tmp_path))
    monkeypatch.setenv("METADIST_CACHE", str(tmp_path / "cache"))
    return values


def sampled(family, split, *tasks):
    return family.sample(TaskKey.of(0, split, 0, list(tasks)), split)


def test_rows_are_images_of_the_classes_of_the_split(drawings):
    family = SmallImages(image_size=8, n_way=5, rows=40, query_rows=20)
    family.prepare(torch.device("cpu"))
    source = family._sets()["omniglot"]
    names = family.splits()
    assert not set(names["train"]) & set(names["test"]) and all(len(names[s]) == 10 for s in SPLITS)
    position = {"train": 0, "validation": 10, "test": 20}
    for split in SPLITS:
        task = sampled(family, split, 0, 1)
        assert task.support.x.shape == (2, 40, 1, 8, 8) and task.query.y.shape == (2, 20)
        for number in (0, 1):
            classes = family.task_classes(TaskKey.of(0, split, 0, [number]).each()[0], split)
            for part, wanted in ((task.support, range(16)), (task.query, range(16, 20))):
                pixels = (part.x[number] / source.scale + source.mean).round().long()
                assert torch.equal(part.y[number], torch.arange(len(pixels)) % 5)
                for row, label in zip(pixels, part.y[number].tolist()):
                    c = position[split] + int(classes[label][-2:]) - 1
                    grey = int(row[0, 7, 7])  # a mean over the lower right part
                    assert grey - 8 * c in wanted and int(row[0, 0, 0]) == grey // 2


def test_training_images_have_mean_zero_and_deviation_one(drawings):
    family = SmallImages(image_size=14, n_way=10, rows=4000)
    x = sampled(family, "train", 0).support.x
    assert abs(float(x.mean())) < 0.1 and abs(float(x.std()) - 1) < 0.1


def test_a_task_does_not_depend_on_its_shard(drawings):
    family = SmallImages(n_way=5, rows=40, query_rows=20)
    together, alone = sampled(family, "train", 3, 4), sampled(family, "train", 4)
    assert torch.equal(together.support.x[1], alone.support.x[0])
    assert not torch.equal(together.support.x[0], together.support.x[1])


@pytest.mark.parametrize(
    ("wrong", "named"),
    [
        ({"data": ()}, "tasks.data"),
        ({"data": ("omniglott",)}, "tasks.data"),
        ({"n_way": 1}, "tasks.n_way"),
        ({"rows": 0}, "tasks.rows"),
    ],
)
def test_wrong_settings(wrong, named):
    with pytest.raises(ConfigError, match=named):
        SmallImages(**wrong)


def test_a_split_with_too_few_classes_and_a_missing_set(drawings):
    with pytest.raises(ConfigError, match="tasks.n_way: 11, but the train split of omniglot has 10 classes"):
        SmallImages(n_way=11).prepare(torch.device("cpu"))
    with pytest.raises(Exception, match="has no cifar100/cifar100_test100.npz"):
        SmallImages(data=("cifar100",)).prepare(torch.device("cpu"))


@pytest.mark.long
@pytest.mark.data
def test_cifar_has_six_hundred_images_of_each_class(data):
    """And its pixels are means over areas, by hand to the rounding of grey values."""
    from metadist.tasks.class_images import class_images

    found = class_images("cifar100", 8)
    assert found.pixels.shape == (60_000, 1, 8, 8) and set(found.counts) == {600}
    assert [found.parts.count(s) for s in SPLITS] == [64, 16, 20]
    with np.load(Path(data) / "cifar100" / "cifar100_test100.npz", allow_pickle=False) as arrays:
        first, name = arrays["images"][0, 0].astype(float), str(arrays["class_names"][0])
    grey = (first @ [0.299, 0.587, 0.114]).reshape(8, 4, 8, 4).mean((1, 3))
    c = found.names.index(name)
    assert np.abs(found.pixels[sum(found.counts[:c]), 0] - grey).max() < 2
