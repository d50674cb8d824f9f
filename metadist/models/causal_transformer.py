"""A causal transformer as a policy, whose memory is the keys and values of a fixed window of steps."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from metadist.core.errors import ConfigError


@dataclass(frozen=True)
class CausalTransformer:
    """A pre-norm transformer over the steps of a trial; every block attends to the last ``window`` of them, this one included.

    The memory holds each block's keys and values of ``window`` − 1 steps (Dai et al. 2019, "Transformer-XL"), so that a step costs
    the same however long the trial, and the whole sequence at once comes to what step after step does. What is
    known of a step's place is how long ago it was: a learned bias per head and distance (Shaw et al. 2018).
    """

    width: int = 64
    depth: int = 2
    heads: int = 4
    mlp_ratio: float = 2.0
    window: int = 64

    def __post_init__(self) -> None:
        for name in ("width", "depth", "heads", "window"):
            if getattr(self, name) < 1:
                raise ConfigError(f"model.{name}: {getattr(self, name)} is below 1")
        if self.width % self.heads:
            raise ConfigError(f"model.width: {self.width} is no multiple of model.heads = {self.heads}")
        if int(self.width * self.mlp_ratio) < 1:
            raise ConfigError(f"model.mlp_ratio: {self.mlp_ratio} leaves no hidden unit of model.width = {self.width}")

    def build_policy(self, observation: int, action: int, continuous: bool) -> nn.Module:
        return TransformerPolicy(observation + action + 2, 2 * action if continuous else action, continuous, self)


class TransformerPolicy(nn.Module):
    """features [B, T, F], memory [B, M] → head [B, T, A], value [B, T], memory [B, M]; separate linear heads.

    A step of memory is, for each block, keys [width] and values [width]; then 1, or 0 where there was no step yet.
    """

    sees_history = True

    def __init__(self, features: int, head: int, log_std: bool, config: CausalTransformer) -> None:
        super().__init__()
        self.past, self.step_size = config.window - 1, 2 * config.width * config.depth + 1
        self.embedding = nn.Linear(features, config.width)
        self.blocks = nn.ModuleList(_Block(config) for _ in range(config.depth))
        self.norm = nn.LayerNorm(config.width)
        self.head, self.value = nn.Linear(config.width, head // 2 if log_std else head), nn.Linear(config.width, 1)
        self.log_std = nn.Parameter(torch.zeros(head // 2)) if log_std else None
        nn.init.orthogonal_(self.head.weight, 0.01)
        nn.init.zeros_(self.head.bias)
        nn.init.orthogonal_(self.value.weight, 1.0)
        nn.init.zeros_(self.value.bias)

    @property
    def memory_size(self) -> int:
        return self.past * self.step_size

    def forward(self, features: Tensor, memory: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        batch, length = features.shape[:2]
        past = memory.view(batch, self.past, self.step_size)
        there = torch.cat([past[..., -1], past.new_ones(batch, length)], 1)
        ago = self.past + torch.arange(length, device=memory.device).unsqueeze(1) - torch.arange(self.past + length, device=memory.device)
        seen = ((ago >= 0) & (ago <= self.past)) & (there > 0).unsqueeze(1)  # [B, T, past + T]
        x, kept = self.embedding(features), []
        caches = past[..., :-1].chunk(len(self.blocks), -1)
        for block, cache in zip(self.blocks, caches):
            x, cache = block(x, cache, ago.clamp(0, self.past), seen)
            kept.append(cache)
        memory = torch.cat([*kept, there.unsqueeze(-1)], -1)[:, length:].flatten(1)
        x = self.norm(x)
        head = self.head(x)
        if self.log_std is not None:
            head = torch.cat([head, self.log_std.expand_as(head)], -1)
        return head, self.value(x).squeeze(-1), memory


class _Block(nn.Module):
    """x [B, T, D], cache [B, past, 2 D] → x, cache [B, past + T, 2 D]. ``ago`` [T, past + T]: how many steps ago each was."""

    def __init__(self, config: CausalTransformer) -> None:
        super().__init__()
        width, hidden = config.width, int(config.width * config.mlp_ratio)
        self.heads = config.heads
        self.attention_norm, self.qkv, self.out = nn.LayerNorm(width), nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.distance = nn.Parameter(torch.zeros(config.heads, config.window))
        self.mlp_norm = nn.LayerNorm(width)
        self.mlp = nn.Sequential(nn.Linear(width, hidden), nn.GELU(), nn.Linear(hidden, width))

    def forward(self, x: Tensor, cache: Tensor, ago: Tensor, seen: Tensor) -> tuple[Tensor, Tensor]:
        width = x.shape[-1]
        query, new = self.qkv(self.attention_norm(x)).split([width, 2 * width], -1)
        cache = torch.cat([cache, new], 1)
        q, k, v = (t.unflatten(-1, (self.heads, -1)).transpose(1, 2) for t in (query, *cache.chunk(2, -1)))  # [B, heads, steps, D / heads]
        # A product and a softmax alone: torch's fused kernels know no second derivative, which TRPO needs.
        logits = q @ k.mT * q.shape[-1] ** -0.5 + self.distance[:, ago]
        weights = logits.masked_fill(~seen.unsqueeze(1), float("-inf")).softmax(-1)
        x = x + self.out((weights @ v).transpose(1, 2).flatten(2))
        return x + self.mlp(self.mlp_norm(x)), cache
