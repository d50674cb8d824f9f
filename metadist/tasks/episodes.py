"""Sample n-way k-shot episodes from a set of labelled images, a shard of episodes together."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Literal, Union

import torch
from torch import Tensor

from metadist.core.errors import ConfigError, DataError
from metadist.core.random import SPLITS, TaskKey, choose, integers
from metadist.core.task import Classification, Examples, Task, alone, stack
from metadist.tasks.augmentation import WORDS, Augmentation
from metadist.tasks.images import ImageSet, on_device, turned
from metadist.tasks.sizes import Size, bounds, check_size, drawn, varies

Rotations = Literal["classes", "slot", "none"]


@dataclass(frozen=True, eq=False)
class _Split:
    """The classes of one split: names, index of the first image and number of images, the last two int64 [classes]."""

    names: tuple[str, ...]
    first: Tensor
    counts: Tensor

    @cached_property
    def fewest(self) -> tuple[int, str]:
        """Return the smallest number of images, and its class."""
        return min(zip(self.counts.tolist(), self.names))


@dataclass(frozen=True, eq=False)
class _Prepared:
    """The loaded data. ``pixels`` holds ``images`` images, or four times as many with rotations (``images.turned``)."""

    pixels: Tensor
    images: int
    source: ImageSet
    splits: dict[str, _Split]
    data_sha256: str


@dataclass(frozen=True, kw_only=True)
class Episodes(Classification):
    """An episode has n classes of a split, with k support and q query images each, all drawn without replacement.

    A class's label is its position in the draw, so a class has another label in every task. Rows are *shot-major*: row
    s·n + w is image s of the class with label w, and the first n·j rows are a balanced j-shot set. x is float32
    [rows, channels, height, width] in [0, 1], y int64 [rows]. ``train_*`` replace a number in training alone.

    ``n_way``, ``k_shot`` and ``query_shots`` can be ranges, such as [5, 20]: each task then has a number between the
    two bounds, which are included. ``same_size`` consecutive tasks (those of one index div ``same_size``) share their
    numbers, so that they can be computed together. A range of ways ends at the number of classes of a split. Where a
    number of ways is a range, models have outputs for the largest number, and the classes that a task lacks are in no
    loss, metric or gradient.

    A subclass defines ``load`` and ``split_classes``.
    """

    n_way: Size = 5
    k_shot: Size = 1
    query_shots: Size = 1
    train_n_way: Union[Size, None] = None
    train_k_shot: Union[Size, None] = None
    train_query_shots: Union[Size, None] = None
    same_size: int = 4

    def __post_init__(self) -> None:
        for name, least in (("n_way", 2), ("k_shot", 1), ("query_shots", 1)):
            for key in (name, f"train_{name}"):
                check_size(f"tasks.{key}", getattr(self, key), least)
        if self.same_size < 1:
            raise ConfigError(f"tasks.same_size = {self.same_size}: must be at least 1")
        # Heads have outputs for the most ways that a task has, where tasks say how many of them they use.
        ways = [bounds(n)[1] for n in (self.n_way, self.train_n_way if self._ways_differ else None) if n is not None]
        object.__setattr__(self, "outputs", max(ways))

    def load(self) -> ImageSet:
        """Load the images."""
        raise NotImplementedError

    def split_classes(self, images: ImageSet) -> dict[str, list[int]]:
        """Return each split's classes as indices in ``images.names``."""
        raise NotImplementedError

    def rotations_in(self, split: str) -> Rotations:
        """Return the use of quarter turns in ``split``: new classes, one random turn for each class, or none."""
        return "none"

    def augmentation_in(self, split: str) -> Augmentation | None:
        """Return the random changes of images in ``split``, or None."""
        return None

    def sizes_in(self, split: str) -> tuple[Size, Size, Size]:
        """Return n_way, k_shot and query_shots of ``split``: numbers or ranges."""
        if split == "train":
            return (
                self.train_n_way or self.n_way,
                self.train_k_shot or self.k_shot,
                self.train_query_shots or self.query_shots,
            )
        return self.n_way, self.k_shot, self.query_shots

    def shape(self, split: str) -> tuple[int, int, int]:
        """Return (n_way, k_shot, query_shots) of ``split``, of a range the largest number."""
        n, k, q = (bounds(size)[1] for size in self.sizes_in(split))
        return n, k, q

    def shape_of(self, keys: TaskKey, split: str) -> tuple[int, int, int]:
        """Return (n_way, k_shot, query_shots) of the tasks of ``keys``, which are of one group."""
        n, k, q = drawn(keys, self.same_size, self._drawn_in(split))
        return n, k, q

    def _classes(self, split: str) -> int:
        """Return the number of classes of ``split``; turned images are classes of their own."""
        return len(self._ready().splits[split].names) * (4 if self.rotations_in(split) == "classes" else 1)

    def _drawn_in(self, split: str) -> tuple[Size, Size, Size]:
        """Return ``sizes_in``; a range of ways ends at the number of classes of the split."""
        n, k, q = self.sizes_in(split)
        return ((n[0], max(n[0], min(n[1], self._classes(split)))) if isinstance(n, tuple) else n), k, q

    @property
    def _ways_differ(self) -> bool:
        return varies(self.n_way, self.train_n_way)

    def group_size(self, split: str) -> int | None:
        return self.same_size if varies(*self.sizes_in(split)) else None

    def possible_sizes(self, split: str) -> Sequence[tuple[int, int]]:
        n, k, q = (range(low, high + 1) for low, high in map(bounds, self._drawn_in(split)))
        return [(ways * shots, ways * queries) for ways in n for shots in k for queries in q]

    def ways(self, split: str) -> int:
        return self.shape(split)[0]

    def prepare(self, device: torch.device) -> None:
        images = self.load()
        splits = self.split_classes(images)
        seen: dict[int, str] = {}
        for split in SPLITS:
            for c in splits.setdefault(split, []):
                if c in seen:
                    raise DataError(
                        f"class '{images.names[c]}' is in the {seen[c]} split and again in {split}; put each class in "
                        "one split"
                    )
                seen[c] = split
        counts = torch.tensor(images.counts)
        first = counts.cumsum(0) - counts
        # The splits are part of the fingerprint: a node with another split file has other data.
        described = json.dumps([images.sha256, {s: [images.names[c] for c in splits[s]] for s in SPLITS}])
        prepared = _Prepared(
            on_device(turned(images) if any(self.rotations_in(s) != "none" for s in SPLITS) else images, device),
            len(images.pixels),
            images,
            {s: _Split(tuple(images.names[c] for c in splits[s]), first[splits[s]], counts[splits[s]]) for s in SPLITS},
            hashlib.sha256(described.encode()).hexdigest(),
        )
        object.__setattr__(self, "_prepared", prepared)

    def _ready(self) -> _Prepared:
        if "_prepared" not in self.__dict__:
            self.prepare(torch.device("cpu"))
        prepared: _Prepared = self.__dict__["_prepared"]
        return prepared

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in self.__dict__.items() if name != "_prepared"}

    @property
    def data_sha256(self) -> str:
        """Return the SHA-256 over pixels, class names and splits; tasks depend on nothing else but the config."""
        return self._ready().data_sha256

    @property
    def pixels(self) -> Tensor:
        """Return the images that ``draw`` indexes, u8 [N, channels, height, width], on the prepared device."""
        return self._ready().pixels

    def source(self) -> ImageSet:
        """Return the loaded images."""
        return self._ready().source

    def splits(self) -> Mapping[str, Sequence[str]]:
        return {split: part.names for split, part in self._ready().splits.items()}

    def data_notes(self) -> Sequence[str]:
        ready = self._ready()
        return (*ready.source.notes, *_shared_images(ready.source, ready.splits), *self._shortened())

    def _shortened(self) -> list[str]:
        """Return a line for each split whose classes are fewer than the most ways."""
        most = {split: (self.ways(split), bounds(self._drawn_in(split)[0])[1]) for split in SPLITS}
        return [
            f"{split} tasks have at most {here} ways, not {stated}: the split has no more classes"
            for split, (stated, here) in most.items()
            if here < stated
        ]

    def task_classes(self, key: TaskKey, split: str) -> Sequence[str]:
        part, _ = self._checked(split)
        chosen = self._chosen(key, split)
        turns = [90 * (c // len(part.names)) for c in chosen]
        return [part.names[c % len(part.names)] + f" ({turn}°)" * (turn > 0) for c, turn in zip(chosen, turns)]

    def class_names(self, split: str) -> tuple[str, ...]:
        """Return the classes of ``split``, in the order of their numbers."""
        return self._ready().splits[split].names

    def _checked(self, split: str) -> tuple[_Split, int]:
        """Return the split and its number of classes. Raises ConfigError where it is too small for an episode."""
        part = self._ready().splits[split]
        n, k, q = (bounds(size)[1] for size in self._drawn_in(split))
        classes = self._classes(split)

        def key(name: str) -> str:
            overridden = split == "train" and getattr(self, f"train_{name}") is not None
            return f"tasks.train_{name}" if overridden else f"tasks.{name}"

        if n > classes:
            raise ConfigError(
                f"{key('n_way')} = {n}: the {split} split has {classes} classes; lower {key('n_way')}, or give this "
                "split more classes"
            )
        fewest, name = part.fewest
        if k + q > fewest:
            raise ConfigError(
                f"{key('k_shot')} + {key('query_shots')} = {k} + {q}: class '{name}' of the {split} split has {fewest} "
                "images; lower one of the two, or leave the class out (image_folder: by tasks.min_images)"
            )
        return part, classes

    def sources(self, key: TaskKey, split: str) -> tuple[int, ...]:
        """Return the numbers of the task's classes in the split; turned images are classes of their own.

        A task with fewer ways than others repeats its first class.
        """
        chosen = self._chosen(key, split)
        return (*chosen, *chosen[:1] * (self.ways(split) - len(chosen)))

    def _chosen(self, key: TaskKey, split: str) -> tuple[int, ...]:
        _, classes = self._checked(split)
        (words,) = key.to(torch.device("cpu")).words(classes=self.shape_of(key, split)[0])
        return tuple(choose(words, classes).tolist())

    def draw(self, keys: TaskKey, split: str) -> Tensor:
        """Draw the episodes' images as indices of ``pixels``: int64 [T, k + q, n]; tasks of one group."""
        part, classes = self._checked(split)
        n, k, q = self.shape_of(keys, split)
        rotations = self.rotations_in(split)
        # All streams together; a stream of zero words costs nothing.
        slots, words, quarters = keys.words(classes=n, images=n * (k + q), rotations=n if rotations == "slot" else 0)
        chosen = choose(slots, classes)
        turns = integers(quarters, 4) if rotations == "slot" else None
        if rotations == "classes":
            chosen, turns = chosen % len(part.names), chosen // len(part.names)
        first = part.first[chosen]
        if turns is not None:
            first += turns * self._ready().images
        images = choose(words.unflatten(-1, (n, k + q)), part.counts[chosen])
        return (first.unsqueeze(-1) + images).transpose(-1, -2)

    def sample(self, keys: TaskKey, split: str) -> Task:
        groups = [keys] if keys.tasks.dim() == 0 else keys.runs(self.group_size(split))
        if len(groups) == 1:
            return self._sample_group(keys, split)
        sampled = [self._sample_group(group, split) for group in groups]
        return stack([alone(some, i) for some in sampled for i in range(len(some.query.y))])

    def _sample_group(self, keys: TaskKey, split: str) -> Task:
        index = self.draw(keys.to(torch.device("cpu")), split)
        n, k, q = self.shape_of(keys, split)
        pixels = self.pixels
        # Copy all indices to the device together, and gather once for each set.
        index = index.to(pixels.device)
        labels = torch.arange(n, device=pixels.device)
        augmentation, words = self.augmentation_in(split), None
        if augmentation:
            (words,) = keys.to(torch.device("cpu")).words(augmentation=(k + q) * n * WORDS)
            words = words.unflatten(-1, (k + q, n, WORDS)).to(pixels.device)

        def examples(first: int, shots: int) -> Examples:
            rows = index[..., first : first + shots, :]
            tasks = rows.shape[:-2]
            # A product, not a quotient: CUDA divides by a scalar as a product with its inverse, the CPU does not.
            images = pixels.index_select(0, rows.flatten()).to(torch.float32).mul_(1 / 255)
            if augmentation and words is not None:
                images = augmentation(images, words[..., first : first + shots, :, :].reshape(-1, WORDS))
            return Examples(images.view(*tasks, shots * n, *pixels.shape[1:]), labels.repeat(*tasks, shots))

        ways = torch.full(keys.tasks.shape, n, device=pixels.device) if self._ways_differ else None
        return Task(examples(0, k), examples(k, q), ways)

    def sample_task(self, key: TaskKey, split: str) -> Task:
        return self.sample(key, split)

    def protocol(self, split: str) -> dict[str, Any]:
        n, k, q = (list(size) if isinstance(size, tuple) else size for size in self._drawn_in(split))
        _, classes = self._checked(split)
        return {
            "n_way": n,
            "k_shot": k,
            "query_shots": q,
            **({"same_size": self.same_size} if self.group_size(split) else {}),
            "classes": classes,
            "rotations": self.rotations_in(split),
            "data_sha256": self.data_sha256,
        }

    def sizes(self, split: str) -> tuple[int, int] | None:
        n, k, q = self.shape(split)
        return (n * k, n * q) if self.group_size(split) is None else None


def _shared_images(images: ImageSet, splits: Mapping[str, _Split]) -> list[str]:
    """Return a line for each two splits that share images, pixel by pixel."""
    found: dict[str, set[bytes]] = {}
    for split, part in splits.items():
        rows = [i for first, n in zip(part.first.tolist(), part.counts.tolist()) for i in range(first, first + n)]
        found[split] = {hashlib.blake2b(images.pixels[i].tobytes(), digest_size=16).digest() for i in rows}
    pairs = [(a, b, len(found[a] & found[b])) for i, a in enumerate(SPLITS) for b in SPLITS[i + 1 :]]
    return [f"{n:,} images are in the {a} split and in the {b} split, pixel by pixel" for a, b, n in pairs if n]
