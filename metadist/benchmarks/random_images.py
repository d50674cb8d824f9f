"""Sample classification tasks of random images with the shapes of miniImageNet, without its data."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from metadist.core.random import TaskKey
from metadist.core.task import Classification, Examples, Task


@dataclass(frozen=True)
class RandomImages(Classification):
    """Classify ``n_way`` classes of normal noise, each around its own mean, so that adaptation is possible."""

    n_way: int = 5
    k_shot: int = 1
    query_shots: int = 15
    channels: int = 3
    size: int = 84

    @property
    def input_shape(self) -> tuple[int, ...]:  # type: ignore[override]
        return (self.channels, self.size, self.size)

    @property
    def outputs(self) -> int:  # type: ignore[override]
        return self.n_way

    def sample_task(self, key: TaskKey, split: str) -> Task:
        shots = self.k_shot + self.query_shots
        noise = key.stream("images").normal(self.n_way, shots, *self.input_shape)
        images = noise + key.stream("classes").normal(self.n_way, 1, *self.input_shape)
        labels = torch.arange(self.n_way)

        def examples(first: int, last: int) -> Examples:
            return Examples(images[:, first:last].flatten(0, 1), labels.repeat_interleave(last - first))

        return Task(examples(0, self.k_shot), examples(self.k_shot, shots))

    def sizes(self, split: str) -> tuple[int, int] | None:
        return self.n_way * self.k_shot, self.n_way * self.query_shots

    def protocol(self, split: str) -> dict[str, Any]:
        return {"n_way": self.n_way, "k_shot": self.k_shot, "query_shots": self.query_shots}
