"""Named tensors and a JSON header as one Arrow IPC stream in a frame, and back. The decoder trusts no bytes.

The stream is one record batch: every tensor [rows, …] is a column of fixed-width numbers, or of fixed-size lists of
them, without nulls, compression or dictionaries. Any Arrow reader can open it. The schema's metadata hold the header.
"""

from __future__ import annotations

import json
import math
import reprlib
import struct
from collections.abc import Mapping
from typing import Any

import pyarrow as pa
import pyarrow.ipc as ipc
import torch
from torch import Tensor

from metadist.wire.frame import FrameError, gather, scatter, unframe

_KEY = b"metadist"
#: torch dtype → (the dtype its bits travel as, Arrow's name for that)
_WIRE: dict[torch.dtype, tuple[torch.dtype, pa.DataType]] = {
    torch.float64: (torch.float64, pa.float64()),
    torch.float32: (torch.float32, pa.float32()),
    torch.float16: (torch.float16, pa.float16()),
    torch.bfloat16: (torch.uint16, pa.uint16()),
    torch.int64: (torch.int64, pa.int64()),
    torch.int32: (torch.int32, pa.int32()),
    torch.uint8: (torch.uint8, pa.uint8()),
    torch.bool: (torch.uint8, pa.uint8()),
}
_DTYPES = {str(d).removeprefix("torch."): d for d in _WIRE}
_MAX_LIST = 2**31 - 1


class RejectedError(Exception):
    """The bytes that arrived must not be used. ``reason`` has the same words for the same cause."""

    def __init__(self, reason: str) -> None:
        super().__init__(reason)
        self.reason = reason


def short(value: object) -> str:
    """Return a ``repr`` of bounded length, so that messages can quote untrusted values."""
    return reprlib.repr(value)


def dtype_name(dtype: torch.dtype) -> str:
    """Return ``"float32"`` for ``torch.float32``. Raises ``ValueError`` for a dtype that does not travel."""
    if dtype not in _WIRE:
        raise ValueError(f"{dtype} does not travel; one of {', '.join(_DTYPES)} does")
    return str(dtype).removeprefix("torch.")


def encode_parts(header: Mapping[str, Any], columns: Mapping[str, Tensor]) -> list[pa.Buffer]:
    """Encode tensors [rows, …] on any device, all with the same number of rows, as a frame in parts.

    ``header`` must be strict JSON and not use the key ``columns``. The parts of large contiguous CPU tensors are the
    tensors' own memory. Raises ``ValueError`` for a dtype, shape or header that can't travel.
    """
    return scatter(_stream(header, columns))


def decode(buffer: Any, *, own: bool = False) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Return the header and the tensors [rows, …] of a framed buffer, or of the list of its parts.

    The tensors are read-only, perhaps misaligned views of the buffer. With ``own``, and where the buffer comes in
    parts, they are views of a fresh copy. Every tensor has the dtype and shape that ``header["columns"]`` states, and
    lies inside the buffer. Raises ``RejectedError`` and no other error for any bytes.
    """
    try:
        if own or isinstance(buffer, list):
            return _decode(gather(buffer if isinstance(buffer, list) else [buffer]))
        return _decode(unframe(buffer))
    except RejectedError:
        raise
    except FrameError as error:
        raise RejectedError(f"damaged frame: {error}") from error
    except (
        Exception
    ) as error:  # a good hash vouches for no content; Arrow, JSON and struct each raise errors of their own
        raise RejectedError(f"unreadable content: {type(error).__name__}: {str(error)[:200]}") from error


class _Pieces:
    """A file for Arrow to write to. It keeps the pieces; those of tensors are the tensors' own buffers."""

    closed = False

    def __init__(self) -> None:
        self.pieces: list[Any] = []

    def write(self, piece: Any) -> int:
        self.pieces.append(piece)
        return len(piece) if isinstance(piece, bytes) else piece.size

    def flush(self) -> None: ...

    def close(self) -> None: ...


def _stream(header: Mapping[str, Any], columns: Mapping[str, Tensor]) -> list[Any]:
    """Return an Arrow stream in pieces. Blanks at the end of the header put the body at a multiple of 64 bytes."""
    shapes = {n: tuple(t.shape) for n, t in columns.items()}
    if not all(shapes.values()) or len({s[0] for s in shapes.values()}) > 1:
        raise ValueError(f"columns need one common number of rows, got {shapes}")
    about = {n: {"dtype": dtype_name(t.dtype), "shape": list(t.shape)} for n, t in columns.items()}
    text = json.dumps({**header, "columns": about}, allow_nan=False)
    arrays = [_to_arrow(t) for t in columns.values()]
    fields = [pa.field(n, a.type, nullable=False) for n, a in zip(columns, arrays)]
    pieces = _pieces(arrays, pa.schema(fields, metadata={_KEY: text.encode()}))
    before = 0
    for piece in pieces:
        if not isinstance(piece, bytes):  # the body begins
            blanks = " " * (-before % 64)
            return _pieces(arrays, pa.schema(fields, metadata={_KEY: (text + blanks).encode()})) if blanks else pieces
        before += len(piece)
    return pieces


