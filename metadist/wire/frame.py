"""The frame: 64 bytes that tell whether the payload behind them is undamaged. They are checked before anything else.

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

The hash covers the other header fields too, so a flipped bit is found wherever it lies. The hash finds accidents and
is no signature: the transport decides who may send, and the codec checks the content of an undamaged frame.
"""

from __future__ import annotations

import struct
from collections.abc import Iterable, Sequence
from typing import Any

import pyarrow as pa
import xxhash

from metadist.wire.memory import fresh

MAGIC = b"METADIST"
VERSION = 1
HEADER_BYTES = 64
#: bytes that are copied and then hashed while they are in the cache
BLOCK = 256 << 10

_FIELDS = struct.Struct("<8sI4xQ24x")
_HASHED = _FIELDS.size


class FrameError(Exception):
    """The bytes are not one whole, undamaged frame of this version. The message gives the reason."""


def scatter(payload_buffers: Iterable[Any]) -> list[pa.Buffer]:
    """Return a frame around ``payload_buffers`` (anything with the buffer protocol) in parts.

    The concatenation of the parts is the frame. Large buffers are parts as they are; small buffers are copied into
    common parts.
    """
    parts = [_bytes(b) for b in payload_buffers]
    header = bytearray(HEADER_BYTES)
    _FIELDS.pack_into(header, 0, MAGIC, VERSION, sum(map(len, parts)))
    digest = xxhash.xxh3_128(header[:_HASHED])
    scattered: list[Any] = [header]
    for part in parts:
        digest.update(part)
        if len(part) < BLOCK and isinstance(scattered[-1], bytearray):
            scattered[-1] += part
        else:
            scattered.append(bytearray(part) if len(part) < BLOCK else part)
    header[_HASHED:HEADER_BYTES] = digest.digest()
    return [pa.py_buffer(p) for p in scattered]


def join(parts: Sequence[pa.Buffer]) -> pa.Buffer:
    """Return one buffer of the ``parts`` of a frame; several parts are copied."""
    if len(parts) == 1:
        return parts[0]
    buffer = pa.py_buffer(fresh(sum(p.size for p in parts)).numpy())
    view, position = _bytes(buffer), 0
    for part in parts:
        view[position : position + part.size] = _bytes(part)
        position += part.size
    return buffer


def unframe(buffer: Any) -> pa.Buffer:
    """Return the payload of a frame as a zero-copy slice, after magic, version, length and hash were checked.

    ``buffer``: a ``pa.Buffer``, ``bytes`` or anything with the buffer protocol. Raises ``FrameError``.
    """
    buffer = buffer if isinstance(buffer, pa.Buffer) else pa.py_buffer(buffer)
    view = memoryview(buffer).cast("B")
    _check_header(view[:HEADER_BYTES], len(view))
    digest = xxhash.xxh3_128(view[:_HASHED])
    digest.update(view[HEADER_BYTES:])
    _check_digest(digest.digest(), view)
    return buffer.slice(HEADER_BYTES)


def gather(parts: Sequence[Any]) -> pa.Buffer:
    """Return the payload of a frame that came in ``parts``, in fresh memory aligned to 64 bytes.

    The checks are those of ``unframe``. This is one pass: every block is copied and then, while it is in the cache,
    hashed.
    """
    views = [_bytes(p) for p in parts]
    size = sum(map(len, views))
    head = views[0][:HEADER_BYTES] if views else memoryview(b"")
    _check_header(head, size)
    views[0] = views[0][HEADER_BYTES:]
    payload = pa.py_buffer(fresh(size - HEADER_BYTES).numpy())
    _check_digest(_copy_and_hash(head[:_HASHED], views, _bytes(payload)), head)
    return payload


def _bytes(buffer: Any) -> memoryview:
    return memoryview(pa.py_buffer(buffer)).cast("B")


def _copy_and_hash(fields: memoryview, parts: Iterable[memoryview], target: memoryview) -> bytes:
    """Copy ``parts`` one after another into ``target``, and return the digest of ``fields`` and ``target``."""
    digest, position = xxhash.xxh3_128(fields), 0
    for part in parts:
        for start in range(0, len(part), BLOCK):
            block = part[start : start + BLOCK]
            end = position + len(block)
            target[position:end] = block
            digest.update(target[position:end])
            position = end
    return digest.digest()


def _check_header(view: memoryview, size: int) -> None:
    if len(view) < HEADER_BYTES:
        raise FrameError(f"{len(view)} bytes are too few for a header of {HEADER_BYTES}")
    magic, version, length = _FIELDS.unpack_from(view)
    if magic != MAGIC:
        raise FrameError(f"bad magic {magic!r}, expected {MAGIC!r}")
    if version != VERSION:
        raise FrameError(f"version {version}, expected {VERSION}")
    present = size - HEADER_BYTES
    if present != length:
        what = "truncated" if present < length else "trailing bytes"
        raise FrameError(f"{what}: {present} payload bytes, the header says {length}")


def _check_digest(digest: bytes, view: memoryview) -> None:
    if digest != view[_HASHED:HEADER_BYTES]:
        raise FrameError("hash mismatch: the bytes were damaged on the way")
