"""The models by name. Each is a frozen dataclass that builds modules: a ``ModelConfig`` or a ``PolicyConfig``.

To add one, write a file and add a line to ``MODELS``. Configs can also name a model by its import path, or by an entry
point of an installed package (``docs/extend.md``).
"""

from __future__ import annotations

from typing import Protocol, runtime_checkable

from torch import nn

from metadist.core.model import Variants
from metadist.models.causal_transformer import CausalTransformer
from metadist.models.cnp import ConditionalNeuralProcess
from metadist.models.conv4 import Conv4
from metadist.models.mlp import MLP
from metadist.models.mlps import MLPs
from metadist.models.reactive import Reactive
from metadist.models.recurrent import GRU, LSTM
from metadist.models.supernet import Supernet
from metadist.models.transformer import Transformer


@runtime_checkable
class ModelConfig(Protocol):
    """The settings of a model for supervised tasks. A class with this method needs no base class."""

    def build(self, input_shape: tuple[int, ...], outputs: int | None) -> nn.Module:
        """Build a module: inputs [N, *input_shape] → [N, outputs], or embeddings of any size where ``outputs`` is
        None."""
        ...


@runtime_checkable
class VariantsConfig(ModelConfig, Protocol):
    """The settings of a model whose shape depends on the task: with algorithms that carry a network for each task."""

    def variants(self, input_shape: tuple[int, ...], outputs: int | None) -> Variants:
        """Return the modules of all shapes, and the choice for a task."""
        ...


@runtime_checkable
class PolicyConfig(Protocol):
    """The settings of a policy for meta-environments. A class with this method needs no base class."""

    def build_policy(self, observation: int, action: int, continuous: bool) -> nn.Module:
        """Build a ``metadist.rl.policy.PolicyModule`` for ``observation`` and ``action`` features."""
        ...


MODELS: dict[str, type[ModelConfig] | type[PolicyConfig]] = {
    "causal_transformer": CausalTransformer,
    "cnp": ConditionalNeuralProcess,
    "conv4": Conv4,
    "gru": GRU,
    "lstm": LSTM,
    "mlp": MLP,
    "mlps": MLPs,
    "reactive": Reactive,
    "supernet": Supernet,
    "transformer": Transformer,
}
