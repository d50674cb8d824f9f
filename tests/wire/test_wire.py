"""The border between processes: damaged or unexpected bytes never become a tensor."""

from __future__ import annotations

import contextlib
import json
import math
import random
from dataclasses import replace

import numpy as np
import pyarrow as pa
import pyarrow.ipc as ipc
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from metadist.core.computation import Evaluate, Gradient
from metadist.core.parameters import Layout
from metadist.core.round import Shard
from metadist.core.state import Contribution, Records, Slot
from metadist.wire import (
    FrameError,
    RejectedError,
    ResultHeader,
    ThetaHeader,
    decode_result,
    decode_theta,
    join,
    result_parts,
    theta_parts,
    unframe,
)
from metadist.wire.frame import scatter
from metadist.wire.stream import decode, encode_parts

DTYPES = [
    torch.float64,
    torch.float32,
    torch.float16,
    torch.bfloat16,
    torch.int64,
    torch.int32,
    torch.uint8,
    torch.bool,
]
SLOTS = {
    "theta": Slot(Layout(("w", "b"), ((5, 3), (3,)))),
    "rates": Slot(Layout(("w", "b"), ((), ()), torch.float64)),
    "moments": Slot(Layout(("m",), ((4,),)), "average"),
    "frozen": Slot(Layout(("e",), ((2,),)), "constant"),
}
SHARD = Shard("run-1", 7, 0, 3, Gradient(), 24, 8, seed=0, key_step=7)


def contribution(**changes) -> Contribution:
    generator = torch.Generator().manual_seed(0)
    vectors = {
        n: torch.randn(s.layout.numel, generator=generator, dtype=s.layout.dtype)
        for n, s in SLOTS.items()
        if n != "frozen"
    }
    return replace(Contribution(vectors, 8.0, 8, {"loss": 0.1 + 0.2, "accuracy": 1 / 3}), **changes)


def sent(result=None, shard=SHARD, slots=SLOTS) -> pa.Buffer:
    header = ResultHeader(shard, 1, "a-1", {"seconds": 1e-3})
    return join(result_parts(result or contribution(), slots, header))


def frame(buffers) -> pa.Buffer:
    """A frame around ``buffers``, in one piece."""
    return join(scatter(buffers))


def theta_frame(vectors, slots, header) -> pa.Buffer:
    return join(theta_parts(vectors, slots, header))


def bitwise(a: torch.Tensor, b: torch.Tensor) -> bool:
    return (
        a.dtype == b.dtype
        and a.shape == b.shape
        and a.contiguous().view(-1).view(torch.uint8).equal(b.contiguous().view(-1).view(torch.uint8))
    )


def sample(dtype: torch.dtype, *shape: int) -> torch.Tensor:
    """Random bits, so NaN payloads and subnormals too."""
    if dtype is torch.bool:
        return torch.rand(shape) > 0.5
    raw = torch.randint(0, 256, (math.prod(shape) * dtype.itemsize,), dtype=torch.uint8)
    return raw.view(dtype).view(shape)


# ---- the frame


def test_a_frame_holds_its_payload_and_nothing_is_copied():
    buffer = frame([b"abc", np.arange(3), pa.py_buffer(b""), b"d"])
    payload = unframe(buffer)
    assert payload.to_pybytes() == b"abc" + np.arange(3).tobytes() + b"d"
    assert payload.address == buffer.address + 64
    assert unframe(frame([])).size == 0


@pytest.mark.parametrize(
    ("damage", "reason"),
    [
        (lambda b: b[:63], "too few"),
        (lambda b: b[:-1], "truncated"),
        (lambda b: b + b"x", "trailing"),
        (lambda b: b"X" + b[1:], "magic"),
        (lambda b: b[:8] + b"\2" + b[9:], "version"),
        (lambda b: b[:30] + b"\1" + b[31:], "hash"),
        (lambda b: b[:-1] + b"x", "hash"),
    ],
)
def test_a_damaged_frame_says_what_is_wrong(damage, reason):
    with pytest.raises(FrameError, match=reason):
        unframe(damage(frame([b"payload"]).to_pybytes()))


def count_decoded(damaged) -> int:
    decoded = 0
    for data in damaged:
        try:
            decode_result(data, SHARD, SLOTS)
        except RejectedError:
            continue
        decoded += 1
    return decoded


