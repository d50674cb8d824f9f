"""Multilayer perceptrons."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

from torch import nn

from metadist.core.errors import ConfigError, at_least, one_of


@dataclass(frozen=True)
class MLP:
    """A multilayer perceptron; it flattens inputs of any shape. Without ``outputs`` it ends with the last hidden layer.

    ``init: maml`` is that of MAML's reference code: weights from a normal distribution with σ = 0.01, truncated at 2σ,
    and biases of zero. ``torch`` is PyTorch's default. ``pool`` makes images of pool × pool pixels by means over areas.
    """

    hidden: tuple[int, ...] = (40, 40)
    activation: Literal["relu", "tanh", "gelu"] = "relu"
    norm: Literal["none", "layer"] = "none"
    dropout: float = 0.0
    init: Literal["torch", "maml"] = "torch"
    pool: int | None = None

    def __post_init__(self) -> None:
        one_of("model.activation", self.activation, ("relu", "tanh", "gelu"))
        one_of("model.norm", self.norm, ("none", "layer"))
        one_of("model.init", self.init, ("torch", "maml"))
        if any(width < 1 for width in self.hidden):
            raise ConfigError(f"model.hidden: {list(self.hidden)}: every width must be at least 1")
        at_least(1, **{"model.pool": self.pool})

    def build(self, input_shape: tuple[int, ...], outputs: int | None) -> nn.Module:
        activation = {"relu": nn.ReLU, "tanh": nn.Tanh, "gelu": nn.GELU}[self.activation]
        if outputs is None and not self.hidden:
            raise ConfigError("model.hidden: an embedding needs at least one hidden layer")
        layers: list[nn.Module] = [nn.Flatten()]
        if self.pool is not None:
            layers.insert(0, nn.AdaptiveAvgPool2d(self.pool))
            input_shape = (*input_shape[:-2], self.pool, self.pool)
        width = math.prod(input_shape)
        for size in self.hidden:
            layers.append(nn.Linear(width, size))
            if self.norm == "layer":
                layers.append(nn.LayerNorm(size))
            layers.append(activation())
            if self.dropout:
                layers.append(nn.Dropout(self.dropout))
            width = size
        if outputs is not None:
            layers.append(nn.Linear(width, outputs))
        module = nn.Sequential(*layers)
        if self.init == "maml":
            for layer in module:
                if isinstance(layer, nn.Linear):
                    nn.init.trunc_normal_(layer.weight, std=0.01, a=-0.02, b=0.02)
                    nn.init.zeros_(layer.bias)
        return module
