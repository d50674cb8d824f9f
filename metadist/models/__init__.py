"""The models by name: a frozen config with ``build(input_shape, outputs) -> nn.Module``. ``outputs=None``: an embedding."""

from __future__ import annotations

from typing import Protocol

from torch import nn

from metadist.models.cnp import ConditionalNeuralProcess
from metadist.models.conv4 import Conv4
from metadist.models.mlp import MLP
from metadist.models.transformer import Transformer


class ModelConfig(Protocol):
    def build(self, input_shape: tuple[int, ...], outputs: int | None) -> nn.Module: ...


MODELS: dict[str, type[ModelConfig]] = {
    "cnp": ConditionalNeuralProcess,
    "conv4": Conv4,
    "mlp": MLP,
    "transformer": Transformer,
}
