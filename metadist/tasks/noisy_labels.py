"""Define tasks that are minibatches of one training set with wrong labels or rare classes, beside a clean set."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from metadist.core.errors import ConfigError, DataError, at_least, one_of
from metadist.core.random import TaskKey, integers, seeded
from metadist.core.task import Classification, Examples, Task
from metadist.tasks.cifar100 import cifar100
from metadist.tasks.images import ImageSet
from metadist.tasks.omniglot import Omniglot

#: source → shape of an image
SOURCES = {"omniglot": (1, 28, 28), "cifar100": (3, 32, 32)}


@dataclass(frozen=True, eq=False)
class _Set:
    """Images u8 [N, channels, height, width] and their labels int64 [N]."""

    pixels: Tensor
    labels: Tensor

    def examples(self, index: Tensor) -> Examples:
        """Return the examples at ``index`` […, rows]."""
        images = self.pixels.index_select(0, index.flatten()).to(torch.float32).mul_(1 / 255)
        return Examples(images.view(*index.shape, *self.pixels.shape[1:]), self.labels[index])


@dataclass(frozen=True, eq=False)
class _Prepared:
    train: _Set
    clean: _Set
    validation: _Set
    test: _Set
    sha256: str


@dataclass(frozen=True, kw_only=True)
class NoisyLabels(Classification):
    """Minibatches of one training set (support sets, ``batch`` rows) and of a clean set (query sets, ``clean_batch``).

    ``classes`` classes of ``source`` are drawn. A training label is replaced by a uniformly random class with
    probability ``noise`` (which may be the class itself). Class c of C keeps the part imbalance^(−c/(C − 1)) of its
    training images. Each class gives ``clean_per_class`` images to the clean set and ``held_out_per_class`` to
    validation; Omniglot gives ``test_per_class`` to the test, CIFAR-100 has an official one. ``data_seed`` keys all of
    this. Images become smaller by the factor ``pooled``: a pixel is the mean of a square of ``pooled`` × ``pooled``.

    A validation or test task has one image of each class, all tasks together have each image once; its support set
    is one clean image of each class.
    """

    source: Literal["omniglot", "cifar100"] = "omniglot"
    classes: int = 10
    noise: float = 0.4
    imbalance: float = 1.0
    clean_per_class: int = 2
    held_out_per_class: int = 2
    test_per_class: int = 5
    batch: int = 50
    clean_batch: int = 20
    pooled: int = 1
    data_seed: int = 0

    def __post_init__(self) -> None:
        one_of("tasks.source", self.source, SOURCES)
        counts = ("clean_per_class", "held_out_per_class", "test_per_class", "batch", "clean_batch", "pooled")
        at_least(1, **{f"tasks.{name}": getattr(self, name) for name in counts})
        at_least(2, **{"tasks.classes": self.classes})
        if not 0 <= self.noise <= 1:
            raise ConfigError(f"tasks.noise: {self.noise}; expected the probability of a random label, 0 to 1")
        if not 1 <= self.imbalance < math.inf:
            raise ConfigError(
                f"tasks.imbalance: {self.imbalance}; expected the largest class by the smallest, 1 or more"
            )
        channels, height, width = SOURCES[self.source]
        if height % self.pooled:
            raise ConfigError(f"tasks.pooled: {self.pooled}; expected a divisor of {height}, the size of an image")
        object.__setattr__(self, "outputs", self.classes)
        object.__setattr__(self, "input_shape", (channels, height // self.pooled, width // self.pooled))

    def prepare(self, device: torch.device) -> None:
        images = cifar100() if self.source == "cifar100" else Omniglot(rotations="none").load()
        generator = seeded(self.data_seed, "noisy_labels")
        parts: dict[str, list[tuple[int, int]]] = {"train": [], "clean": [], "validation": [], "test": []}
        for label, pools in enumerate(self._pools(images, generator)):
            for name, rows in pools.items():
                parts[name] += [(row, label) for row in rows]
        sets = {name: self._set(images, rows, device) for name, rows in parts.items()}
        train = sets["train"]
        wrong = torch.rand(len(train.labels), generator=generator, dtype=torch.float64) < self.noise
        other = torch.randint(self.classes, (len(train.labels),), generator=generator)
        sets["train"] = _Set(train.pixels, torch.where(wrong.to(device), other.to(device), train.labels))
        described = json.dumps([images.sha256, asdict(self)])
        sha256 = hashlib.sha256(described.encode()).hexdigest()
        object.__setattr__(self, "_prepared", _Prepared(**sets, sha256=sha256))

    def _pools(self, images: ImageSet, generator: torch.Generator) -> list[dict[str, list[int]]]:
        """Return the rows of the images of each class, by their use."""
        counts = np.array(images.counts)
        firsts = counts.cumsum() - counts
        places = dict[str, dict[str, range]]()
        for name, part, first, count in zip(images.names, images.parts, firsts.tolist(), counts.tolist()):
            places.setdefault(name, {})[part] = range(first, first + count)
        names = sorted(places)
        if self.classes > len(names):
            raise ConfigError(f"tasks.classes: {self.classes}; {self.source} has {len(names)} classes")
        chosen = [names[i] for i in torch.randperm(len(names), generator=generator)[: self.classes].tolist()]
        return [self._pool(name, c, places[name], generator) for c, name in enumerate(chosen)]

    def _pool(self, name: str, c: int, places: dict[str, range], generator: torch.Generator) -> dict[str, list[int]]:
        official = "test" in places
        test = list(places["test"]) if official else []
        rows = [row for part, part_rows in places.items() if part != "test" for row in part_rows]
        rows = [rows[i] for i in torch.randperm(len(rows), generator=generator).tolist()]
        if not official:
            test, rows = rows[: self.test_per_class], rows[self.test_per_class :]
        held, clean = self.held_out_per_class, self.clean_per_class
        kept = round((len(rows) - held - clean) * self.imbalance ** (-c / (self.classes - 1)))
        if kept < 1:
            raise DataError(
                f"tasks: class '{name}' has {kept} training images after {clean} clean and {held} held-out ones and "
                f"an imbalance of {self.imbalance:g}; lower tasks.clean_per_class, held_out_per_class or imbalance"
            )
        first = held + clean
        return {
            "validation": rows[:held],
            "clean": rows[held:first],
            "train": rows[first : first + kept],
            "test": test,
        }

    def _set(self, images: ImageSet, rows: Sequence[tuple[int, int]], device: torch.device) -> _Set:
        pixels = images.pixels[[row for row, _ in rows]]
        if self.pooled > 1:
            n, channels, height, width = pixels.shape
            shape = (n, channels, height // self.pooled, self.pooled, width // self.pooled, self.pooled)
            pixels = (pixels.reshape(shape).sum((3, 5), dtype=np.int64) // self.pooled**2).astype(np.uint8)
        labels = torch.tensor([label for _, label in rows])
        return _Set(torch.from_numpy(np.ascontiguousarray(pixels)).to(device), labels.to(device))

    def _ready(self) -> _Prepared:
        if "_prepared" not in self.__dict__:
            self.prepare(torch.device("cpu"))
        prepared: _Prepared = self.__dict__["_prepared"]
        return prepared

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in self.__dict__.items() if name != "_prepared"}

    @property
    def data_sha256(self) -> str:
        """Return the SHA-256 over the images and the settings; the sets depend on nothing else."""
        return self._ready().sha256

    def sample(self, keys: TaskKey, split: str) -> Task:
        ready, keys = self._ready(), keys.to(torch.device("cpu"))
        device = ready.train.labels.device
        if split == "train":
            support, query = keys.words(batch=self.batch, clean=self.clean_batch)
            return Task(
                ready.train.examples(integers(support, len(ready.train.labels)).to(device)),
                ready.clean.examples(integers(query, len(ready.clean.labels)).to(device)),
            )
        judged = ready.test if split == "test" else ready.validation
        per_class = len(judged.labels) // self.classes
        classes = torch.arange(self.classes)
        place = (keys.tasks % per_class).unsqueeze(-1)
        support = (classes * self.clean_per_class).expand(*keys.tasks.shape, -1)
        return Task(ready.clean.examples(support.to(device)), judged.examples((classes * per_class + place).to(device)))

    def sample_task(self, key: TaskKey, split: str) -> Task:
        return self.sample(key, split)

    def listed_tasks(self, split: str) -> int | None:
        if split == "train":
            return None
        ready = self._ready()
        return len((ready.test if split == "test" else ready.validation).labels) // self.classes

    def sizes(self, split: str) -> tuple[int, int]:
        return (self.batch, self.clean_batch) if split == "train" else (self.classes, self.classes)

    def protocol(self, split: str) -> dict[str, Any]:
        names = ("source", "classes", "noise", "imbalance", "clean_per_class", "data_seed")
        return {**{name: getattr(self, name) for name in names}, "data_sha256": self.data_sha256}
