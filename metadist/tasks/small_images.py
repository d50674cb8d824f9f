"""Define classification of small images: the tasks on which learned optimisers train networks."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from metadist.core.errors import ConfigError, at_least, one_of
from metadist.core.random import SPLITS, TaskKey, choose, integers
from metadist.core.task import Classification, Examples, Task
from metadist.tasks.class_images import class_images
from metadist.tasks.images import ImageSet, on_device

SETS = ("omniglot", "cifar100")
#: the share of a class's images, from the first one on, that support rows are drawn from
TRAINING_SHARE = 0.8


@dataclass(frozen=True, eq=False)
class _Set:
    """One data set on a device: first image and number of images of each class by split, mean and 1/deviation."""

    pixels: Tensor
    names: dict[str, tuple[str, ...]]
    first: dict[str, Tensor]
    counts: dict[str, Tensor]
    mean: float
    scale: float
    sha256: str


@dataclass(frozen=True, kw_only=True)
class SmallImages(Classification):
    """A task has ``n_way`` classes of one of the sets in ``data``, to be told apart after training on ``rows`` images.

    Set, classes and images are keyed draws; images are drawn with replacement, those of the support set from the
    first 80 % of each class, and ``query_rows`` from the rest. x is float32 [rows, 1, size, size] with the mean 0 and
    the deviation 1 of the source's training classes; y int64 [rows], row r has label r mod ``n_way``. Splits are over
    *classes*: Vinyals' of Omniglot, CIFAR-FS's of CIFAR-100. ``cifar100`` needs ``METADIST_DATA`` with cifar100/.
    """

    data: tuple[str, ...] = ("omniglot",)
    image_size: int = 8
    n_way: int = 10
    rows: int = 1000
    query_rows: int = 200

    def __post_init__(self) -> None:
        at_least(1, **{f"tasks.{n}": getattr(self, n) for n in ("image_size", "rows", "query_rows")})
        at_least(2, **{"tasks.n_way": self.n_way})
        if not self.data or len(set(self.data)) < len(self.data):
            raise ConfigError(f"tasks.data: {list(self.data)}; expected one or more different ones of {SETS}")
        for name in self.data:
            one_of("tasks.data", name, SETS)
        object.__setattr__(self, "outputs", self.n_way)
        object.__setattr__(self, "input_shape", (1, self.image_size, self.image_size))

    def prepare(self, device: torch.device) -> None:
        loaded = {name: _prepared(class_images(name, self.image_size), device) for name in self.data}
        for name, source in loaded.items():
            for split, names in source.names.items():
                if len(names) < self.n_way:
                    raise ConfigError(
                        f"tasks.n_way: {self.n_way}, but the {split} split of {name} has {len(names)} classes; lower it"
                    )
        object.__setattr__(self, "_loaded", loaded)

    def _sets(self) -> Mapping[str, _Set]:
        if "_loaded" not in self.__dict__:
            self.prepare(torch.device("cpu"))
        loaded: dict[str, _Set] = self.__dict__["_loaded"]
        return loaded

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in self.__dict__.items() if name != "_loaded"}

    @property
    def data_sha256(self) -> str:
        found = {name: source.sha256 for name, source in self._sets().items()}
        return hashlib.sha256(json.dumps([self.image_size, sorted(found.items())]).encode()).hexdigest()

    def splits(self) -> Mapping[str, Sequence[str]]:
        return {s: [f"{n}/{c}" for n, source in self._sets().items() for c in source.names[s]] for s in SPLITS}

    def _chosen(self, key: TaskKey, split: str) -> tuple[str, Tensor]:
        """Return the source of one task, and its classes as numbers in the split of the source."""
        which, classes = key.to(torch.device("cpu")).words(source=1, classes=self.n_way)
        name = self.data[int(integers(which, len(self.data)))]
        return name, choose(classes, len(self._sets()[name].names[split]))

    def task_classes(self, key: TaskKey, split: str) -> Sequence[str]:
        name, classes = self._chosen(key, split)
        return [self._sets()[name].names[split][c] for c in classes.tolist()]

    def sample_task(self, key: TaskKey, split: str) -> Task:
        name, classes = self._chosen(key, split)
        source = self._sets()[name]
        first, counts = source.first[split][classes], source.counts[split][classes]
        training = (counts * TRAINING_SHARE).long()
        support, query = key.to(torch.device("cpu")).words(support=self.rows, query=self.query_rows)

        def examples(words: Tensor, start: Tensor, among: Tensor) -> Examples:
            labels = torch.arange(len(words)) % self.n_way
            rows = start[labels] + ((words * among[labels]) >> 32)
            pixels = source.pixels.index_select(0, rows.to(source.pixels.device)).to(torch.float32)
            return Examples(pixels.sub_(source.mean).mul_(source.scale), labels.to(pixels.device))

        return Task(examples(support, first, training), examples(query, first + training, counts - training))

    def sizes(self, split: str) -> tuple[int, int]:
        return self.rows, self.query_rows

    def protocol(self, split: str) -> dict[str, Any]:
        sizes = {"n_way": self.n_way, "rows": self.rows, "query_rows": self.query_rows, "image_size": self.image_size}
        return {**sizes, "data": list(self.data), "data_sha256": self.data_sha256}


def _prepared(images: ImageSet, device: torch.device) -> _Set:
    counts = torch.tensor(images.counts)
    first = counts.cumsum(0) - counts
    found = {split: [c for c, part in enumerate(images.parts) if part == split] for split in SPLITS}
    train = torch.cat([torch.arange(int(first[c]), int(first[c] + counts[c])) for c in found["train"]])
    values = torch.from_numpy(images.pixels)[train].double()
    mean, deviation = float(values.mean()), float(values.std())
    return _Set(
        on_device(images, device),
        {s: tuple(images.names[c] for c in classes) for s, classes in found.items()},
        {s: first[classes] for s, classes in found.items()},
        {s: counts[classes] for s, classes in found.items()},
        round(mean, 3),
        1 / round(deviation, 3),
        images.sha256,
    )
