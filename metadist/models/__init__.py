"""The models by name: a frozen config with ``build(input_shape, outputs) -> nn.Module`` (``outputs=None``: an embedding), or
``build_policy(observation, action, continuous) -> nn.Module``, a ``PolicyModule``, from sizes in features."""

from __future__ import annotations

from typing import Protocol

from torch import nn

from metadist.models.causal_transformer import CausalTransformer
from metadist.models.cnp import ConditionalNeuralProcess
from metadist.models.conv4 import Conv4
from metadist.models.mlp import MLP
from metadist.models.reactive import Reactive
from metadist.models.recurrent import GRU, LSTM
from metadist.models.transformer import Transformer


class ModelConfig(Protocol):
    def build(self, input_shape: tuple[int, ...], outputs: int | None) -> nn.Module: ...


class PolicyConfig(Protocol):
    def build_policy(self, observation: int, action: int, continuous: bool) -> nn.Module: ...


MODELS: dict[str, type[ModelConfig] | type[PolicyConfig]] = {
    "causal_transformer": CausalTransformer,
    "cnp": ConditionalNeuralProcess,
    "conv4": Conv4,
    "gru": GRU,
    "lstm": LSTM,
    "mlp": MLP,
    "reactive": Reactive,
    "transformer": Transformer,
}
