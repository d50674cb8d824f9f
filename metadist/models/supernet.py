"""A small space of networks: cells that are one operation each, or a mixture of all of them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from metadist.core.errors import ConfigError, at_least, one_of
from metadist.models.conv4 import BatchNorm

OPERATIONS = ("conv3", "conv1", "pool", "identity", "zero")


class Cell(nn.Module):
    """x → pool(ReLU(norm(x + Σ weight · operation(x)))). ``zero`` adds nothing."""

    def __init__(self, filters: int, operations: Sequence[str]) -> None:
        super().__init__()
        made = {
            "conv3": lambda: nn.Conv2d(filters, filters, 3, padding=1),
            "conv1": lambda: nn.Conv2d(filters, filters, 1),
        }
        self.convolutions = nn.ModuleDict({name: made[name]() for name in operations if name in made})
        self.average = nn.AvgPool2d(3, stride=1, padding=1)
        self.operations = tuple(operations)
        self.norm, self.pool = BatchNorm(filters), nn.AvgPool2d(2)

    def forward(self, x: Tensor, weights: Tensor) -> Tensor:
        total = x
        for name, weight in zip(self.operations, weights.unbind()):
            if name in self.convolutions:
                total = total + weight * self.convolutions[name](x)
            elif name != "zero":
                total = total + weight * (self.average(x) if name == "pool" else x)
        out: Tensor = self.pool(torch.relu(self.norm(total)))
        return out


class Network(nn.Module):
    """A stem, the cells, and a head. ``mixture_shape`` is [cells, operations]; (cells, 1) for one network.

    ``operations`` names the columns of a mixture.
    """

    def __init__(self, input_shape: tuple[int, ...], outputs: int | None, filters: int, cells: list[Cell]) -> None:
        super().__init__()
        self.stem = nn.Conv2d(input_shape[0], filters, 3, stride=2, padding=1)
        self.cells = nn.ModuleList(cells)
        self.mixture_shape, self.operations = (len(cells), len(cells[0].operations)), cells[0].operations
        features = self._features(torch.zeros(2, *input_shape), self._even()).shape[1]
        self.head = nn.Identity() if outputs is None else nn.Linear(features, outputs)

    def _even(self) -> Tensor:
        return torch.full(self.mixture_shape, 1 / self.mixture_shape[1])

    def _features(self, x: Tensor, mixture: Tensor) -> Tensor:
        x = self.stem(x)
        for cell, weights in zip(self.cells, mixture.unbind()):
            x = cell(x, weights)
        return x.flatten(1)

    def forward(self, x: Tensor, mixture: Tensor | None = None) -> Tensor:
        """Return the outputs [N, …]; ``mixture`` has the weights of the operations, equal ones by default."""
        used = self._even().to(x) if mixture is None else mixture
        out: Tensor = self.head(self._features(x, used))
        return out


@dataclass(frozen=True)
class Supernet:
    """A strided convolution, ``cells`` cells with a residual connection, each followed by 2×2 pooling, and a head.

    An operation is one of conv3, conv1, pool (3×3 average), identity and zero. Without ``operations``, every cell is a
    mixture of all of them, whose weights an algorithm learns (metanas); with one name for each cell, it is that network
    of the space. Batch norm uses the batch's own statistics.
    """

    filters: int = 32
    cells: int = 3
    operations: tuple[str, ...] | None = None

    def __post_init__(self) -> None:
        at_least(1, **{"model.filters": self.filters, "model.cells": self.cells})
        for i, name in enumerate(self.operations or ()):
            one_of(f"model.operations.{i}", name, OPERATIONS)
        if self.operations is not None and len(self.operations) != self.cells:
            raise ConfigError(
                f"model.operations: {len(self.operations)} for {self.cells} cells; give one for each cell"
            )

    def build(self, input_shape: tuple[int, ...], outputs: int | None) -> nn.Module:
        if len(input_shape) != 3:
            raise ConfigError(
                f"model 'supernet' needs images [channels, height, width]; these tasks' inputs are {list(input_shape)}"
            )
        if min(input_shape[1:]) < 2 ** (self.cells + 1) - 1:
            raise ConfigError(
                f"model.cells: {self.cells} cells leave no pixel of an image of {input_shape[1]}×{input_shape[2]}; use "
                "fewer"
            )
        chosen = [OPERATIONS] * self.cells if self.operations is None else [(name,) for name in self.operations]
        return Network(input_shape, outputs, self.filters, [Cell(self.filters, names) for names in chosen])
