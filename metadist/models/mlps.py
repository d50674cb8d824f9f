"""Multilayer perceptrons of several shapes, for learned optimisers."""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import Literal

from torch import nn

from metadist.core.errors import ConfigError, at_least
from metadist.core.model import Variants
from metadist.models.mlp import MLP


@dataclass(frozen=True)
class MLPs:
    """Multilayer perceptrons whose hidden widths, depth and input size depend on the task.

    Training and validation have the shapes of ``networks`` × ``pools``, test tasks those of ``test_networks`` ×
    ``pools`` (null: ``networks``); ``pools`` are sizes to which images shrink, and null keeps them. ``each``
    consecutive tasks share a shape, and are computed together. Needs an algorithm with carried state.
    """

    networks: tuple[tuple[int, ...], ...] = ((16,), (32,), (16, 16))
    test_networks: tuple[tuple[int, ...], ...] | None = None
    pools: tuple[int | None, ...] = (None,)
    each: int = 4
    activation: Literal["relu", "tanh", "gelu"] = "relu"

    def __post_init__(self) -> None:
        at_least(1, **{"model.each": self.each})
        if not self.networks or not self.pools or self.test_networks == ():
            raise ConfigError("model.networks, model.test_networks, model.pools: each needs at least one entry")
        self._shapes("train"), self._shapes("test")

    def _shapes(self, split: str) -> list[MLP]:
        networks = self.networks if split != "test" or self.test_networks is None else self.test_networks
        return [MLP(hidden, self.activation, pool=pool) for hidden in networks for pool in self.pools]

    def build(self, input_shape: tuple[int, ...], outputs: int | None) -> nn.Module:
        """Build the first network of training."""
        return self._shapes("train")[0].build(input_shape, outputs)

    def variants(self, input_shape: tuple[int, ...], outputs: int | None) -> Variants:
        """Return the networks of all tasks."""
        train, test = self._shapes("train"), self._shapes("test")
        factories = tuple(functools.partial(shape.build, input_shape, outputs) for shape in (*train, *test))
        return Variants(factories, functools.partial(_chosen, self.each, len(train), len(test)), self)


def _chosen(each: int, train: int, test: int, split: str, index: int) -> int:
    return train + index // each % test if split == "test" else index // each % train
