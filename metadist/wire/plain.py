"""One tensor as a plain Arrow IPC stream, which any Arrow library reads and writes: for clients without metadist."""

from __future__ import annotations

import math
from typing import Any

import pyarrow as pa
import pyarrow.ipc as ipc
import torch
from torch import Tensor

from metadist.wire.stream import RejectedError, is_compressed, next_message, short

_NUMBERS = {
    pa.float32(): torch.float32,
    pa.float64(): torch.float64,
    pa.int64(): torch.int64,
    pa.int32(): torch.int32,
    pa.uint8(): torch.uint8,
}


def encode_plain(tensor: Tensor) -> bytes:
    """Encode a tensor [rows, …] as one record batch with one column of numbers.

    Dimensions after the first are nested fixed-size lists.
    """
    flat = tensor.detach().cpu().contiguous()
    array = pa.array(flat.view(-1).numpy())
    for width in reversed(flat.shape[1:]):
        array = pa.FixedSizeListArray.from_arrays(array, width)
    sink = pa.BufferOutputStream()
    schema = pa.schema([pa.field("tensor", array.type, nullable=False)])
    with ipc.new_stream(sink, schema) as writer:
        writer.write_batch(pa.RecordBatch.from_arrays([array], schema=schema))
    return sink.getvalue().to_pybytes()


def decode_plain(data: bytes, *, most: int) -> Tensor:
    """Return the tensor in such a stream, in memory of its own. It has at most ``most`` elements.

    All lengths are checked before memory is allocated for them. Raises ``RejectedError`` and no other error for any
    bytes.
    """
    try:
        return _decode(data, most)
    except RejectedError:
        raise
    except Exception as error:  # Arrow and struct each raise errors of their own
        raise RejectedError(f"no readable Arrow stream ({type(error).__name__})") from error


def _decode(data: bytes, most: int) -> Tensor:
    payload = pa.py_buffer(data)
    messages = ipc.MessageReader.open_stream(pa.BufferReader(payload))
    schema = ipc.read_schema(next_message(messages, "schema"))
    if len(schema) != 1:
        raise RejectedError(f"{len(schema)} columns, expected one")
    widths: list[int] = []
    kind = schema.field(0).type
    while pa.types.is_fixed_size_list(kind) and len(widths) < 8:
        widths.append(kind.list_size)
        kind = kind.value_type
    if kind not in _NUMBERS:
        found = short(str(schema.field(0).type))
        raise RejectedError(f"a column of {found}; expected numbers ({_names()}), or fixed-size lists of them")
    message = next_message(messages, "record batch")
    if is_compressed(message):
        raise RejectedError("a compressed record batch; write it without compression")
    batch = ipc.read_record_batch(message, schema)
    count = batch.num_rows * math.prod(widths)
    if count > most:
        raise RejectedError(f"{short(batch.num_rows)} rows of {math.prod(widths)} numbers, {most} in all are allowed")
    batch.validate()
    column: Any = batch.column(0)
    for _ in widths:
        _refuse_nulls(column)
        column = column.values
    _refuse_nulls(column)
    held = column.buffers()[-1]
    if column.offset or len(column) != count or (0 if held is None else held.size) < count * kind.bit_width // 8:
        raise RejectedError(f"a column of {count} numbers whose buffers hold fewer")
    if held is None or count == 0:
        return torch.empty([batch.num_rows, *widths], dtype=_NUMBERS[kind])
    if not payload.address <= held.address <= held.address + held.size <= payload.address + payload.size:
        raise RejectedError("foreign byte order")
    return torch.frombuffer(bytearray(held), dtype=_NUMBERS[kind], count=count).view(batch.num_rows, *widths)


def _refuse_nulls(column: Any) -> None:
    if column.buffers()[0] is not None and column.null_count:
        raise RejectedError("nulls in the column")


def _names() -> str:
    return ", ".join(str(kind) for kind in _NUMBERS)
