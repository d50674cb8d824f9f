"""Test episodes over a set whose pixels encode the class and the number of each image."""

import hashlib
import pickle
from dataclasses import dataclass, replace

import numpy as np
import pytest
import torch

from metadist.core.errors import ConfigError, DataError
from metadist.core.random import TaskKey, choose
from metadist.tasks.episodes import Episodes, Rotations
from metadist.tasks.images import ImageSet, turned

COUNTS = (7, 9, 30, 7, 8, 12, 7, 7, 11, 20, 7, 7)
TRAIN, VALIDATION, TEST = [0, 2, 4, 5, 6, 8, 9], [1, 3], [7, 10, 11]
CPU = torch.device("cpu")
DEVICES = ["cpu", "cuda"] if torch.cuda.is_available() else ["cpu"]


@dataclass(frozen=True, kw_only=True)
class Toy(Episodes):
    rotations: Rotations = "none"
    leaky: bool = False

    input_shape = (1, 2, 2)

    def load(self):
        labels = [c for c, n in enumerate(COUNTS) for _ in range(n)]
        within = [i for n in COUNTS for i in range(n)]
        pixels = np.array([[c, i, 100, 200] for c, i in zip(labels, within)], np.uint8).reshape(-1, 1, 2, 2)
        return ImageSet.of(pixels, [f"class{c}" for c in range(len(COUNTS))], COUNTS, [""] * len(COUNTS))

    def split_classes(self, images):
        return {"train": TRAIN, "validation": VALIDATION, "test": TEST + ([4] if self.leaky else [])}

    def rotations_in(self, split):
        return self.rotations if split == "train" else "none"


def read(x):
    """Return class and number of images without rotation."""
    pixels = (x * 255).round().long().flatten(-3)
    return pixels[..., 0], pixels[..., 1]


def keys(tasks=range(8), split="train", seed=0, step=5):
    return TaskKey.of(seed, split, step, tasks)


def equal(a, b):
    return all(
        torch.equal(getattr(getattr(a, s), f), getattr(getattr(b, s), f))
        for s in ("support", "query")
        for f in ("x", "y")
    )


@pytest.mark.parametrize("rotations", ["none", "classes", "slot"])
def test_a_task_is_the_same_in_any_shard_on_any_worker(rotations):
    family = Toy(n_way=4, k_shot=2, query_shots=3, rotations=rotations)
    whole = family.sample(keys(range(50)), "train")
    elsewhere = pickle.loads(pickle.dumps(family))
    for tasks in (range(8, 16), [49], [30, 2, 31]):
        part = elsewhere.sample(keys(tasks), "train")
        for examples, of in ((part.support, whole.support), (part.query, whole.query)):
            assert torch.equal(examples.x, of.x[list(tasks)]) and torch.equal(examples.y, of.y[list(tasks)])
    single = family.sample_task(keys(range(50)).each()[30], "train")
    assert torch.equal(single.query.x, whole.query.x[30]) and torch.equal(single.support.y, whole.support.y[30])
    assert not equal(whole, family.sample(keys(range(50), seed=1), "train"))
    assert not equal(whole, family.sample(keys(range(50), step=6), "train"))


def test_rows_are_shot_major_and_support_and_query_are_disjoint():
    family = Toy(n_way=4, k_shot=2, query_shots=5)
    task = family.sample(keys(range(300)), "train")
    assert task.support.x.shape == (300, 8, 1, 2, 2) and task.query.x.shape == (300, 20, 1, 2, 2)
    assert (task.support.x.shape[1], task.query.x.shape[1]) == family.sizes("train")
    assert task.support.y.dtype == torch.int64 and task.support.x.dtype == torch.float32
    assert torch.equal(task.support.y, torch.arange(4).repeat(300, 2))
    classes, images = read(torch.cat([task.support.x, task.query.x], 1))
    classes, images = classes.view(300, 7, 4), images.view(300, 7, 4)
    assert (classes == classes[:, :1]).all(), "a label stands for one class"
    assert all(len(set(row.tolist())) == 4 for row in classes[:, 0]), "the classes of a task differ"
    assert set(classes.unique().tolist()) <= set(TRAIN)
    for task_images in images.transpose(1, 2).flatten(0, 1):
        assert len(set(task_images.tolist())) == 7, "an image is in a task once"
    for c in TRAIN:
        assert images[classes == c].max() < COUNTS[c]


def chi_square(counts, expected):
    return float(((counts - expected) ** 2 / expected).sum())


def test_classes_labels_and_images_are_uniform():
    n, tasks = 3, 6000
    classes, images = read(Toy(n_way=n, k_shot=1, query_shots=6).sample(keys(range(tasks)), "train").support.x)
    per_label = torch.stack([torch.bincount(classes[:, w], minlength=12)[TRAIN] for w in range(n)]).double()
    # 6 degrees of freedom a label: p = .001 at 22.5. A fixed class → label map would be thousands.
    for counts in per_label:
        assert chi_square(counts, tasks / len(TRAIN)) < 22.5
    for c, limit in ((0, 22.5), (9, 43.8)):  # p = .001 with 6 and 19 degrees of freedom
        drawn = images[classes == c]
        assert chi_square(torch.bincount(drawn, minlength=COUNTS[c]).double(), len(drawn) / COUNTS[c]) < limit
    pairs = torch.bincount(classes[:, 0] * 12 + classes[:, 1]).double()
    assert (pairs > 0).sum() == 42, "every ordered pair of classes occurs"


