"""Random changes of training images: functions of the task's key alone, the same in any shard, none in evaluation."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch
from PIL import Image

from metadist.core.errors import ConfigError
from metadist.core.random import TaskKey
from metadist.tasks.augmentation import WORDS, Augmentation
from metadist.tasks.image_folder import ImageFolder
from metadist.testing import check_tasks

SIZE = 9
FULL = {"crop": 0.3, "flip": "both", "rotation": 40.0, "colour": 0.4}


def words(seed: int, images: int) -> torch.Tensor:
    return torch.randint(0, 1 << 32, (images, WORDS), generator=torch.Generator().manual_seed(seed))


def images(count: int = 50, channels: int = 3) -> torch.Tensor:
    return torch.rand(count, channels, SIZE, SIZE, generator=torch.Generator().manual_seed(1))


@pytest.fixture
def family(tmp_path):
    generator = np.random.default_rng(0)
    for split, names in (("train", "abcd"), ("val", "ef"), ("test", "gh")):
        for name in names:
            (tmp_path / "set" / split / name).mkdir(parents=True)
            for i in range(4):
                pixels = generator.integers(0, 256, (SIZE, SIZE, 3), dtype=np.uint8)
                Image.fromarray(pixels).save(tmp_path / "set" / split / name / f"{i}.png")

    def make(**settings: object) -> ImageFolder:
        return ImageFolder(path=str(tmp_path / "set"), image_size=SIZE, channels=3, n_way=2, query_shots=2, **settings)

    return make


def reference(image: np.ndarray, change: Augmentation, word: list[int]) -> np.ndarray:
    """Compute one image pixel by pixel in float64, from the definition."""
    unit = [w / 2**32 for w in word]
    angle = np.deg2rad(change.rotation) * (2 * int(unit[0] * 4096) / 4095 - 1)
    zoom = 1 - change.crop + change.crop * unit[1]
    shift = [(u - 0.5) * (1 - zoom) * SIZE for u in unit[2:4]]
    mirror = [
        -1 if change.flip in (axis, "both") and u >= 0.5 else 1
        for axis, u in zip(("vertical", "horizontal"), unit[4:6])
    ]
    middle, found = (SIZE - 1) / 2, np.empty_like(image)
    for row, column in itertools.product(range(SIZE), repeat=2):
        y, x = (row - middle) * mirror[0] * zoom, (column - middle) * mirror[1] * zoom
        down = y * np.cos(angle) - x * np.sin(angle) + middle + shift[0]
        right = y * np.sin(angle) + x * np.cos(angle) + middle + shift[1]
        down, right = np.clip([down, right], 0, SIZE - 1)
        top, left = int(down), int(right)
        bottom, far = min(top + 1, SIZE - 1), min(left + 1, SIZE - 1)
        above = image[:, top, left] * (1 - right + left) + image[:, top, far] * (right - left)
        below = image[:, bottom, left] * (1 - right + left) + image[:, bottom, far] * (right - left)
        found[:, row, column] = above * (1 - down + top) + below * (down - top)
    brightness, contrast, saturation = (1 + change.colour * (2 * u - 1) for u in unit[6:])
    found = (found * brightness - 0.5) * contrast + 0.5
    grey = 0.299 * found[0] + 0.587 * found[1] + 0.114 * found[2]
    return np.clip((found - grey) * saturation + grey, 0, 1) if change.colour else found


@pytest.mark.parametrize("name", [*FULL, "all"])
def test_against_the_definition(name):
    change = Augmentation(**(FULL if name == "all" else {name: FULL[name]}))
    some, drawn = images(20), words(2, 20)
    found = change(some, drawn)
    assert not torch.equal(found, some) and found.min() >= 0 and found.max() <= 1
    for image, word, changed in zip(some.double().numpy(), drawn.tolist(), found):
        assert np.abs(reference(image, change, word) - changed.numpy()).max() < 1e-5


def test_flips_are_exact_and_even():
    some, drawn = images(400), words(3, 400)
    found = Augmentation(flip="both")(some, drawn)
    kinds = [some, some.flip(-1), some.flip(-2), some.flip(-1, -2)]
    counts = [sum(torch.equal(a, b) for a, b in zip(found, kind)) for kind in kinds]
    assert sum(counts) == 400 and min(counts) > 70, "every image is one of the four, each about 100 times"
    horizontal = Augmentation(flip="horizontal")(some, drawn)
    assert {any(torch.equal(k[i], horizontal[i]) for k in kinds[:2]) for i in range(400)} == {True}


def test_the_same_bits_in_any_company():
    change, some, drawn = Augmentation(**FULL), images(), words(4, 50)
    whole = change(some, drawn)
    for size in (1, 3, 7, 16, 33):
        parts = [change(some[i : i + size], drawn[i : i + size]) for i in range(0, 50, size)]
        assert torch.equal(torch.cat(parts), whole), size


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_the_same_on_a_gpu():
    change, some, drawn = Augmentation(**FULL), images(), words(4, 50)
    there = change(some.cuda(), drawn.cuda())
    assert torch.equal(there, torch.cat([change(a[None].cuda(), w[None].cuda()) for a, w in zip(some, drawn)]))
    assert (there.cpu() - change(some, drawn)).abs().max() < 1e-6


def test_training_alone_is_changed_and_only_its_pixels(family):
    plain, changed = family(), family(**FULL)
    for split in ("validation", "test"):
        key = TaskKey.of(0, split, 0, range(5))
        assert torch.equal(plain.sample(key, split).query.x, changed.sample(key, split).query.x)
    key = TaskKey.of(0, "train", 3, range(5))
    before, after = plain.sample(key, "train"), changed.sample(key, "train")
    assert torch.equal(before.support.y, after.support.y)
    flat = (after.support.x - before.support.x).flatten(2).abs().amax(2)
    assert bool((flat > 0.01).all()), "every image is changed"
    again = TaskKey.of(0, "train", 4, range(5))
    assert not torch.equal(changed.sample(again, "train").support.x, after.support.x)
    assert plain.data_sha256 == changed.data_sha256


def test_a_family_with_all_changes_keeps_every_promise(family):
    check_tasks(family(**FULL), another_process=False)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"crop": 1.0}, "tasks.crop = 1.0: must be from 0 to 1"),
        ({"rotation": 200.0}, r"tasks.rotation = 200.0: must be from 0 to 180 \(degrees\)"),
        ({"colour": -0.1}, "tasks.colour = -0.1"),
        ({"flip": "horizontally"}, "tasks.flip: 'horizontally' is not one of .* did you mean 'horizontal'"),
    ],
)
def test_impossible_changes_are_refused(family, settings, message):
    with pytest.raises(ConfigError, match=message):
        family(**settings)
