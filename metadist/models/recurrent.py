"""Recurrent policies: GRU and LSTM."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from metadist.core.errors import ConfigError


class RecurrentPolicy(nn.Module):
    """features [B, T, F], memory [B, M] → head [B, T, A], value [B, T], memory [B, M]; separate linear heads."""

    sees_history = True

    def __init__(self, cell: str, features: int, head: int, hidden: int, log_std: bool) -> None:
        super().__init__()
        self.hidden, self.lstm = hidden, cell == "lstm"
        self.core: nn.RNNBase = (nn.LSTM if self.lstm else nn.GRU)(features, hidden, batch_first=True)
        self.head, self.value = nn.Linear(hidden, head // 2 if log_std else head), nn.Linear(hidden, 1)
        self.log_std = nn.Parameter(torch.zeros(head // 2)) if log_std else None
        nn.init.orthogonal_(self.core.get_parameter("weight_hh_l0"))
        nn.init.orthogonal_(self.head.weight, 0.01)
        nn.init.zeros_(self.head.bias)
        nn.init.orthogonal_(self.value.weight, 1.0)
        nn.init.zeros_(self.value.bias)

    @property
    def memory_size(self) -> int:
        return 2 * self.hidden if self.lstm else self.hidden

    def forward(self, features: Tensor, memory: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        first = memory.unsqueeze(0)
        state = tuple(t.contiguous() for t in first.chunk(2, -1)) if self.lstm else first.contiguous()
        out, last = self.core(features, state)
        memory = (torch.cat(last, -1) if self.lstm else last).squeeze(0)
        head = self.head(out)
        if self.log_std is not None:
            head = torch.cat([head, self.log_std.expand_as(head)], -1)
        return head, self.value(out).squeeze(-1), memory


@dataclass(frozen=True)
class GRU:
    """A gated recurrent unit with a policy head and a value head (RL²'s policy, Duan et al. 2016)."""

    hidden: int = 64

    def __post_init__(self) -> None:
        if self.hidden < 1:
            raise ConfigError(f"model.hidden: {self.hidden} is below 1")

    cell = "gru"

    def build_policy(self, observation: int, action: int, continuous: bool) -> nn.Module:
        return RecurrentPolicy(self.cell, observation + action + 2, 2 * action if continuous else action, self.hidden, continuous)


@dataclass(frozen=True)
class LSTM(GRU):
    """A long short-term memory with a policy head and a value head."""

    cell = "lstm"
