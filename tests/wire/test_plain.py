"""One tensor as a plain Arrow stream: what others write is read, and what is hostile is refused."""

from __future__ import annotations

import random

import numpy as np
import pyarrow as pa
import pyarrow.ipc as ipc
import pytest
import torch

from metadist.wire.plain import decode_plain, encode_plain
from metadist.wire.stream import RejectedError


def stream(array, options=None, batches=1):
    sink = pa.BufferOutputStream()
    with ipc.new_stream(sink, pa.schema([pa.field("x", array.type)]), options=options) as writer:
        for _ in range(batches):
            writer.write_batch(pa.RecordBatch.from_arrays([array], names=["x"]))
    return sink.getvalue().to_pybytes()


@pytest.mark.parametrize("shape", [(5,), (5, 1), (3, 1, 4, 2), (0, 3)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.int64, torch.int32, torch.uint8])
def test_round_trip(shape, dtype):
    tensor = torch.randint(0, 100, shape).to(dtype)
    data = encode_plain(tensor)
    back = decode_plain(data, most=1000)
    assert back.dtype == dtype and torch.equal(back, tensor)
    array = ipc.open_stream(data).read_all().column(0)  # and any Arrow reader reads it
    assert len(array) == shape[0]


def test_what_others_write():
    values = np.arange(6, dtype=np.float32)
    assert decode_plain(stream(pa.array(values)), most=6).tolist() == values.tolist()
    lists = pa.FixedSizeListArray.from_arrays(pa.array(values), 3)
    assert decode_plain(stream(lists), most=6).shape == (2, 3)
    assert decode_plain(stream(lists.slice(1, 1)), most=6).tolist() == [[3.0, 4.0, 5.0]]


@pytest.mark.parametrize(
    ("array", "words"),
    [
        (pa.array(["a", "b"]), "expected numbers"),
        (pa.array([[1.0], [2.0, 3.0]]), "expected numbers"),
        (pa.array([1.0, None]), "nulls"),
        (pa.FixedSizeListArray.from_arrays(pa.array([1.0, None]), 2), "nulls"),
        (pa.array([1, 2], pa.int16()), "expected numbers"),
        (pa.array([1, 1, 2]).dictionary_encode(), "expected numbers"),
        (pa.array(np.zeros(2000)), "1000 in all"),
    ],
)
def test_what_is_no_tensor_is_refused(array, words):
    with pytest.raises(RejectedError, match=words):
        decode_plain(stream(array), most=1000)


@pytest.mark.parametrize("codec", ["zstd", "lz4"])
def test_a_bomb_is_not_inflated(codec):
    zeros = pa.array(np.zeros(50_000_000, np.uint8))
    data = stream(zeros, ipc.IpcWriteOptions(compression=codec))
    assert len(data) < 1_000_000
    before = pa.total_allocated_bytes()
    with pytest.raises(RejectedError, match="compressed"):
        decode_plain(data, most=10**9)
    assert pa.total_allocated_bytes() - before < 1_000_000


def test_declared_lengths_are_not_believed():
    """Every number in the metadata that says six, says 2^40 in turn."""
    data = bytearray(stream(pa.FixedSizeListArray.from_arrays(pa.array(np.arange(6, dtype=np.float32)), 1)))
    six = (6).to_bytes(8, "little")
    places = [i for i in range(len(data) - 8) if data[i : i + 8] == six]
    assert places
    for place in places:
        bomb = bytearray(data)
        bomb[place : place + 8] = (2**40).to_bytes(8, "little")
        with pytest.raises(RejectedError):
            decode_plain(bytes(bomb), most=2**62)
        with pytest.raises(RejectedError):
            decode_plain(bytes(bomb), most=1000)


def test_truncated_and_flipped():
    """Refused, or numbers: never a crash, never another exception."""
    draw, tensor = random.Random(0), torch.arange(12.0).view(3, 2, 2)
    data = encode_plain(tensor)
    for end in range(0, len(data) - 60):
        try:
            assert torch.equal(decode_plain(data[:end], most=100), tensor)  # the end-of-stream mark may be missing
        except RejectedError:
            pass
    for _ in range(3000):
        damaged = bytearray(data)
        for _ in range(draw.randint(1, 4)):
            damaged[draw.randrange(len(data))] ^= 1 << draw.randrange(8)
        try:
            assert decode_plain(bytes(damaged), most=100).numel() <= 100
        except RejectedError:
            pass
