"""Contributions in bfloat16: the rounding error is added to the next contribution, once, and is always finite."""

from __future__ import annotations

import math
import random
from dataclasses import replace

import pytest
import torch

from metadist.core.computation import Gradient
from metadist.core.parameters import Layout
from metadist.core.round import Shard
from metadist.core.state import Contribution, Records, Slot
from metadist.wire import ErrorFeedback, RejectedError, ResultHeader, decode_result, join, result_parts

SLOTS = {
    "model": Slot(Layout(("w",), ((40,),))),
    "double": Slot(Layout(("d",), ((6,),), torch.float64)),
    "half": Slot(Layout(("h",), ((4,),), torch.float16)),
    "moments": Slot(Layout(("m",), ((5,),)), "average"),
}
SHARD = Shard("run-1", 7, 0, 3, Gradient(), 24, 8, seed=0, key_step=7)
HEADER = ResultHeader(SHARD, 1, "w")


def contribution(seed=0, **changes) -> Contribution:
    generator = torch.Generator().manual_seed(seed)
    vectors = {
        n: torch.randn(s.layout.numel, generator=generator, dtype=torch.float64).to(s.layout.dtype)
        for n, s in SLOTS.items()
    }
    return replace(Contribution(vectors, 8.0, 8, {"loss": 0.5}), **changes)


def sent(result=None, feedback=None):
    rounded = (feedback or ErrorFeedback(SLOTS)).round("key", result or contribution())
    return join(result_parts(rounded, SLOTS, HEADER, wire="bfloat16"))


def test_gradients_travel_rounded_and_arrive_in_their_layouts_dtype():
    original = contribution()
    result, _ = decode_result(sent(original), SHARD, SLOTS, wire="bfloat16")
    for name, slot in SLOTS.items():
        got = result.slots[name]
        assert got.dtype == slot.layout.dtype
        assert got.data_ptr() % 64 == 0
        rounded = name in ("model", "double")
        assert got.equal(original.slots[name].to(torch.bfloat16).to(got.dtype) if rounded else original.slots[name]), (
            name
        )
    assert (result.weight, result.tasks, result.metrics) == (8.0, 8, {"loss": 0.5})


def test_half_the_bytes():
    slots = {"model": Slot(Layout(("w",), ((500_000,),)))}
    whole = Contribution({"model": torch.randn(500_000)}, 8.0, 8)
    exact = result_parts(whole, slots, HEADER)
    rounded = result_parts(ErrorFeedback(slots).round(0, whole), slots, HEADER, wire="bfloat16")
    assert sum(p.size for p in rounded) < 0.51 * sum(p.size for p in exact)


def test_both_ends_must_agree_on_the_wire():
    with pytest.raises(RejectedError, match="slot model is bfloat16, expected float32"):
        decode_result(sent(), SHARD, SLOTS)
    exact = join(result_parts(contribution(), SLOTS, HEADER))
    with pytest.raises(RejectedError, match="slot model is float32, expected bfloat16"):
        decode_result(exact, SHARD, SLOTS, wire="bfloat16")
    with pytest.raises(ValueError, match=r"slot model is torch.float32 .*, its layout torch.bfloat16"):
        join(result_parts(contribution(), SLOTS, HEADER, wire="bfloat16"))


def test_another_layout_is_rejected():
    other = {**SLOTS, "model": Slot(Layout(("v",), ((40,),)))}
    with pytest.raises(RejectedError, match="slot model has layout"):
        decode_result(sent(), SHARD, other, wire="bfloat16")
    longer = {**SLOTS, "model": Slot(Layout(("w",), ((41,),)))}
    with pytest.raises(RejectedError, match="slot model has shape"):
        decode_result(sent(), SHARD, longer, wire="bfloat16")


def test_records_travel_as_ever():
    records = Records({"loss": torch.randn(8, 3)})
    buffer = join(result_parts(records, SLOTS, HEADER, wire="bfloat16"))
    result, _ = decode_result(buffer, SHARD, SLOTS, wire="bfloat16")
    assert result.columns["loss"].equal(records.columns["loss"])