def test_unequal_populations_draw_as_equal_ones_do():
    stream = keys(range(16)).stream("images")
    whole = choose(stream.bits(4, 6), torch.tensor([6, 7, 40, 6]))
    assert all(
        whole[:, i].equal(choose(stream.bits(4, 6), population)[:, i]) for i, population in enumerate((6, 7, 40, 6))
    )
    assert (whole[:, 0].sort(-1).values == torch.arange(6)).all() and all(
        len(set(r.tolist())) == 6 for r in whole[:, 2]
    )


def test_turned_images_follow_those_that_are_not():
    pixels = np.arange(4 * 3 * 3 * 3).astype(np.uint8).reshape(4, 3, 3, 3)
    images = ImageSet.of(pixels, ["a", "b"], [3, 1], ["", ""])
    for again in range(2):  # the second time from the cache
        found = torch.from_numpy(turned(images).pixels)
        for turn in range(4):
            assert found[4 * turn :][:4].equal(torch.rot90(torch.from_numpy(pixels), turn, (-2, -1))), again


@pytest.mark.parametrize(
    ("rotations", "expected"),
    [
        ("none", "775b6161facc775d"),
        ("classes", "f45556de780c932c"),
        ("slot", "0243fc339d4d2c47"),
    ],
)
def test_tasks_are_the_same_as_ever(rotations, expected):
    """Tasks are public: these hashes must never change."""
    digest = hashlib.sha256()
    for shape in ({}, {"train_n_way": 6, "train_k_shot": 3, "train_query_shots": 4}):
        task = Toy(n_way=3, k_shot=2, query_shots=3, rotations=rotations, **shape).sample(
            keys(range(20), seed=7, step=11), "train"
        )
        for t in (task.support.x, task.support.y, task.query.x, task.query.y):
            digest.update(t.contiguous().numpy().tobytes())
    assert digest.hexdigest()[:16] == expected


@pytest.mark.parametrize(("rotations", "classes"), [("none", 7), ("classes", 28), ("slot", 7)])
def test_rotations(rotations, classes):
    family = Toy(n_way=3, k_shot=2, query_shots=3, rotations=rotations)
    assert family.protocol("train")["classes"] == classes and family.protocol("test")["rotations"] == "none"
    task = family.sample(keys(range(600)), "train")
    x = (torch.cat([task.support.x, task.query.x], 1).view(600, 5, 3, 4) * 255).round()
    corner = x.eq(200).long().argmax(-1)
    assert (corner == corner[:, :1]).all(), "support and query of a class are turned alike"
    turned = torch.bincount(corner[:, 0].flatten(), minlength=4)
    assert (turned > 350).all() if rotations != "none" else turned[3] == 1800
    character = x.gather(-1, (3 - corner).unsqueeze(-1)).squeeze(-1)[:, 0]  # the class is opposite the corner
    assert (character.sort(-1).values.diff(dim=-1) == 0).any() == (rotations == "classes"), "only turned classes meet"


def test_training_may_have_another_shape():
    family = Toy(n_way=3, k_shot=1, query_shots=2, train_n_way=6, train_k_shot=3, train_query_shots=4)
    assert family.sizes("train") == (18, 24) and family.sizes("test") == (3, 6) and family.outputs == 3
    assert family.sample(keys(), "train").support.x.shape[:2] == (8, 18)
    assert family.sample(keys(split="test"), "test").query.x.shape[:2] == (8, 6)
    assert family.protocol("train")["n_way"] == 6 and family.protocol("test")["n_way"] == 3


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("rotations", ["none", "classes", "slot"])
def test_the_images_are_gathered_on_the_device(device, rotations):
    family = Toy(n_way=4, k_shot=2, query_shots=3, rotations=rotations)
    expected = family.sample(keys(), "train")
    other = replace(family)
    other.prepare(torch.device(device))
    task = other.sample(keys(), "train")
    assert {t.device.type for t in (task.support.x, task.support.y, task.query.x, task.query.y)} == {device}
    assert equal(task.to(CPU, torch.float32), expected)


@pytest.mark.parametrize(
    ("settings", "split", "message"),
    [
        ({"n_way": 3}, "validation", r"tasks\.n_way = 3: the validation split has 2 classes; lower tasks.n_way"),
        ({"n_way": 2, "train_n_way": 8}, "train", r"tasks\.train_n_way = 8: the train split has 7 classes"),
        (
            {"k_shot": 3, "query_shots": 5},
            "train",
            r"tasks\.k_shot \+ tasks\.query_shots = 3 \+ 5: class 'class0' .* 7 images",
        ),
    ],
)
def test_impossible_episodes_are_named(settings, split, message):
    for call in ("sample", "protocol"):
        with pytest.raises(ConfigError, match=message):
            family = Toy(**settings)
            family.sample(keys(split=split), split) if call == "sample" else family.protocol(split)


def test_impossible_settings_are_named():
    with pytest.raises(ConfigError, match=r"tasks\.n_way = 1: must be at least 2"):
        Toy(n_way=1)
    with pytest.raises(ConfigError, match=r"tasks\.train_query_shots = 0"):
        Toy(train_query_shots=0)


def test_a_class_in_two_splits_is_refused():
    with pytest.raises(DataError, match="class 'class4' is in the train split and again in test"):
        Toy(leaky=True).prepare(CPU)


def test_a_family_travels_without_its_data_and_shares_them_in_a_process():
    family = Toy(n_way=3)
    family.prepare(CPU)
    assert len(pickle.dumps(family)) < 1000
    copy = pickle.loads(pickle.dumps(family))
    assert copy == family and "_prepared" not in copy.__dict__
    other = replace(family, n_way=2)
    assert other.data_sha256 == family.data_sha256
    assert other._ready().pixels.data_ptr() == family._ready().pixels.data_ptr()
    assert family.class_names("test") == ("class7", "class10", "class11")
