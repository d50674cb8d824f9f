from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn

from metadist.core.errors import ConfigError, one_of


@dataclass(frozen=True)
class Transformer:
    """A pre-norm transformer encoder over the patches of an image (Dosovitskiy et al. 2021), then a linear head.

    Tokens are the ``patch`` × ``patch`` squares of an image [channels, height, width], or the numbers of a vector, with
    learned positions. ``pooling: mean`` averages the last block's tokens, ``cls`` reads off a learned token of its own.
    Without outputs it ends in what is pooled. ``dropout`` is for attention weights and for the output of every branch.
    """

    patch: int = 7
    width: int = 64
    depth: int = 2
    heads: int = 4
    mlp_ratio: float = 2.0
    dropout: float = 0.0
    pooling: Literal["mean", "cls"] = "mean"

    def __post_init__(self) -> None:
        one_of("model.pooling", self.pooling, ("mean", "cls"))
        for name in ("patch", "width", "depth", "heads"):
            if getattr(self, name) < 1:
                raise ConfigError(f"model.{name} = {getattr(self, name)}: must be at least 1")
        if self.width % self.heads:
            raise ConfigError(f"model.width = {self.width}: must be a multiple of model.heads = {self.heads}")
        if int(self.width * self.mlp_ratio) < 1:
            raise ConfigError(
                f"model.mlp_ratio = {self.mlp_ratio}: leaves no hidden unit of model.width = {self.width}"
            )
        if not 0 <= self.dropout < 1:
            raise ConfigError(f"model.dropout = {self.dropout}: must be at least 0 and below 1")

    def build(self, input_shape: tuple[int, ...], outputs: int | None) -> nn.Module:
        if len(input_shape) not in (1, 3):
            raise ConfigError(
                f"model 'transformer' needs images [channels, height, width] or vectors [size]; these tasks' inputs are {list(input_shape)}"
            )
        if len(input_shape) == 3 and (input_shape[1] % self.patch or input_shape[2] % self.patch):
            raise ConfigError(
                f"model.patch = {self.patch}: an image of {input_shape[1]}×{input_shape[2]} can't be cut into "
                f"{self.patch}×{self.patch} squares; it must divide height and width"
            )
        return _Transformer(input_shape, outputs, self)


class _Transformer(nn.Module):
    def __init__(self, input_shape: tuple[int, ...], outputs: int | None, config: Transformer) -> None:
        super().__init__()
        self.patch, width = config.patch, config.width
        if len(input_shape) == 3:
            channels, height, columns = input_shape
            tokens, size = height // self.patch * (columns // self.patch), channels * self.patch**2
        else:
            tokens, size = input_shape[0], 1
        self.embedding = nn.Linear(size, width)
        self.positions = nn.Parameter(torch.randn(tokens, width) * 0.02)
        self.cls = nn.Parameter(torch.randn(1, width) * 0.02) if config.pooling == "cls" else None
        self.blocks = nn.Sequential(*(_Block(config) for _ in range(config.depth)))
        self.norm = nn.LayerNorm(width)
        self.head = nn.Identity() if outputs is None else nn.Linear(width, outputs)

    def forward(self, x: Tensor) -> Tensor:
        tokens = self.embedding(self.cut(x)) + self.positions
        if self.cls is not None:
            tokens = torch.cat([self.cls.expand(x.shape[0], 1, -1), tokens], dim=1)
        tokens = self.norm(self.blocks(tokens))
        return self.head(tokens.mean(1) if self.cls is None else tokens[:, 0])

    def cut(self, x: Tensor) -> Tensor:
        """[N, channels, height, width] → [N, patches, channels · patch²], or [N, D] → [N, D, 1]."""
        if x.dim() == 2:
            return x.unsqueeze(-1)
        p = self.patch
        squares = x.unflatten(3, (-1, p)).unflatten(2, (-1, p))  # [N, channels, rows, p, columns, p]
        return squares.permute(0, 2, 4, 1, 3, 5).flatten(3).flatten(1, 2)


class _Block(nn.Module):
    def __init__(self, config: Transformer) -> None:
        super().__init__()
        width, hidden = config.width, int(config.width * config.mlp_ratio)
        self.attention_norm, self.attention = nn.LayerNorm(width), _Attention(width, config.heads, config.dropout)
        self.mlp_norm = nn.LayerNorm(width)
        self.mlp = nn.Sequential(nn.Linear(width, hidden), nn.GELU(), nn.Linear(hidden, width))
        self.dropout = nn.Dropout(config.dropout)

    def forward(self, tokens: Tensor) -> Tensor:
        tokens = tokens + self.dropout(self.attention(self.attention_norm(tokens)))
        return tokens + self.dropout(self.mlp(self.mlp_norm(tokens)))


class _Attention(nn.Module):
    """Multi-head self-attention of products and a softmax alone: torch's fused kernels know no second derivative, and the
    dropout inside ``nn.MultiheadAttention`` can't be keyed by the task."""

    def __init__(self, width: int, heads: int, dropout: float) -> None:
        super().__init__()
        self.heads = heads
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.dropout = nn.Dropout(dropout)

    def forward(self, tokens: Tensor) -> Tensor:
        q, k, v = (
            self.qkv(tokens).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        )  # each [N, heads, tokens, width / heads]
        weights = self.dropout((q @ k.mT * q.shape[-1] ** -0.5).softmax(-1))
        return self.out((weights @ v).transpose(1, 2).flatten(2))
