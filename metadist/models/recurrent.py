"""Recurrent policies: GRU and LSTM."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from metadist.core.errors import ConfigError, at_least
from metadist.models.reactive import network


class RecurrentPolicy(nn.Module):
    """features [B, T, F], memory [B, M] → head [B, T, A], value [B, T], memory [B, M]; separate heads."""

    sees_history = True

    def __init__(self, features: int, head: int, log_std: bool, config: GRU) -> None:
        super().__init__()
        hidden, outputs = config.hidden, head // 2 if log_std else head
        self.hidden, self.lstm, self.shows_features = hidden, config.cell == "lstm", bool(config.heads)
        self.core: nn.RNNBase = (nn.LSTM if self.lstm else nn.GRU)(features, hidden, batch_first=True)
        self.head, self.value = (self._head(features, config, n, gain) for n, gain in ((outputs, 0.01), (1, 1.0)))
        self.log_std = nn.Parameter(torch.full((head // 2,), config.log_std)) if log_std else None
        nn.init.orthogonal_(self.core.get_parameter("weight_hh_l0"))
        for layer, gain in ((self.head, 0.01), (self.value, 1.0)):
            if isinstance(layer, nn.Linear):
                nn.init.orthogonal_(layer.weight, gain)
                nn.init.zeros_(layer.bias)

    @staticmethod
    def _head(features: int, config: GRU, outputs: int, gain: float) -> nn.Module:
        if not config.heads:
            return nn.Linear(config.hidden, outputs)
        return network(features + config.hidden, config.heads, outputs, nn.Tanh, gain)

    @property
    def memory_size(self) -> int:
        """The number of elements of a trial's memory."""
        return 2 * self.hidden if self.lstm else self.hidden

    def forward(self, features: Tensor, memory: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        first = memory.unsqueeze(0)
        state = tuple(t.contiguous() for t in first.chunk(2, -1)) if self.lstm else first.contiguous()
        out, last = self.core(features, state)
        memory = (torch.cat(last, -1) if self.lstm else last).squeeze(0)
        if self.shows_features:
            out = torch.cat([features, out], -1)
        head = self.head(out)
        if self.log_std is not None:
            head = torch.cat([head, self.log_std.expand_as(head)], -1)
        return head, self.value(out).squeeze(-1), memory


@dataclass(frozen=True)
class GRU:
    """A gated recurrent unit with a policy head and a value head (RL²'s policy, Duan et al. 2016).

    The heads are linear in the memory. With ``heads``, they are tanh networks of these widths that also see the
    features of the step: the control of a simulated body depends on its present state. ``log_std`` is the initial log
    standard deviation of continuous actions.
    """

    hidden: int = 64
    heads: tuple[int, ...] = ()
    log_std: float = 0.0

    def __post_init__(self) -> None:
        at_least(1, **{"model.hidden": self.hidden})
        if any(width < 1 for width in self.heads):
            raise ConfigError(f"model.heads: {list(self.heads)}: every width must be at least 1")

    cell = "gru"

    def build_policy(self, observation: int, action: int, continuous: bool) -> nn.Module:
        return RecurrentPolicy(observation + action + 2, 2 * action if continuous else action, continuous, self)


@dataclass(frozen=True)
class LSTM(GRU):
    """A long short-term memory with a policy head and a value head."""

    cell = "lstm"
