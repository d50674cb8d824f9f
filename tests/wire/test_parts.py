"""Frames in parts: the same bytes, the same refusals, and memory of their own."""

from __future__ import annotations

import random

import pyarrow as pa
import pytest
import torch

from metadist.core.computation import Gradient
from metadist.core.parameters import Layout
from metadist.core.round import Shard
from metadist.core.state import Contribution, Slot
from metadist.wire import (
    FrameError,
    RejectedError,
    ResultHeader,
    ThetaHeader,
    decode_result,
    decode_theta,
    join,
    memory,
    result_parts,
    theta_parts,
    unframe,
)
from metadist.wire.frame import BLOCK, gather, scatter
from metadist.wire.stream import decode, encode_parts

LARGE = 300_000
SLOTS = {
    "model": Slot(Layout(("w", "b"), ((LARGE,), (3,)))),
    "rates": Slot(Layout(("r",), ((LARGE,),))),
    "frozen": Slot(Layout(("e",), ((2,),)), "constant"),
}
SHARD = Shard("run", 1, 0, 0, Gradient(), 0, 4, seed=0)
HEADER = ThetaHeader("r", 1, 0)


def state():
    generator = torch.Generator().manual_seed(0)
    return {n: torch.randn(s.layout.numel, generator=generator) for n, s in SLOTS.items()}


def published(vectors):
    return theta_parts(vectors, SLOTS, HEADER)


def test_the_parts_are_the_frame_and_large_vectors_are_not_copied():
    vectors = state()
    parts = published(vectors)
    addresses = [p.address for p in parts]
    assert vectors["model"].data_ptr() in addresses
    assert vectors["rates"].data_ptr() in addresses
    assert len(parts) <= 5, "what is small is joined"
    unframe(join(parts))


def test_what_is_small_is_one_part():
    assert len(encode_parts({"a": 1}, {"x": torch.zeros(4, 3)})) == 1


def test_theta_in_parts_lands_aligned_and_writable_in_memory_of_its_own():
    vectors = state()
    parts = published(vectors)
    for source in (parts, join(parts), [p.to_pybytes() for p in parts]):
        theta = decode_theta(source, SLOTS, HEADER)
        for name, vector in vectors.items():
            assert theta[name].equal(vector)
            assert theta[name].data_ptr() % 64 == 0
            theta[name] += 1
    assert all(v.equal(state()[n]) for n, v in vectors.items())


def test_the_first_vector_is_not_copied_again_where_it_landed():
    payload = gather(published(state()))
    start = payload.address
    header, columns = decode([join(published(state()))])
    assert header["kind"] == "theta"
    assert start % 64 == columns["model"].data_ptr() % 64 == 0


@pytest.mark.parametrize("cuts", [(64,), (64, 65), (100, 101, 102), (70, BLOCK + 70, 2 * BLOCK + 70)])
def test_parts_may_be_cut_anywhere_behind_the_header(cuts):
    whole = join(published(state()))
    edges = [0, *cuts, whole.size]
    parts = [whole.slice(a, b - a) for a, b in zip(edges, edges[1:])]
    assert decode_theta(parts, SLOTS, HEADER)["model"].equal(state()["model"])


def test_a_header_that_is_cut_and_no_parts_at_all_are_refused():
    whole = join(published(state()))
    for parts in ([], [b""], [whole.slice(0, 63), whole.slice(63)]):
        with pytest.raises(FrameError, match="too few"):
            gather(parts)
        with pytest.raises(RejectedError, match="damaged frame"):
            decode_theta(parts, SLOTS, HEADER)


def test_lost_swapped_and_repeated_parts_are_refused():
    parts = [p.to_pybytes() for p in published(state())]
    assert len(parts) > 3
    for damaged in (parts[:-1], parts[:1] + parts[2:], [parts[0], parts[2], parts[1], *parts[3:]], [*parts, parts[-1]]):
        with pytest.raises(RejectedError, match="damaged frame"):
            decode_theta(damaged, SLOTS, HEADER)


def test_bit_flips_in_any_part_are_found():
    parts, rng = [p.to_pybytes() for p in published(state())], random.Random(0)
    for _ in range(200):
        damaged = [bytearray(p) for p in parts]
        part = rng.choice(damaged)
        bit = rng.randrange(8 * len(part))
        part[bit // 8] ^= 1 << bit % 8
        with pytest.raises(RejectedError):
            decode_theta(damaged, SLOTS, HEADER)


def test_a_vector_that_changes_after_it_was_hashed_is_refused():
    vectors = state()
    parts = published(vectors)
    vectors["rates"][-1] += 1
    with pytest.raises(RejectedError, match="hash mismatch"):
        decode_theta(parts, SLOTS, HEADER)


def test_a_contribution_in_parts_comes_back_exactly():
    vectors = {n: v for n, v in state().items() if n != "frozen"}
    parts = result_parts(Contribution(vectors, 4.0, 4, {"loss": 0.5}), SLOTS, ResultHeader(SHARD, 2, "w"))
    result, sender = decode_result(parts, SHARD, SLOTS)
    assert all(result.slots[n].equal(v) for n, v in vectors.items())
    assert (result.weight, result.tasks, result.metrics, sender.attempt) == (4.0, 4, {"loss": 0.5}, 2)


@pytest.mark.parametrize("sizes", [[], [0], [1, 0, BLOCK, 5, BLOCK + 1], [3 * BLOCK, 2]])
def test_gather_is_unframe_of_the_join(sizes):
    buffers = [random.Random(n).randbytes(n) for n in sizes]
    parts = scatter(buffers)
    assert gather(parts).equals(unframe(join(parts)))
    assert gather(parts).to_pybytes() == b"".join(buffers)


# ---- memory


def test_memory_is_reused_only_when_nothing_refers_to_it():
    size = 5 * memory.LARGE + 3
    first = memory.fresh(size)
    address = first.data_ptr()
    assert address % 64 == 0
    assert first.numel() == size
    view = first[64:].view(torch.uint8)[7:]
    exported = pa.py_buffer(view.numpy())
    del first, view
    second = memory.fresh(size)
    assert second.data_ptr() != address, "Arrow still holds the first"
    second.fill_(3)
    del exported
    third = memory.fresh(size)
    assert third.data_ptr() == address
    third.fill_(1)
    assert bool((second == 3).all())


def test_little_memory_waits_to_be_used_again(monkeypatch):
    monkeypatch.setattr(memory, "SPARE", 8 << 20)
    blocks = [memory.fresh(4 << 20) for _ in range(5)]
    del blocks
    assert sum(size for size, _ in memory._spare) <= 8 << 20


def test_small_memory_is_torchs_own():
    before = len(memory._spare)
    assert memory.fresh(100).numel() == 100
    assert memory.fresh(0).numel() == 0
    assert len(memory._spare) == before