def flipped(data: bytes, bits) -> bytearray:
    copy = bytearray(data)
    for bit in bits:
        copy[bit // 8] ^= 1 << bit % 8
    return copy


def test_ten_thousand_bit_flips_are_all_found():
    data, rng = sent().to_pybytes(), random.Random(0)
    ones = (flipped(data, [rng.randrange(8 * len(data))]) for _ in range(10_000))
    several = (flipped(data, rng.sample(range(8 * len(data)), rng.randint(2, 9))) for _ in range(2_000))
    assert count_decoded([data]) == 1
    assert count_decoded(ones) == 0
    assert count_decoded(several) == 0


def test_every_truncation_and_extension_is_found():
    data = sent().to_pybytes()
    assert count_decoded(data[:n] for n in range(len(data))) == 0
    assert count_decoded(data + bytes(n) for n in range(1, 200)) == 0


def test_every_single_bit_flip_is_found():
    data = sent().to_pybytes()
    assert count_decoded(flipped(data, [bit]) for bit in range(8 * len(data))) == 0


@pytest.mark.lane("numerics")
def test_bit_flips_in_a_megabyte_are_all_found():
    slots, rng = {"theta": Slot(Layout(("w",), ((250_000,),)))}, random.Random(2)
    data = sent(contribution(slots={"theta": torch.randn(250_000)}), slots=slots).to_pybytes()
    for _ in range(3_000):
        with pytest.raises(RejectedError):
            decode_result(flipped(data, [rng.randrange(8 * len(data))]), SHARD, slots)


# ---- round trips


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("numel", [0, 1, 7, 1000])
def test_theta_comes_back_bit_for_bit_in_fresh_aligned_memory(dtype, numel):
    slots = {"a": Slot(Layout(("w",), ((numel,),), dtype)), "b": Slot(Layout(("v",), ((3,),)), "constant")}
    vectors = {"a": sample(dtype, numel), "b": torch.randn(3)}
    header = ThetaHeader("r", 1, 2)
    buffer = theta_frame(vectors, slots, header)
    misplaced = pa.py_buffer(b"x" * 3 + buffer.to_pybytes()).slice(3)
    for source in (buffer, misplaced, buffer.to_pybytes()):
        theta = decode_theta(source, slots, header)
        assert theta.keys() == vectors.keys()
        assert all(bitwise(theta[n], v) for n, v in vectors.items())
        assert all(v.data_ptr() % 64 == 0 for v in theta.values())
    before = buffer.to_pybytes()
    theta["b"] += 1
    assert buffer.to_pybytes() == before


def test_theta_of_another_step_or_layout_is_rejected():
    slots = {"a": SLOTS["theta"]}
    header = ThetaHeader("r", 1, 0)
    buffer = theta_frame({"a": torch.zeros(18)}, slots, header)
    other = {"a": Slot(Layout(("w", "c"), ((5, 3), (3,))))}
    for expected, reason in (
        ({"run": "s"}, "run is"),
        ({"meta_step": 2}, "meta_step is 1"),
        ({"round": 1}, "round is 0"),
    ):
        with pytest.raises(RejectedError, match=reason):
            decode_theta(buffer, slots, replace(header, **expected))
    with pytest.raises(RejectedError, match="layout"):
        decode_theta(buffer, other, header)
    with pytest.raises(RejectedError, match="slots are"):
        decode_theta(buffer, {"b": slots["a"]}, header)
    with pytest.raises(RejectedError, match="kind"):
        decode_theta(sent(), slots, header)


def test_a_contribution_comes_back_exactly():
    metrics = {"tiny": 5e-324, "third": 1 / 3, "huge": 1.7e308, "nan": math.nan, "inf": -math.inf, "ü": 0.0}
    result, sender = decode_result(sent(contribution(metrics=metrics, weight=0.1)), SHARD, SLOTS)
    original = contribution()
    assert all(bitwise(result.slots[n], v) for n, v in original.slots.items())
    assert list(result.slots) == list(original.slots)
    assert result.weight == 0.1
    assert result.tasks == 8
    assert repr(result.metrics) == repr(metrics)
    assert sender == ResultHeader(SHARD, 1, "a-1", {"seconds": 1e-3})


def test_non_contiguous_vectors_and_gradients_travel():
    vector = torch.arange(36.0, requires_grad=True)[::2]
    result, _ = decode_result(sent(contribution(slots={"theta": vector})), SHARD, SLOTS)
    assert result.slots["theta"].equal(vector)
    assert not result.slots["theta"].requires_grad


@pytest.mark.parametrize("rows", [0, 1, 5])
def test_records_of_every_dtype_and_shape_come_back(rows):
    shapes = [(), (3,), (2, 2), (0,), (1, 2, 3)]
    columns = {f"{d}{s}": sample(d, rows, *s) for d in DTYPES for s in shapes}
    shard = replace(SHARD, count=rows)
    result, _ = decode_result(sent(Records(columns), shard), shard, SLOTS)
    assert isinstance(result, Records)
    assert list(result.columns) == list(columns)
    assert all(bitwise(result.columns[n], c) for n, c in columns.items())


def test_nothing_travels_too():
    assert decode_result(sent(Records({})), SHARD, SLOTS)[0] == Records({})
    assert decode_result(sent(contribution(slots={})), SHARD, SLOTS)[0].slots == {}


def test_any_arrow_reader_can_open_the_payload():
    records = Records({"loss": torch.arange(4.0), "curve": torch.arange(8).view(4, 2)})
    table = ipc.open_stream(unframe(sent(records))).read_all()
    assert table.to_pylist()[1] == {"loss": 1.0, "curve": [2, 3]}


@pytest.mark.parametrize(
    "result",
    [
        contribution(slots={"theta": torch.zeros(17)}),
        contribution(slots={"theta": torch.zeros(18, dtype=torch.float64)}),
        contribution(slots={"thetas": torch.zeros(18)}),
        Records({"a": torch.zeros(2), "b": torch.zeros(3)}),
        Records({"a": torch.zeros(())}),
        Records({"a": torch.zeros(2, dtype=torch.complex64)}),
    ],
)
def test_the_sender_refuses_what_does_not_fit(result):
    with pytest.raises(ValueError):
        sent(result)


# ---- refusals behind a good hash


@pytest.mark.parametrize(
    "field", ["run", "meta_step", "round", "index", "function", "split", "start", "count", "leaf", "seed", "key_step"]
)
def test_the_result_of_another_shard_is_rejected(field):
    if field == "function":
        other = replace(SHARD, computation=Evaluate())
    else:
        value = getattr(SHARD, field)
        other = replace(SHARD, **{field: value + 1 if isinstance(value, int) else value + "x"})
    with pytest.raises(RejectedError, match=r"is .*, expected"):
        decode_result(sent(shard=other), SHARD, SLOTS)


def test_a_block_says_how_many_shards_it_is_the_sum_of():
    block = replace(SHARD, leaf=2)
    assert decode_result(sent(shard=block), block, SLOTS)[0].tasks == 8
    for asked, told in (
        (block, SHARD),
        (SHARD, block),
        (block, replace(SHARD, leaf=4)),
        (replace(SHARD, count=4), block),
    ):
        with pytest.raises(RejectedError, match=r"(leaf|count) is \d, expected \d"):
            decode_result(sent(shard=told), asked, SLOTS)
    header, _ = header_and_columns()
    for lie in ({"leaf": "0"}, {"leaf": None}, {"leaf": False}, {"leaf": 0.0}):
        with pytest.raises(RejectedError, match="leaf is"):
            decode_result(reframed({**header, **lie}), SHARD, SLOTS)
    with pytest.raises(RejectedError, match="leaf is"):
        decode_result(reframed({n: v for n, v in header.items() if n != "leaf"}), SHARD, SLOTS)


@pytest.mark.parametrize(
    ("result", "reason"),
    [
        (contribution(weight=0.0), "weight"),
        (contribution(weight=-1.0), "weight"),
        (contribution(weight=math.nan), "weight"),
        (contribution(weight=math.inf), "weight"),
        (contribution(tasks=0), "weight is 8.0"),
        (contribution(tasks=-1), "tasks is -1, expected 0 to 8"),
        (contribution(tasks=9), "tasks is 9, expected 0 to 8"),
        (contribution(slots={"frozen": torch.zeros(2)}), "frozen is constant"),
    ],
)
def test_bad_values_are_rejected(result, reason):
    with pytest.raises(RejectedError, match=reason):
        decode_result(sent(result), SHARD, SLOTS)


def test_non_finite_values_and_partial_shards_pass():
    """The scheduler judges both."""
    result = contribution(slots={"theta": torch.tensor([math.inf, -math.inf, *[0.0] * 16])}, tasks=3)
    got, _ = decode_result(sent(result), SHARD, SLOTS)
    assert got.tasks == 3
    assert got.slots["theta"][0] == math.inf
    assert decode_result(sent(contribution(tasks=0, weight=0.0)), SHARD, SLOTS)[0].tasks == 0


def test_finite_values_whose_sum_overflows_are_no_infinity():
    huge = contribution(slots={"theta": torch.full((18,), 3e38)})
    assert decode_result(sent(huge), SHARD, SLOTS)[0].slots["theta"].max() == torch.tensor(3e38)


@pytest.mark.parametrize(
    ("slots", "reason"),
    [
        ({"theta": Slot(Layout(("w", "b"), ((3, 5), (3,))))}, "layout"),
        ({"theta": Slot(Layout(("w", "b"), ((5, 3), (3,)), torch.float64))}, "float32, expected float64"),
        ({"theta": Slot(Layout(("w", "b"), ((5, 3), (4,))))}, "shape"),
        ({"other": SLOTS["theta"]}, "unknown slot"),
    ],
)
def test_another_layout_is_rejected(slots, reason):
    buffer = sent(contribution(slots={"theta": torch.zeros(18)}))
    with pytest.raises(RejectedError, match=reason):
        decode_result(buffer, SHARD, slots)


def test_records_have_a_row_for_every_task():
    with pytest.raises(RejectedError, match="2 rows, expected 8"):
        decode_result(sent(Records({"a": torch.zeros(2)})), SHARD, SLOTS)


# ---- hostile content behind a good hash


def header_and_columns():
    return decode(sent())


def reframed(
    header, batch: pa.RecordBatch | None = None, *, raw: bytes | None = None, compression=None, more=0
) -> pa.Buffer:
    """A good frame around the contribution's own record batch (or another) and any header."""
    batch = batch or ipc.open_stream(unframe(sent())).read_next_batch()
    text = json.dumps(header).encode() if raw is None else raw
    sink = pa.BufferOutputStream()
    schema = batch.schema.with_metadata({b"metadist": text})
    with ipc.new_stream(sink, schema, options=ipc.IpcWriteOptions(compression=compression)) as writer:
        for _ in range(1 + more):
            writer.write_batch(batch.replace_schema_metadata(schema.metadata))
    return frame([sink.getvalue()])


def column(array: pa.Array, about) -> pa.Buffer:
    """A contribution whose only slot is this column."""
    header, _ = header_and_columns()
    return reframed({**header, "columns": {"theta": about}}, pa.RecordBatch.from_arrays([array], names=["theta"]))


def test_the_reframed_original_is_accepted():
    assert count_decoded([reframed(header_and_columns()[0])]) == 1


def test_every_truncation_of_the_stream_behind_a_good_hash_is_rejected():
    payload = unframe(sent()).to_pybytes()
    # An end-of-stream marker may be missing: Arrow takes a clean end for one, and nothing is lost with it.
    assert count_decoded(frame([payload[:n]]) for n in range(len(payload) - 8)) == 0
    assert count_decoded([frame([payload, b"\0" * 8]), frame([payload, payload])]) == 0


def test_random_bytes_in_the_stream_behind_a_good_hash_never_crash():
    payload, rng = unframe(sent()).to_pybytes(), random.Random(1)
    for _ in range(5_000):
        data = flipped(payload, rng.sample(range(8 * len(payload)), rng.randint(1, 6)))
        with contextlib.suppress(RejectedError):  # values may have changed: that is what the hash is for
            decode_result(frame([data]), SHARD, SLOTS)


F18 = {"dtype": "float32", "shape": [1, 18]}
LIST18 = pa.list_(pa.float32(), 18)


@pytest.mark.parametrize(
    "buffer",
    [
        lambda: column(pa.array([[0.0] * 18]), F18),
        lambda: column(pa.array([[0.0] * 18], pa.list_(pa.float32())), F18),
        lambda: column(pa.array(["x" * 18]), F18),
        lambda: column(pa.array(["x"]).dictionary_encode(), F18),
        lambda: column(pa.array([{"a": 1}]), F18),
        lambda: column(pa.array([True]), {"dtype": "bool", "shape": [1]}),
        lambda: column(pa.array([None], LIST18), F18),
        lambda: column(pa.array([[None] * 18], LIST18), F18),
        lambda: column(pa.array([[0.0] * 18] * 2, LIST18), F18),
        lambda: column(pa.array([[0.0] * 17], pa.list_(pa.float32(), 17)), F18),
        lambda: column(pa.array([[0] * 18], pa.list_(pa.int32(), 18)), F18),
        lambda: column(pa.array([[2] * 18], pa.list_(pa.uint8(), 18)), {"dtype": "bool", "shape": [1, 18]}),
        lambda: column(pa.nulls(1), F18),
        lambda: column(pa.array([[0.0] * 18], LIST18), {"dtype": "complex64", "shape": [1, 18]}),
        lambda: column(pa.array([[0.0] * 18], LIST18), {"dtype": "float32", "shape": [1, 18, 1]}),
        lambda: column(pa.array([[0.0] * 18], LIST18), {"dtype": "float32", "shape": []}),
        lambda: column(pa.array([[0.0] * 18], LIST18), {"dtype": "float32", "shape": [True, 18]}),
        lambda: column(pa.array([[0.0] * 18], LIST18), {"dtype": "float32", "shape": [-1, -18]}),
        lambda: column(pa.array([[0.0] * 18], LIST18), {"dtype": "float32", "shape": [2**63, 2**63]}),
        lambda: column(pa.array([[0.0] * 18], LIST18), {"dtype": ["float32"], "shape": "1"}),
        lambda: column(pa.array([[0.0] * 18], LIST18), None),
        lambda: reframed(header_and_columns()[0], compression="lz4"),
        lambda: reframed(header_and_columns()[0], compression="zstd"),
        lambda: reframed(header_and_columns()[0], more=1),
        lambda: reframed({**header_and_columns()[0], "columns": {}}),
        lambda: reframed({**header_and_columns()[0], "columns": []}),
        lambda: reframed({**header_and_columns()[0], "layouts": None}),
        lambda: reframed({**header_and_columns()[0], "layouts": {"theta": []}}),
        lambda: reframed({**header_and_columns()[0], "weight": 8.0}),
        lambda: reframed({**header_and_columns()[0], "weight": "0x1p99999"}),
        lambda: reframed({**header_and_columns()[0], "weight": "eight"}),
        lambda: reframed({**header_and_columns()[0], "tasks": True}),
        lambda: reframed({**header_and_columns()[0], "metrics": {"loss": None}}),
        lambda: reframed({**header_and_columns()[0], "stats": [1]}),
        lambda: reframed({**header_and_columns()[0], "worker": 3}),
        lambda: reframed({**header_and_columns()[0], "kind": ["contribution"]}),
        lambda: reframed(None, raw=b""),
        lambda: reframed(None, raw=b"\xff\xfe{"),
        lambda: reframed(None, raw=b"[" * 200_000),
        lambda: reframed(None, raw=b"9" * 10_000),
        lambda: reframed(None, raw=b'{"columns": NaN}'),
        lambda: frame([]),
        lambda: frame([b"not arrow"]),
    ],
)
def test_hostile_content_is_rejected(buffer):
    with pytest.raises(RejectedError):
        decode_result(buffer(), SHARD, SLOTS)


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3),
    max_leaves=8,
)
QUICK = settings(max_examples=150, deadline=None, database=None, derandomize=True)


