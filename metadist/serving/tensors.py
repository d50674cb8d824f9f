"""Convert tensors from and to packed protobuf, Arrow IPC and JSON. Shapes are checked before data is copied."""

from __future__ import annotations

import base64
import binascii
import math
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor

from metadist.core.signature import InvalidInput, Kinds, parts_of
from metadist.core.tree import Tree, named, of_names
from metadist.serving import adapt_pb2 as pb
from metadist.wire.codec import RejectedError
from metadist.wire.plain import decode_plain, encode_plain

_DTYPES = {"float32": "<f4", "float64": "<f8", "int64": "<i8", "int32": "<i4", "uint8": "|u1", "bool": "|b1"}
CheckShape = Callable[[list[int]], None]
"""Raises ``InvalidInput`` for a wrong shape."""
CheckPart = Callable[[str, list[int]], None]
"""(name of a tensor in a tree, shape): raises ``InvalidInput`` for a wrong shape."""


def from_message(name: str, message: pb.Tensor, check: CheckShape) -> Tensor:
    """Return the tensor of a message, in memory of its own. ``check`` is called with the shape first."""
    if message.arrow:
        if message.data:
            raise InvalidInput(f"{name}: give data or arrow, not both")
        return _from_arrow(name, message.arrow, list(message.shape), check)
    return _packed(name, list(message.shape), message.dtype, message.data, check)


def to_message(tensor: Tensor, arrow: bool = False) -> pb.Tensor:
    """Return a tensor as a message: packed, or as an Arrow IPC stream."""
    tensor = tensor.detach().cpu().contiguous()
    if arrow:
        return pb.Tensor(arrow=encode_plain(tensor.to(torch.uint8) if tensor.dtype == torch.bool else tensor))
    dtype = str(tensor.dtype).removeprefix("torch.")
    if dtype not in _DTYPES:
        raise InvalidInput(f"dtype {dtype} cannot be sent; expected one of {', '.join(_DTYPES)}")
    return pb.Tensor(
        shape=list(tensor.shape), dtype=dtype, data=tensor.numpy().astype(_DTYPES[dtype], copy=False).tobytes()
    )


def tree_from_message(name: str, message: pb.Tensor, kinds: Kinds, check: CheckPart) -> Tree:
    """Return the tensors of a message, which must be those of ``kinds``. ``check`` is called with each shape first."""
    given = dict(message.tensors) or {"": message}
    if message.tensors and (message.shape or message.dtype or message.data or message.arrow):
        raise InvalidInput(f"{name}: give one tensor, or several as tensors, not both")
    return of_names(
        {
            part: from_message(f"{name}.{part}" if part else name, tensor, partial(check, part))
            for part, tensor in parts_of(name, given, kinds).items()
        }
    )


def tree_to_message(tree: Tree, arrow: bool = False) -> pb.Tensor:
    """Return a tensor, or a dict or tuple of tensors, as a message."""
    tensors = named(tree)
    if list(tensors) == [""]:
        return to_message(tree, arrow)
    return pb.Tensor(tensors={name: to_message(tensor, arrow) for name, tensor in tensors.items()})


def from_reply(message: pb.Tensor) -> Tree:
    """Return the tensor, or the dict or tuple of tensors, of a server's reply."""
    given = dict(message.tensors) or {"": message}
    try:
        return of_names({name: from_message("the answer", t, lambda shape: None) for name, t in given.items()})
    except ValueError as error:
        raise InvalidInput(f"the answer holds no tree of tensors: {error}") from None


def tree_from_json(name: str, value: Any, kinds: Kinds, check: CheckPart) -> Tree:
    """Return the tensors of JSON, which must be those of ``kinds``: an object for a dict, a list for a tuple.

    Lists of whole numbers become floating-point numbers where the model takes these: JSON writes 1.0 as 1, too.
    """

    def tensor(part: str, sent: Any) -> Tensor:
        found = from_json(f"{name}.{part}" if part else name, sent, partial(check, part))
        written = kinds[part].dtype.is_floating_point and not isinstance(sent, dict) and found.dtype != torch.bool
        return found.double() if written else found

    given = {"": value} if list(kinds) == [""] else _entries(name, value, list(kinds))
    return of_names({part: tensor(part, sent) for part, sent in parts_of(name, given, kinds).items()})


