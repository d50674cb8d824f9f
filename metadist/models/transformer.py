"""A transformer encoder over image patches or numbers."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn

from metadist.core.errors import ConfigError, at_least, one_of


@dataclass(frozen=True)
class Transformer:
    """A pre-norm transformer encoder over the patches of an image (Dosovitskiy et al. 2021), then a linear head.

    Tokens are the ``patch`` × ``patch`` squares of an image [channels, height, width], or the numbers of a vector, with
    learned positions. ``pooling: mean`` averages the last block's tokens; ``cls`` reads an extra, learned token.
    Without ``outputs`` it returns the pooled token. ``dropout`` applies to attention weights and to every branch.
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
        at_least(1, **{f"model.{n}": getattr(self, n) for n in ("patch", "width", "depth", "heads")})
        if self.width % self.heads:
            raise ConfigError(f"model.width: {self.width} is not a multiple of model.heads = {self.heads}")
        if int(self.width * self.mlp_ratio) < 1:
            raise ConfigError(
                f"model.mlp_ratio: {self.mlp_ratio} times model.width = {self.width} is below 1; use a larger ratio"
            )
        if not 0 <= self.dropout < 1:
            raise ConfigError(f"model.dropout: {self.dropout} is not in [0, 1)")

    def build(self, input_shape: tuple[int, ...], outputs: int | None) -> nn.Module:
        if len(input_shape) not in (1, 3):
            raise ConfigError(
                "model 'transformer' needs images [channels, height, width] or vectors [size]; "
                f"these tasks' inputs are {list(input_shape)}"
            )
        if len(input_shape) == 3 and (input_shape[1] % self.patch or input_shape[2] % self.patch):
            raise ConfigError(
                f"model.patch: {self.patch} does not divide height and width of an image of "
                f"{input_shape[1]}×{input_shape[2]}"
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
        outputs: Tensor = self.head(tokens.mean(1) if self.cls is None else tokens[:, 0])
        return outputs

    def cut(self, x: Tensor) -> Tensor:
        """Cut [N, channels, height, width] to [N, patches, channels · patch²], or vectors [N, D] to [N, D, 1]."""
        if x.dim() == 2:
            return x.unsqueeze(-1)
        p = self.patch
        squares: Tensor = x.unflatten(3, (-1, p)).unflatten(2, (-1, p))  # [N, channels, rows, p, columns, p]
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
        branch: Tensor = self.dropout(self.mlp(self.mlp_norm(tokens)))
        return tokens + branch


class _Attention(nn.Module):
    """Multi-head self-attention from products and a softmax.

    Torch's fused kernels have no second derivative, and the dropout of ``nn.MultiheadAttention`` has no key.
    """

    def __init__(self, width: int, heads: int, dropout: float) -> None:
        super().__init__()
        self.heads = heads
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.dropout = nn.Dropout(dropout)

    def forward(self, tokens: Tensor) -> Tensor:
        # each [N, heads, tokens, width / heads]
        q, k, v = self.qkv(tokens).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        weights = self.dropout((q @ k.mT * q.shape[-1] ** -0.5).softmax(-1))
        outputs: Tensor = self.out((weights @ v).transpose(1, 2).flatten(2))
        return outputs