@QUICK
@given(st.sampled_from(sorted(header_and_columns()[0])), JSON)
def test_any_other_value_of_any_header_field_is_rejected_or_harmless(field, value):
    header, _ = header_and_columns()
    hostile = {**header, field: value}
    try:
        result, _ = decode_result(reframed(hostile), SHARD, SLOTS)
    except RejectedError:
        return
    assert field in ("stats", "metrics", "attempt", "worker", "weight", "tasks") or value == header[field]
    assert result.weight > 0
    assert 0 < result.tasks <= 8


@QUICK
@given(st.binary(max_size=300) | JSON.map(lambda v: json.dumps(v).encode()))
def test_any_other_header_is_rejected(raw):
    with pytest.raises(RejectedError):
        decode_result(reframed(None, raw=raw), SHARD, SLOTS)


@QUICK
@given(st.binary(max_size=400))
def test_any_bytes_are_rejected(data):
    for buffer in (data, frame([data])):
        with pytest.raises(RejectedError):
            decode_result(buffer, SHARD, SLOTS)


@pytest.mark.parametrize("device", ["cpu", *(["cuda"] if torch.cuda.is_available() else [])])
def test_tensors_on_a_device_travel_and_land_on_it(device):
    slots = {"theta": SLOTS["theta"]}
    vector = torch.randn(18, device=device)
    header = ThetaHeader("r", 0, 0)
    theta = decode_theta(theta_frame({"theta": vector}, slots, header), slots, header, device)
    assert theta["theta"].device.type == device
    assert bitwise(theta["theta"].cpu(), vector.cpu())


def test_encode_refuses_a_header_that_is_no_json():
    with pytest.raises(ValueError):
        encode_parts({"x": math.nan}, {})
