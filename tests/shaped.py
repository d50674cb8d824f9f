"""Task families and modules of users, importable by path: flat targets, three targets, token ids, wrong labels."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import nn

from metadist.core.task import Classification, Examples, Task, TaskFamily
from metadist.testing.toys import Blobs, Curves


def changed(task, x=lambda t: t, y=lambda t: t):
    """``task`` with other inputs and targets in both sets."""
    return Task(*(Examples(x(e.x), y(e.y), e.mask) for e in (task.support, task.query)))


@dataclass(frozen=True)
class Flat(TaskFamily):
    """Targets [N], without a dimension of their own; ``outputs`` and ``input_shape`` as the class has them."""

    def sample(self, keys, split):
        return changed(Curves().sample(keys, split), y=lambda y: y[..., 0])


@dataclass(frozen=True)
class Three(TaskFamily):
    """Three targets; ``outputs`` stays at its default of 1."""

    def sample(self, keys, split):
        return changed(Curves().sample(keys, split), y=lambda y: torch.cat([y, y[..., :1] * 2], -1))


@dataclass(frozen=True)
class Tokens(Classification):
    """Sequences of 5 token ids below 20; the class is one of three letters that a task prefers."""

    outputs: int = 3
    rows: int = 6

    def sample(self, keys, split):
        letters = (keys.stream("letters").uniform(3) * 17).long()

        def examples(name, rows):
            y = torch.arange(rows) % 3
            noise = (keys.stream(name).uniform(rows, 5) * 20).long()
            own = letters[..., y] + 1
            return Examples(torch.where(torch.arange(5) < 3, own.unsqueeze(-1), noise), y.expand(own.shape).clone())

        return Task(examples("support", self.rows), examples("query", self.rows))

    def sample_task(self, key, split):
        return self.sample(key, split)


@dataclass(frozen=True)
class ByteTokens(Tokens):
    """The same, as uint8."""

    def sample(self, keys, split):
        return changed(super().sample(keys, split), x=lambda x: x.to(torch.uint8))


@dataclass(frozen=True)
class Values(TaskFamily):
    """Regression of the mean of token ids."""

    def sample(self, keys, split):
        task = Tokens().sample(keys, split)
        return Task(
            *(Examples(e.x, e.x.double().mean(-1, keepdim=True).float() / 20) for e in (task.support, task.query))
        )


class Reader(nn.Module):
    """Token ids [N, L] → [N, outputs]."""

    def __init__(self, outputs=3):
        super().__init__()
        self.table, self.head = nn.Embedding(20, 4), nn.Linear(4, outputs)

    def forward(self, x):
        return self.head(self.table(x).mean(1))


class ByteReader(Reader):
    """The same for any whole numbers: an embedding takes int32 and int64 alone."""

    def forward(self, x):
        return super().forward(x.long())


def flat_net():
    return nn.Sequential(nn.Linear(2, 8), nn.Tanh(), nn.Linear(8, 1), nn.Flatten(0))


def three_net():
    return nn.Sequential(nn.Linear(2, 8), nn.Tanh(), nn.Linear(8, 3))


def wide_net():
    return nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 3))


def one_reader():
    return Reader(1)


def embedding():
    return nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 6))


@dataclass(frozen=True)
class Labels(Blobs):
    """``Blobs`` with other labels: ``kind_of`` says which."""

    kind_of: str = "from one"

    def sample(self, keys, split):
        def other(y):
            return {
                "from one": lambda: y + 1,
                "float": y.float,
                "bool": lambda: y > 0,
                "column": lambda: y.unsqueeze(-1),
                "int32": y.int,
                "negative": lambda: y - 1,
                "nan": lambda: y,
            }[self.kind_of]()

        task = changed(super().sample(keys, split), y=other)
        return changed(task, x=lambda x: x * float("nan")) if self.kind_of == "nan" else task