def _pieces(arrays: list[pa.Array], schema: pa.Schema) -> list[Any]:
    sink = _Pieces()
    with ipc.new_stream(pa.PythonFile(sink, mode="w"), schema) as writer:
        writer.write_batch(pa.RecordBatch.from_arrays(arrays, schema=schema))
    return sink.pieces


def _to_arrow(tensor: Tensor) -> pa.Array:
    bits, kind = _WIRE[tensor.dtype]
    flat = tensor.detach().to("cpu").contiguous().view(-1).view(bits).numpy()
    values = pa.Array.from_buffers(kind, flat.size, [None, pa.py_buffer(flat)])
    if tensor.ndim == 1:
        return values
    width = math.prod(tensor.shape[1:])
    if width > _MAX_LIST:
        raise ValueError(f"a row of {width} elements does not travel: at most {_MAX_LIST}")
    return pa.Array.from_buffers(pa.list_(kind, width), tensor.shape[0], [None], children=[values])


def _decode(payload: pa.Buffer) -> tuple[dict[str, Any], dict[str, Tensor]]:
    source = pa.BufferReader(payload)
    messages = ipc.MessageReader.open_stream(source)
    schema = ipc.read_schema(next_message(messages, "schema"))  # ipc.read_schema crashes on a message of another type
    header = json.loads((schema.metadata or {})[_KEY])
    about = header["columns"]
    if schema.names != list(about):
        raise RejectedError(f"columns are {short(schema.names)}, the header says {short(list(about))}")
    for field in schema:
        _check_type(field, about[field.name])
    message = next_message(messages, "record batch")
    if is_compressed(message):
        raise RejectedError("a compressed record batch")
    batch = ipc.read_record_batch(message, schema)
    batch.validate()
    try:
        messages.read_next_message()
    except StopIteration:
        pass
    else:
        raise RejectedError("more than one record batch")
    if source.tell() != payload.size:
        raise RejectedError(f"{payload.size - source.tell()} bytes behind the end of the stream")
    return header, {n: _from_arrow(batch.column(i), about[n], payload) for i, n in enumerate(about)}


def next_message(messages: ipc.MessageReader, kind: str) -> pa.Message:
    """Read the next message. Raises ``RejectedError`` where it is not of type ``kind``."""
    message = messages.read_next_message()
    if message.type != kind:
        raise RejectedError(f"message is {message.type}, expected {kind}")
    return message


def _check_type(field: pa.Field, about: dict[str, Any]) -> None:
    """Refuse a column that is not of the header's dtype and shape, and a shape that is no list of counts."""
    dtype, shape = _DTYPES.get(about["dtype"]), about["shape"]
    if dtype is None:
        raise RejectedError(f"column {short(field.name)} has unknown dtype {short(about['dtype'])}")
    if not (isinstance(shape, list) and 0 < len(shape) <= 16 and all(type(s) is int and 0 <= s < 2**48 for s in shape)):
        raise RejectedError(f"column {short(field.name)} has impossible shape {short(shape)}")
    kind, width = _WIRE[dtype][1], math.prod(shape[1:])
    expected = kind if len(shape) == 1 else pa.list_(kind, width) if width <= _MAX_LIST else None
    if field.type != expected:
        raise RejectedError(f"column {short(field.name)} is {short(str(field.type))}, the header says {short(about)}")


def _from_arrow(column: pa.Array, about: dict[str, Any], payload: pa.Buffer) -> Tensor:
    dtype, shape = _DTYPES[about["dtype"]], about["shape"]
    bits, kind = _WIRE[dtype]
    values = column if len(shape) == 1 else column.values
    *validity, data = column.buffers()
    if any(b is not None for b in validity):
        raise RejectedError("nulls where there can be none")
    count, size = math.prod(shape), 0 if data is None else data.size
    if len(column) != shape[0] or len(values) != count or values.offset or size < count * kind.bit_width // 8:
        raise RejectedError(f"a column of {len(values)} elements in {size} bytes, the header says {short(about)}")
    if count == 0:
        return torch.empty(shape, dtype=dtype)
    if not payload.address <= data.address <= data.address + size <= payload.address + payload.size:
        raise RejectedError("foreign byte order")  # Arrow made a swapped copy
    flat = torch.from_dlpack(values)
    if dtype is torch.bool and bool((flat > 1).any()):
        raise RejectedError("a bool that is neither 0 nor 1")
    return flat.view(dtype).view(shape)


def is_compressed(message: pa.Message) -> bool:
    """Return whether a record batch message has a ``compression`` field, before Arrow inflates a decompression bomb.

    pyarrow doesn't expose the field, so this walks the flatbuffer: Message.header is field 2, RecordBatch.compression
    field 3.
    """
    metadata = memoryview(message.metadata)

    def field(table: int, index: int) -> int:
        vtable = table - struct.unpack_from("<i", metadata, table)[0]
        size = struct.unpack_from("<H", metadata, vtable)[0]
        return struct.unpack_from("<H", metadata, vtable + 4 + 2 * index)[0] if size > 4 + 2 * index else 0

    (root,) = struct.unpack_from("<I", metadata, 0)
    position = root + field(root, 2)
    return field(position + struct.unpack_from("<I", metadata, position)[0], 3) != 0
