"""Compute recurrent layers and attention from operators that differentiate twice and run under ``vmap``.

Torch's recurrent kernels have no batching rule, and cuDNN's no second derivative; its fused attention has no second
derivative. The functions here have the parameters of the functions of torch that they replace.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

Memory = tuple[Tensor, ...]
"""The state of a cell: (h,), or (h, c) of an LSTM, each [B, H]."""
Cell = Callable[[Tensor, Memory, Tensor, "Tensor | None"], Memory]
"""(the input's part of the gates [B, G], memory, recurrent weight [G, H], recurrent bias [G]) → the next memory."""

#: the start of the message of ``NotImplementedError`` for packed sequences
PACKED = "packed sequence"


def is_recurrent(module: nn.Module) -> bool:
    """Return whether ``module`` has a recurrent layer or cell of torch."""
    return any(isinstance(m, (nn.RNNBase, nn.RNNCellBase)) for m in module.modules())


# Cells ----------------------------------------------------------------------------------------------------------------


def _lstm(given: Tensor, memory: Memory, weight: Tensor, bias: Tensor | None) -> Memory:
    """Hochreiter & Schmidhuber 1997 with forget gates (Gers et al. 2000), in the order of ``torch.nn.LSTM``."""
    h, c = memory
    i, f, g, o = (given + F.linear(h, weight, bias)).chunk(4, -1)
    c = torch.sigmoid(f) * c + torch.sigmoid(i) * torch.tanh(g)
    return torch.sigmoid(o) * torch.tanh(c), c


def _gru(given: Tensor, memory: Memory, weight: Tensor, bias: Tensor | None) -> Memory:
    """Cho et al. 2014, in the form of ``torch.nn.GRU``: the reset gate multiplies the recurrent part with its bias."""
    (h,) = memory
    (r, z, n), (rh, zh, nh) = given.chunk(3, -1), F.linear(h, weight, bias).chunk(3, -1)
    new = torch.tanh(n + torch.sigmoid(r + rh) * nh)
    return (new + torch.sigmoid(z + zh) * (h - new),)


def _elman(
    activation: Callable[[Tensor], Tensor], given: Tensor, memory: Memory, weight: Tensor, bias: Tensor | None
) -> Memory:
    return (activation(given + F.linear(memory[0], weight, bias)),)


_CELLS: dict[str, Cell] = {
    "lstm": _lstm,
    "gru": _gru,
    "rnn_tanh": partial(_elman, torch.tanh),
    "rnn_relu": partial(_elman, torch.relu),
}


# Layers ---------------------------------------------------------------------------------------------------------------


def _unrolled(
    cell: Cell, x: Tensor, memory: Memory, weights: Sequence[Tensor], biases: bool, backwards: bool
) -> tuple[Tensor, Memory]:
    """Run one direction of one layer over x [T, B, F]; return its outputs [T, B, H] and its last memory."""
    input_weight, weight, *rest = weights
    input_bias, bias = rest[:2] if biases else (None, None)
    projection = rest[-1] if len(rest) % 2 else None  # of an LSTM with proj_size
    given = F.linear(x, input_weight, input_bias).unbind(0)
    outputs = []
    for part in reversed(given) if backwards else given:
        h, *others = cell(part, memory, weight, bias)
        memory = (h if projection is None else F.linear(h, projection), *others)
        outputs.append(memory[0])
    return torch.stack(outputs[::-1] if backwards else outputs), memory


@dataclass(frozen=True)
class _Layers:
    """The settings of recurrent layers, in the order in which ``torch.lstm`` and its kin take them."""

    biases: bool
    layers: int
    dropout: float
    training: bool
    bidirectional: bool
    batch_first: bool

    def __call__(self, cell: Cell, input: Tensor, memory: Memory, weights: Sequence[Tensor]) -> tuple[Tensor, ...]:
        """Return the outputs, and the last memory of every layer and direction."""
        x = input.transpose(0, 1) if self.batch_first else input
        directions = 2 if self.bidirectional else 1
        each = len(weights) // (self.layers * directions)
        last: list[Memory] = []
        for layer in range(self.layers):
            if layer:
                x = F.dropout(x, self.dropout, self.training)
            outputs = []
            for place in range(layer * directions, (layer + 1) * directions):
                own, start = weights[place * each : (place + 1) * each], tuple(m[place] for m in memory)
                out, end = _unrolled(cell, x, start, own, self.biases, backwards=place % directions == 1)
                outputs.append(out)
                last.append(end)
            x = torch.cat(outputs, -1)
        return x.transpose(0, 1) if self.batch_first else x, *(torch.stack(parts) for parts in zip(*last))


def _recurrent(name: str) -> Callable[..., tuple[Tensor, ...]]:
    def layers(input: Tensor, state: Any, weights: Any, *settings: Any) -> tuple[Tensor, ...]:
        if isinstance(weights, Tensor) or (name == "lstm" and isinstance(state, Tensor)):  # (data, batch sizes, …)
            _refuse_packed()
        memory = tuple(state) if name == "lstm" else (state,)
        return _Layers(*settings)(_CELLS[name], input, memory, weights)

    return layers


def _one_step(name: str) -> Callable[..., Any]:
    def cell(
        input: Tensor,
        state: Any,
        input_weight: Tensor,
        weight: Tensor,
        input_bias: Tensor | None = None,
        bias: Tensor | None = None,
    ) -> Any:
        memory = tuple(state) if name == "lstm" else (state,)
        after = _CELLS[name](F.linear(input, input_weight, input_bias), memory, weight, bias)
        return after if name == "lstm" else after[0]

    return cell


def _refuse_packed(*_: Any, **__: Any) -> Any:
    raise NotImplementedError(PACKED)


def _by_products(function: Callable[..., Any]) -> Callable[..., Any]:
    def computed(*args: Any, **kwargs: Any) -> Any:
        with sdpa_kernel(SDPBackend.MATH):
            return function(*args, **kwargs)

    return computed


#: PyTorch gives the functions of this module no types.
_functions: Any = torch._VF

#: recurrent layers and cells, unrolled over time
RECURRENT: dict[Callable[..., Any], Callable[..., Any]] = {
    **{getattr(_functions, name): _recurrent(name) for name in _CELLS},
    **{getattr(_functions, f"{name}_cell"): _one_step(name) for name in _CELLS},
    _functions._pack_padded_sequence: _refuse_packed,
}
#: attention from products and a softmax, in place of fused kernels
ATTENTION: dict[Callable[..., Any], Callable[..., Any]] = {
    function: _by_products(function) for function in (F.scaled_dot_product_attention, F.multi_head_attention_forward)
}
