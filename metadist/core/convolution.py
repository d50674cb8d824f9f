"""Convolution as a matrix product, for compiled shards.

Under ``vmap`` every task has its own kernel, and a convolution turns into one with as many groups as tasks, which no
library is quick at, forwards or backwards. As patches times kernel it is a batched matrix product in all of its
derivatives, forward mode included, and the gathering of patches fuses with whatever surrounds it.
"""

from __future__ import annotations

from typing import Any, Union

import torch
import torch.nn.functional as F
from torch import Tensor

Pair = Union[int, tuple[int, ...], list[int]]


def _pair(value: Pair) -> tuple[int, int]:
    if isinstance(value, int):
        return value, value
    return (value[0], value[-1])


def conv2d(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    stride: Pair = 1,
    padding: Any = 0,
    dilation: Pair = 1,
    groups: int = 1,
) -> Tensor:
    """``torch.nn.functional.conv2d`` of input [N, C, H, W] and weight [O, C, h, w]; what is out of the ordinary goes there."""
    if groups != 1 or isinstance(padding, str) or input.dim() != 4:
        return F.conv2d(input, weight, bias, stride, padding, dilation, groups)
    (down, right), (tall, wide), (apart, across) = _pair(stride), _pair(padding), _pair(dilation)
    rows, (outputs, channels, height, width) = input.shape[0], weight.shape
    high = (input.shape[2] + 2 * tall - apart * (height - 1) - 1) // down + 1
    broad = (input.shape[3] + 2 * wide - across * (width - 1) - 1) // right + 1
    # Channels last: a patch is then a few runs of memory, and so is its gradient.
    padded = F.pad(input.permute(0, 2, 3, 1), (0, 0, wide, wide, tall, tall))
    shifted = [
        padded[:, i * apart : i * apart + down * (high - 1) + 1 : down, j * across : j * across + right * (broad - 1) + 1 : right]
        for i in range(height)
        for j in range(width)
    ]
    patches = torch.cat(shifted, dim=-1).reshape(rows * high * broad, height * width * channels)
    kernel = weight.permute(2, 3, 1, 0).reshape(height * width * channels, outputs)
    result = patches @ kernel
    if bias is not None:
        result = result + bias
    return result.reshape(rows, high, broad, outputs).permute(0, 3, 1, 2)
