"""Feed-forward policies: for MAML-RL, and as a control without memory."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn

from metadist.core.errors import ConfigError, one_of


class ReactivePolicy(nn.Module):
    """observation [B, T, O] → head [B, T, A], value [B, T], by separate networks; the memory has no elements."""

    sees_history = False
    memory_size = 0

    def __init__(
        self, observation: int, head: int, hidden: tuple[int, ...], activation: type[nn.Module], log_std: bool
    ) -> None:
        super().__init__()
        self.head = network(observation, hidden, head // 2 if log_std else head, activation, 0.01)
        self.value = network(observation, hidden, 1, activation, 1.0)
        self.log_std = nn.Parameter(torch.zeros(head // 2)) if log_std else None

    def forward(self, features: Tensor, memory: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        head = self.head(features)
        if self.log_std is not None:
            head = torch.cat([head, self.log_std.expand_as(head)], -1)
        return head, self.value(features).squeeze(-1), memory


def network(
    inputs: int, hidden: tuple[int, ...], outputs: int, activation: type[nn.Module], gain: float
) -> nn.Sequential:
    """Return layers of ``hidden`` widths and a linear layer; its initial weights are orthogonal, times ``gain``."""
    layers: list[nn.Module] = []
    for size in hidden:
        layers += [nn.Linear(inputs, size), activation()]
        inputs = size
    last = nn.Linear(inputs, outputs)
    nn.init.orthogonal_(last.weight, gain)
    nn.init.zeros_(last.bias)
    return nn.Sequential(*layers, last)


@dataclass(frozen=True)
class Reactive:
    """A feed-forward policy that sees only the observation; for MAML-RL, and as the control without memory for RL²."""

    hidden: tuple[int, ...] = (64, 64)
    activation: Literal["tanh", "relu"] = "tanh"

    def __post_init__(self) -> None:
        one_of("model.activation", self.activation, ("tanh", "relu"))
        if any(width < 1 for width in self.hidden):
            raise ConfigError(f"model.hidden: {list(self.hidden)}: every width must be at least 1")

    def build_policy(self, observation: int, action: int, continuous: bool) -> nn.Module:
        kind = {"tanh": nn.Tanh, "relu": nn.ReLU}[self.activation]
        return ReactivePolicy(observation, 2 * action if continuous else action, self.hidden, kind, continuous)
