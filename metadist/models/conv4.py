"""Four convolutional blocks."""

from __future__ import annotations

from collections import OrderedDict
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn

from metadist.core.errors import ConfigError, at_least, one_of


class BatchNorm(nn.BatchNorm2d):
    """Batch normalisation by the batch's own statistics, from ``var_mean``.

    It has the values of ``nn.BatchNorm2d``, with which a second-order step takes a fifth more time (measured).
    """

    def __init__(self, channels: int) -> None:
        super().__init__(channels, track_running_stats=False)

    def forward(self, input: Tensor) -> Tensor:
        variance, mean = torch.var_mean(input, dim=(0, 2, 3), correction=0, keepdim=True)
        scale = torch.rsqrt(variance + self.eps) * self.weight.view(1, -1, 1, 1)
        return (input - mean) * scale + self.bias.view(1, -1, 1, 1)


class SpatialMean(nn.Module):
    """[N, C, H, W] → [N, C]. ``nn.AdaptiveAvgPool2d`` has no ``vmap`` rule and no deterministic derivative on GPUs."""

    def forward(self, input: Tensor) -> Tensor:
        return input.mean((2, 3))


@dataclass(frozen=True)
class Conv4:
    """Four blocks of 3×3 convolution, normalisation and ReLU (Vinyals et al. 2016), then a linear head.

    ``pooling: stride`` halves the image by strided convolutions (MAML's Omniglot network), ``max`` by 2×2 max-pooling.
    ``features: mean`` averages the last block over space, as MAML's reference code does on Omniglot; ``flatten`` keeps
    every position. Without ``outputs`` there is no head.
    """

    filters: int = 64
    pooling: Literal["stride", "max"] = "max"
    norm: Literal["batch", "group", "none"] = "batch"
    blocks: int = 4
    features: Literal["flatten", "mean"] = "flatten"
    dropout: float = 0.0

    def __post_init__(self) -> None:
        one_of("model.pooling", self.pooling, ("stride", "max"))
        one_of("model.norm", self.norm, ("batch", "group", "none"))
        one_of("model.features", self.features, ("flatten", "mean"))
        at_least(1, **{"model.filters": self.filters, "model.blocks": self.blocks})

    def build(self, input_shape: tuple[int, ...], outputs: int | None) -> nn.Module:
        if len(input_shape) != 3:
            raise ConfigError(
                f"model 'conv4' needs images [channels, height, width]; these tasks' inputs are {list(input_shape)}"
            )
        channels = input_shape[0]
        layers: OrderedDict[str, nn.Module] = OrderedDict()
        for block in range(1, self.blocks + 1):
            stride = 2 if self.pooling == "stride" else 1
            layers[f"conv{block}"] = nn.Conv2d(channels, self.filters, 3, stride=stride, padding=1)
            if self.norm == "batch":
                layers[f"norm{block}"] = BatchNorm(self.filters)
            elif self.norm == "group":
                layers[f"norm{block}"] = nn.GroupNorm(_groups(self.filters), self.filters)
            layers[f"relu{block}"] = nn.ReLU()
            if self.pooling == "max":
                layers[f"pool{block}"] = nn.MaxPool2d(2)
            if self.dropout:
                layers[f"dropout{block}"] = nn.Dropout2d(self.dropout)
            channels = self.filters
        if self.features == "mean":
            layers["mean"] = SpatialMean()
        layers["flatten"] = nn.Flatten()
        try:
            features = nn.Sequential(layers)(torch.zeros(2, *input_shape)).shape[1]
        except (RuntimeError, ValueError) as error:
            raise ConfigError(
                f"model.blocks: {self.blocks} blocks leave no pixel of an image of {input_shape[1]}×{input_shape[2]}; "
                "use fewer"
            ) from error
        if outputs is not None:
            layers["head"] = nn.Linear(features, outputs)
        return nn.Sequential(layers)


def _groups(filters: int) -> int:
    return next(g for g in (8, 4, 2, 1) if filters % g == 0)
