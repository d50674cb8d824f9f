"""Kept outputs on the wire: only the output of the very shard is accepted."""

from __future__ import annotations

from dataclasses import replace

import pyarrow as pa
import pytest
import torch

from metadist.core.computation import Gradient, Rollout
from metadist.core.round import Shard
from metadist.core.state import Records
from metadist.wire.codec import RejectedError, ResultHeader, decode_output, decode_result, output_parts, result_parts
from metadist.wire.frame import join

SHARD = Shard("run", 3, 0, 2, Rollout(), 4, 2, 7, key_step=3, keeps=True)
OUTPUT = Records(
    {
        "observation": torch.randn(2, 5, 3),
        "action": torch.randint(0, 4, (2, 5)),
        "log_probability": torch.randn(2, 5),
        "reward": torch.tensor([[0.0, -0.0, float("inf"), 1e-45, float("nan")]] * 2),
        "flags": torch.randint(0, 16, (2, 5), dtype=torch.uint8),
        "task": torch.tensor([4, 5]),
    }
)
HEADER = ResultHeader(SHARD, 1, "environment-0")
PARTS = output_parts(OUTPUT, HEADER)


def same(a, b):
    return a.dtype == b.dtype and a.shape == b.shape and a.numpy().tobytes() == b.numpy().tobytes()


@pytest.mark.parametrize("buffer", [PARTS, join(PARTS), join(PARTS).to_pybytes()], ids=["parts", "frame", "bytes"])
def test_it_arrives_bit_for_bit_in_aligned_memory(buffer):
    found = decode_output(buffer, SHARD)
    assert found.columns.keys() == OUTPUT.columns.keys()
    for name, column in found.columns.items():
        assert same(column, OUTPUT.columns[name])
        assert column.data_ptr() % 64 == 0


def test_any_arrow_reader_can_open_it():
    [batch] = pa.ipc.open_stream(join(PARTS).slice(64))
    assert batch.column("reward").type == pa.list_(pa.float32(), 5)
    assert batch.column("task").to_pylist() == [4, 5]


@pytest.mark.parametrize("position", range(0, join(PARTS).size, 37))
def test_damage_is_refused(position):
    content = bytearray(join(PARTS).to_pybytes())
    content[position] ^= 16
    with pytest.raises(RejectedError, match="damaged frame"):
        decode_output(bytes(content), SHARD)


@pytest.mark.parametrize(
    ("other", "reason"),
    [
        ({"index": 1}, "shard is 2, expected 1"),
        ({"meta_step": 4}, "meta_step is 3, expected 4"),
        ({"round": 1}, "round is 0, expected 1"),
        ({"run": "another"}, "run is 'run', expected 'another'"),
        ({"seed": 8}, "seed is 7, expected 8"),
        ({"start": 6}, "start is 4, expected 6"),
        ({"computation": Gradient()}, "function is 'rollout', expected 'gradient'"),
    ],
)
def test_the_output_of_another_shard_is_refused(other, reason):
    with pytest.raises(RejectedError, match=reason):
        decode_output(PARTS, replace(SHARD, **other))


def test_an_output_is_no_result_and_a_result_no_output():
    with pytest.raises(RejectedError, match="kind is 'output'"):
        decode_result(PARTS, SHARD, {})
    with pytest.raises(RejectedError, match="kind is 'records', expected 'output'"):
        decode_output(result_parts(OUTPUT, {}, HEADER), SHARD)


def test_a_contribution_without_slots_travels():
    """A rollout's statistics."""
    from metadist.core.state import Contribution

    sums = Contribution({}, 9.0, 2, {"advantage": 0.1, "return": -3.0})
    found, _ = decode_result(result_parts(sums, {}, HEADER), SHARD, {})
    assert found == sums
