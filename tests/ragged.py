"""Task families whose tasks differ in size: image episodes with drawn ways, shots and queries, and curves."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from metadist.core.task import Examples, Task, TaskFamily
from metadist.tasks.episodes import Episodes
from metadist.tasks.images import ImageSet
from metadist.tasks.sizes import Size

CLASSES, IMAGES = 24, 12


@dataclass(frozen=True, kw_only=True)
class Shades(Episodes):
    """Images 1 × 8 × 8 of noise about a pattern of each class: 10 classes for training, 7 for each other split."""

    n_way: Size = (2, 5)
    k_shot: Size = (1, 4)
    query_shots: Size = (1, 3)
    same_size: int = 2

    input_shape = (1, 8, 8)

    def load(self):
        draw = np.random.default_rng(0)
        patterns = draw.integers(0, 256, (CLASSES, 1, 1, 8, 8))
        noise = draw.integers(-40, 40, (CLASSES, IMAGES, 1, 8, 8))
        pixels = np.clip(patterns + noise, 0, 255).astype(np.uint8).reshape(-1, 1, 8, 8)
        names = [f"class{i:02}" for i in range(CLASSES)]
        return ImageSet.of(pixels, names, [IMAGES] * CLASSES, [""] * CLASSES)

    def split_classes(self, images):
        return {"train": list(range(10)), "validation": list(range(10, 17)), "test": list(range(17, 24))}


@dataclass(frozen=True)
class Lines(TaskFamily):
    """A user's own family: noisy lines whose numbers of rows are drawn for each two tasks."""

    input_shape = (1,)

    def group_size(self, split):
        return 2

    def possible_sizes(self, split):
        return [(support, query) for support in range(2, 9) for query in range(3, 6)]

    def sample_task(self, key, split):
        support, query = (int(key.group(2).stream(name).integers(n)) for name, n in (("support", 7), ("query", 3)))
        x = key.stream("x").uniform(16, 1, low=-1.0)
        slope = key.stream("slope").normal(1)
        y = x * slope + 0.1 * key.stream("noise").normal(16, 1)
        given, asked = slice(0, 2 + support), slice(10, 13 + query)
        return Task(Examples(x[given], y[given]), Examples(x[asked], y[asked]))