def test_bit_flips_and_truncations_are_found():
    data, rng = sent().to_pybytes(), random.Random(0)
    for _ in range(2_000):
        damaged = bytearray(data)
        bit = rng.randrange(8 * len(data))
        damaged[bit // 8] ^= 1 << bit % 8
        with pytest.raises(RejectedError):
            decode_result(damaged, SHARD, SLOTS, wire="bfloat16")
    for length in range(len(data)):
        with pytest.raises(RejectedError):
            decode_result(data[:length], SHARD, SLOTS, wire="bfloat16")


# ---- the error


def feed(feedback, number, vector):
    """What arrives of ``vector``, sent as contribution ``number``."""
    slots = {"model": SLOTS["model"]}
    rounded = feedback.round(number, Contribution({"model": vector}, 8.0, 8))
    buffer = join(result_parts(rounded, slots, HEADER, wire="bfloat16"))
    return decode_result(buffer, SHARD, slots, wire="bfloat16")[0].slots["model"].double()


def test_the_error_of_a_long_sum_stays_that_of_one_term():
    """Like contributions round alike: without feedback the sum is off by as many roundings as it has terms."""
    generator, steps = torch.Generator().manual_seed(1), 400
    direction = torch.randn(40, generator=generator)
    exact, without, carried, feedback = (
        torch.zeros(40).double(),
        torch.zeros(40).double(),
        torch.zeros(40).double(),
        ErrorFeedback(SLOTS),
    )
    for step in range(steps):
        vector = direction + 1e-4 * torch.randn(40, generator=generator)
        exact += vector.double()
        without += vector.to(torch.bfloat16).double()
        carried += feed(feedback, step, vector)
        feedback.settle(step, True)
    one_rounding = 2**-8 * direction.double().abs().max()
    assert (carried - exact).abs().max() <= one_rounding
    assert (without - exact).abs().mean() > 50 * (carried - exact).abs().mean()
    assert torch.allclose(carried + feedback.residual("model").double(), exact, atol=1e-4)


def test_a_contribution_that_was_not_counted_takes_its_error_back():
    """Σ counted + residual = Σ of what was counted, whatever was computed twice, in whatever order one hears of it."""
    rng, generator = random.Random(0), torch.Generator().manual_seed(2)
    feedback, counted, received, verdicts = ErrorFeedback(SLOTS), torch.zeros(40).double(), torch.zeros(40).double(), []
    for number in range(300):
        vector = torch.randn(40, generator=generator)
        arrived, counts = feed(feedback, number, vector), rng.random() < 0.6
        verdicts.append((number, counts))
        if counts:
            counted += vector.double()
            received += arrived
        if len(verdicts) > 2:  # two are under way while a verdict is
            feedback.settle(*verdicts.pop(rng.randrange(2)))
    for verdict in verdicts:
        feedback.settle(*verdict)
    assert torch.allclose(received + feedback.residual("model").double(), counted, atol=1e-4)
    assert feedback.residual("model").abs().max() < 0.1
    assert not feedback._errors


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf, 3.4e38])
def test_what_is_not_finite_arrives_so_and_leaves_no_residual(bad):
    feedback = ErrorFeedback(SLOTS)
    feed(feedback, 0, torch.full((40,), 1.001))
    before = feedback.residual("model").clone()
    assert before.abs().max() > 0
    vector = torch.ones(40)
    vector[3] = bad
    arrived = feed(feedback, 1, vector)
    assert not arrived[3].isfinite()
    assert arrived[[0, 1, 2]].equal(torch.ones(3).double())
    feedback.settle(1, False)
    assert feedback.residual("model").equal(before)


def test_nan_in_one_slot_keeps_all_residuals():
    feedback = ErrorFeedback(SLOTS)
    feedback.round(0, contribution())
    before = feedback.residual("double").clone()
    spoilt = contribution(1)
    spoilt.slots["moments"][0] = math.nan
    feedback.round(1, spoilt)
    assert feedback.residual("double").equal(before)


def test_the_contribution_itself_is_not_changed():
    original, feedback = contribution(), ErrorFeedback(SLOTS)
    feedback.round(0, original)
    feedback.round(1, original)
    feedback.settle(1, False)
    assert all(v.equal(contribution().slots[n]) for n, v in original.slots.items())


def test_a_verdict_on_what_was_never_sent_is_nothing():
    feedback = ErrorFeedback(SLOTS)
    feedback.settle("unknown", False)
    assert feedback.residual("model").equal(torch.zeros(40))
