"""The frame: 64 bytes that say whether what follows is what was sent. Nothing behind is looked at before they hold.

========  =====  ==========================================================================
offset    bytes  little-endian
========  =====  ==========================================================================
0         8      magic ``METADIST``
8         4      version
12        4      zero
16        8      payload length in bytes
24        24     zero
48        16     xxh3-128 of bytes 0…47 and of the payload
64        …      payload: as aligned as the buffer is, up to 64 bytes
========  =====  ==========================================================================

The hash covers the other header fields too, so a flipped bit is found wherever it lies. It finds accidents; it is no
signature: who may send is for the transport to decide, and what is inside a good frame is still checked by the codec.
"""

from __future__ import annotations

import struct
from collections.abc import Iterable
from typing import Any

import pyarrow as pa
import xxhash

MAGIC = b"METADIST"
VERSION = 1
HEADER_BYTES = 64

_FIELDS = struct.Struct("<8sI4xQ24x")
_HASHED = _FIELDS.size


class FrameError(Exception):
    """The bytes are not one whole, undamaged frame of this version. The message says why."""


def allocate(payload_bytes: int) -> pa.Buffer:
    """A mutable buffer for a payload of so many bytes at offset ``HEADER_BYTES``: write it there, then ``seal``."""
    return pa.allocate_buffer(HEADER_BYTES + payload_bytes)


def seal(buffer: pa.Buffer) -> pa.Buffer:
    """Write the header in front of the payload that lies in ``buffer``, in place; returns ``buffer``."""
    view = memoryview(buffer).cast("B")
    _FIELDS.pack_into(view, 0, MAGIC, VERSION, len(view) - HEADER_BYTES)
    view[_HASHED:HEADER_BYTES] = _digest(view)
    return buffer


def frame(payload_buffers: Iterable[Any]) -> pa.Buffer:
    """The concatenation of ``payload_buffers`` (anything with the buffer protocol) in one frame, copied once."""
    parts = [memoryview(pa.py_buffer(b)).cast("B") for b in payload_buffers]
    buffer = allocate(sum(len(p) for p in parts))
    view, position = memoryview(buffer).cast("B"), HEADER_BYTES
    for part in parts:
        view[position : position + len(part)] = part
        position += len(part)
    return seal(buffer)


def unframe(buffer: Any) -> pa.Buffer:
    """The payload of a frame: a zero-copy slice, after magic, version, length and hash were found to hold.

    ``buffer``: a ``pa.Buffer``, ``bytes`` or anything with the buffer protocol. Raises ``FrameError``.
    """
    buffer = buffer if isinstance(buffer, pa.Buffer) else pa.py_buffer(buffer)
    if buffer.size < HEADER_BYTES:
        raise FrameError(f"{buffer.size} bytes are too few for a header of {HEADER_BYTES}")
    view = memoryview(buffer).cast("B")
    magic, version, length = _FIELDS.unpack_from(view)
    if magic != MAGIC:
        raise FrameError(f"bad magic {magic!r}, expected {MAGIC!r}")
    if version != VERSION:
        raise FrameError(f"version {version}, expected {VERSION}")
    present = buffer.size - HEADER_BYTES
    if present != length:
        what = "truncated" if present < length else "trailing bytes"
        raise FrameError(f"{what}: {present} payload bytes, the header says {length}")
    if _digest(view) != view[_HASHED:HEADER_BYTES]:
        raise FrameError("hash mismatch: the bytes were damaged on the way")
    return buffer.slice(HEADER_BYTES)


def _digest(view: memoryview) -> bytes:
    digest = xxhash.xxh3_128(view[:_HASHED])
    digest.update(view[HEADER_BYTES:])
    return digest.digest()