def _entries(name: str, value: Any, expected: Sequence[str]) -> dict[str, Any]:
    """Return the entries of objects and lists by name, as deep as the names in ``expected``."""
    if expected == [""]:
        return {"": value}
    entries = dict(enumerate(value)) if isinstance(value, list) else value
    if not isinstance(entries, dict):
        raise InvalidInput(f"{name}: expected tensors {', '.join(expected)}")
    found = {}
    for key, entry in entries.items():
        below = [n.removeprefix(str(key)).removeprefix(".") for n in expected if n.split(".")[0] == str(key)]
        for rest, tensor in _entries(f"{name}.{key}", entry, below).items() if below else [("", entry)]:
            found[f"{key}.{rest}" if rest else str(key)] = tensor
    return found


def from_json(name: str, value: Any, check: CheckShape) -> Tensor:
    """Return a tensor from nested lists of numbers or of truth values, or from a packed tensor in base64."""
    if isinstance(value, dict):
        shape, dtype, data = value.get("shape"), value.get("dtype", ""), value.get("data", "")
        if unknown := sorted(str(key)[:40] for key in value.keys() - {"shape", "dtype", "data"}):
            raise InvalidInput(f"{name}: unknown key '{unknown[0]}'; a packed tensor has shape, dtype and data")
        if not (
            isinstance(shape, list)
            and all(type(n) is int for n in shape)
            and isinstance(dtype, str)
            and isinstance(data, str)
        ):
            raise InvalidInput(f'{name}: expected {{"shape": [N, …], "dtype": "float32", "data": base64}}')
        try:
            return _packed(name, shape, dtype, base64.b64decode(data, validate=True), check)
        except (binascii.Error, ValueError):
            raise InvalidInput(f"{name}: data is not base64") from None
    shape, level = [], value
    while isinstance(level, list) and len(shape) <= 8:
        shape.append(len(level))
        level = level[0] if level else None
    if not shape or len(shape) > 8:
        raise InvalidInput(f"{name}: expected nested lists of numbers")
    check(shape)
    flat = value
    for width in shape[1:]:
        if not all(isinstance(row, list) and len(row) == width for row in flat):
            raise InvalidInput(f"{name}: the lists have different lengths")
        flat = [item for row in flat for item in row]
    kinds = {type(number) for number in flat}
    if kinds == {bool}:
        return torch.tensor(flat).view(shape)
    if not kinds <= {int, float}:
        raise InvalidInput(
            f"{name}: expected numbers, found {', '.join(sorted(k.__name__ for k in kinds - {int, float}))}"
        )
    try:
        return torch.tensor(flat, dtype=torch.int64 if kinds == {int} else torch.float64).view(shape)
    except (OverflowError, RuntimeError, ValueError):
        raise InvalidInput(f"{name}: a number is too large") from None


def _packed(name: str, shape: list[int], dtype: str, data: bytes, check: CheckShape) -> Tensor:
    if dtype not in _DTYPES:
        raise InvalidInput(f"{name}: dtype '{dtype[:20]}' is not one of {', '.join(_DTYPES)}")
    _check_dimensions(name, shape)
    check(shape)
    kind = np.dtype(_DTYPES[dtype])
    if len(data) != math.prod(shape) * kind.itemsize:
        raise InvalidInput(
            f"{name}: shape {shape} of {dtype} takes {math.prod(shape) * kind.itemsize} bytes, but data has {len(data)}"
        )
    if dtype == "bool" and not set(data) <= {0, 1}:
        raise InvalidInput(f"{name}: a truth value is neither 0 nor 1")
    return torch.from_numpy(np.frombuffer(data, kind).astype(kind.newbyteorder("=")).reshape(shape))


def _from_arrow(name: str, data: bytes, shape: list[int], check: CheckShape) -> Tensor:
    if shape:
        _check_dimensions(name, shape)
        check(shape)
    try:
        tensor = decode_plain(data, most=math.prod(shape) if shape else len(data))
    except RejectedError as error:
        raise InvalidInput(f"{name}: {error.reason}") from None
    if not shape:
        check(list(tensor.shape))
        return tensor
    if tensor.numel() != math.prod(shape):
        raise InvalidInput(
            f"{name}: shape {shape} has {math.prod(shape)} numbers, but the Arrow column has {tensor.numel()}"
        )
    return tensor.view(shape)


def _check_dimensions(name: str, shape: list[int]) -> None:
    if not 1 <= len(shape) <= 8 or any(not 0 <= n < 2**31 for n in shape):
        raise InvalidInput(f"{name}: shape {str(shape[:9])[:80]} is invalid; expected [N, …] with at most 8 dimensions")
