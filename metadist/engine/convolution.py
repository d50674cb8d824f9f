"""Compute convolutions, and their derivatives of every order, in compiled shards.

Under ``vmap`` every task has its own kernel, and a convolution becomes one with a group for every task, which libraries
compute slowly. PyTorch's own second derivative also exchanges batch and channels. Here a small convolution is a matrix
product of patches and kernel. A large one on a CPU is the library's convolution, one task after the other. It is linear
in the input, in the kernel and in the gradient of the output; the derivative of each of its three contractions is
another of them, so derivatives of every order are ordinary library calls.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Protocol, Union

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import FunctionCtx

#: PyTorch creates operators at run time and gives them no types.
aten: Any = torch.ops.aten

Pair = Union[int, tuple[int, ...], list[int]]

#: below this number of floating-point operations a library's convolution spends most of its time on preparations
SMALL = 7e6


def _pair(value: Pair) -> tuple[int, int]:
    if isinstance(value, int):
        return value, value
    return (value[0], value[-1])


@dataclass(frozen=True)
class _Geometry:
    """The shapes of ``input`` [N, C, H, W] and ``kernel`` [O, C, h, w], and a convolution's (row, column) settings."""

    stride: tuple[int, int]
    padding: tuple[int, int]
    dilation: tuple[int, int]
    input: tuple[int, ...]
    kernel: tuple[int, ...]

    @property
    def positions(self) -> tuple[int, int]:
        """Return the rows and columns of the output."""
        sizes = zip(self.input[2:], self.kernel[2:], self.stride, self.padding, self.dilation)
        high, broad = ((size + 2 * p - d * (k - 1) - 1) // s + 1 for size, k, s, p, d in sizes)
        return high, broad

    @property
    def left_over(self) -> tuple[int, int]:
        """Return the input's rows and columns that no stride reaches: a transposed convolution's ``output_padding``."""
        (down, right), (tall, wide), (apart, across) = self.stride, self.padding, self.dilation
        (high, broad), (height, width) = self.positions, self.kernel[2:]
        rows = self.input[2] + 2 * tall - apart * (height - 1) - 1 - (high - 1) * down
        return rows, self.input[3] + 2 * wide - across * (width - 1) - 1 - (broad - 1) * right

    def shape(self, name: str) -> tuple[int, ...]:
        """Return the shape of ``input``, ``kernel`` or ``output``."""
        if name == "output":
            return (self.input[0], self.kernel[0], *self.positions)
        return self.input if name == "input" else self.kernel

    @property
    def operations(self) -> int:
        """Return the number of floating-point operations."""
        high, broad = self.positions
        outputs, channels, height, width = self.kernel
        return 2 * self.input[0] * high * broad * outputs * channels * height * width


def conv2d(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    stride: Pair = 1,
    padding: Pair | str = 0,
    dilation: Pair = 1,
    groups: int = 1,
) -> Tensor:
    """Compute ``torch.nn.functional.conv2d`` (its signature) for input [N, C, H, W] and weight [O, C, h, w].

    Groups, named padding and inputs without a batch dimension go to PyTorch's own function.
    """
    if groups != 1 or isinstance(padding, str) or input.dim() != 4:
        return F.conv2d(input, weight, bias, stride, padding, dilation, groups)
    geometry = _Geometry(_pair(stride), _pair(padding), _pair(dilation), tuple(input.shape), tuple(weight.shape))
    # Autocast applies to the matrix products, not to a contraction.
    library = input.device.type == "cpu" and geometry.operations >= SMALL and not torch.is_autocast_enabled("cpu")
    if library:
        result = _contract(input, weight, "input", "kernel", geometry)
    else:
        result = _patches(input, weight, geometry)
    return result if bias is None else result + bias.view(-1, 1, 1)


def group_norm(
    input: Tensor, num_groups: int, weight: Tensor | None = None, bias: Tensor | None = None, eps: float = 1e-5
) -> Tensor:
    """``torch.nn.functional.group_norm``, whose derivatives need an input that is contiguous in memory."""
    return F.group_norm(input.contiguous(), num_groups, weight, bias, eps)


#: the functions of torch that compiled shards replace
REPLACEMENTS: Mapping[Callable[..., Any], Callable[..., Tensor]] = {F.conv2d: conv2d, F.group_norm: group_norm}


def _patches(input: Tensor, weight: Tensor, geometry: _Geometry) -> Tensor:
    """Compute the convolution as a matrix product; Inductor fuses the gathering of patches with its neighbours."""
    (down, right), (tall, wide), (apart, across) = geometry.stride, geometry.padding, geometry.dilation
    (rows, *_), (outputs, channels, height, width), (high, broad) = geometry.input, geometry.kernel, geometry.positions
    # Channels last: a patch and its gradient are then few pieces of contiguous memory.
    padded = F.pad(input.permute(0, 2, 3, 1), (0, 0, wide, wide, tall, tall))
    shifted = [
        padded[
            :,
            i * apart : i * apart + down * (high - 1) + 1 : down,
            j * across : j * across + right * (broad - 1) + 1 : right,
        ]
        for i in range(height)
        for j in range(width)
    ]
    patches = torch.cat(shifted, dim=-1).reshape(rows * high * broad, height * width * channels)
    kernel = weight.permute(2, 3, 1, 0).reshape(height * width * channels, outputs)
    return (patches @ kernel).reshape(rows, high, broad, outputs).permute(0, 3, 1, 2)


class _Saved(FunctionCtx):
    """Autograd's context, with the attributes that ``_Contraction`` sets and those that PyTorch leaves untyped."""

    left: str
    right: str
    geometry: _Geometry
    saved_tensors: tuple[Tensor, Tensor]
    needs_input_grad: tuple[bool, ...]


class _Batch(Protocol):
    """The batch of a ``vmap``, as PyTorch passes it."""

    batch_size: int


class _Contraction(torch.autograd.Function):
    """Sum input · kernel · output with one of the three left out; the result has the shape of the one left out.

    ``left`` and ``right`` name the two tensors that are given.
    """

    @staticmethod
    def forward(a: Tensor, b: Tensor, left: str, right: str, geometry: _Geometry) -> Tensor:
        given = {
            left: a.contiguous(memory_format=torch.channels_last),
            right: b.contiguous(memory_format=torch.channels_last),
        }
        third, stride, padding, dilation = _third(left, right), geometry.stride, geometry.padding, geometry.dilation
        # The operator reads only the shape of the third tensor.
        given[third] = torch.empty(
            geometry.shape(third), dtype=a.dtype, device=a.device, memory_format=torch.channels_last
        )
        x, w, y = given["input"], given["kernel"], given["output"]
        results: tuple[Tensor, Tensor, Tensor]
        if third == "output":
            # The derivative of a transposed convolution: Inductor passes on its operands in their own layout. Inductor
            # would copy a convolution's operands to channels first, and the library would copy them back.
            results = aten.convolution_backward(
                x, y, w, None, stride, padding, dilation, True, geometry.left_over, 1, (True, False, False)
            )
            return results[0]
        wanted = (third == "input", third == "kernel", False)
        results = aten.convolution_backward(y, x, w, None, stride, padding, dilation, False, (0, 0), 1, wanted)
        return results[wanted.index(True)]

    @staticmethod
    def setup_context(ctx: _Saved, inputs: tuple[Tensor, Tensor, str, str, _Geometry], output: Tensor) -> None:
        a, b, ctx.left, ctx.right, ctx.geometry = inputs
        ctx.save_for_backward(a, b)
        ctx.save_for_forward(a, b)

    @staticmethod
    def backward(ctx: _Saved, gradient: Tensor) -> tuple[Tensor | None, Tensor | None, None, None, None]:
        a, b = ctx.saved_tensors
        third, (needs_a, needs_b, *_) = _third(ctx.left, ctx.right), ctx.needs_input_grad
        of_a = _contract(b, gradient, ctx.right, third, ctx.geometry) if needs_a else None
        of_b = _contract(a, gradient, ctx.left, third, ctx.geometry) if needs_b else None
        return of_a, of_b, None, None, None

    @staticmethod
    def jvp(ctx: _Saved, of_a: Tensor | None, of_b: Tensor | None, *_: None) -> Tensor:
        a, b = ctx.saved_tensors
        terms = [_contract(of_a, b, ctx.left, ctx.right, ctx.geometry)] if of_a is not None else []
        terms += [_contract(a, of_b, ctx.left, ctx.right, ctx.geometry)] if of_b is not None else []
        return sum(terms[1:], terms[0])

    @staticmethod
    def vmap(
        info: _Batch,
        in_dims: tuple[int | None, ...],
        a: Tensor,
        b: Tensor,
        left: str,
        right: str,
        geometry: _Geometry,
    ) -> tuple[Tensor, int]:
        def of(t: Tensor, dim: int | None, task: int) -> Tensor:
            return t if dim is None else t.select(dim, task)

        each = [
            _contract(of(a, in_dims[0], i), of(b, in_dims[1], i), left, right, geometry) for i in range(info.batch_size)
        ]
        return torch.stack([t.permute(0, 2, 3, 1) for t in each]).permute(0, 1, 4, 2, 3), 0


def _contract(a: Tensor, b: Tensor, left: str, right: str, geometry: _Geometry) -> Tensor:
    result: Tensor = _Contraction.apply(a, b, left, right, geometry)  # type: ignore[no-untyped-call]
    return result


def _third(left: str, right: str) -> str:
    (name,) = {"input", "kernel", "output"} - {left, right}
    return name
