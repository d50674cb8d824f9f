"""The outer loop: schedules, clipping over all slots, settings of a slot, average slots."""

import math

import pytest
import torch

from metadist.core.errors import ConfigError
from metadist.core.outer import OuterLoop, squared_norm
from metadist.core.parameters import Layout
from metadist.core.state import Contribution, Slot, State

N = 7
STEPS = 50


def slot(rule="gradient", **options):
    return Slot(Layout(("w",), ((N,),), torch.float64), rule, **options)


def vector(seed):
    return torch.randn(N, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def gradient(theta, step):
    """The gradient of a bumpy bowl plus noise that depends on the step."""
    return theta + torch.sin(3 * theta) + 0.1 * vector(100 + step)


def run(outer, slots, steps=STEPS, weight=3.0):
    state = State({n: vector(i) for i, n in enumerate(slots)})
    state = State(state.slots, outer.initial(slots, state.slots))
    for step in range(steps):
        total = Contribution({n: weight * gradient(v, step) for n, v in state.slots.items()}, weight, 3)
        state, _ = outer.update(slots, state, total, step)
    return state


def test_schedules_end_at_the_final_rate_for_every_slot():
    for schedule in ("linear", "cosine"):
        outer = OuterLoop(lr=0.1, final_lr=0.01, schedule=schedule, meta_steps=10)
        assert outer.rate(0.1, 0) == 0.1
        assert outer.rate(0.1, 10) == pytest.approx(0.01)
        assert outer.rate(0.5, 10) == pytest.approx(0.05)  # a slot's own rate keeps its proportion
        assert outer.rate(0.1, 11) == pytest.approx(0.01)


def test_a_slot_has_its_own_rate_decay_and_bounds():
    outer = OuterLoop(optimizer="sgd", lr=0.1, weight_decay=0.5)
    slots = {"model": slot(), "own": slot(lr=0.01, weight_decay=0.0, bounds=(-0.2, None)), "fixed": slot("constant")}
    before = {n: vector(i) for i, n in enumerate(slots)}
    state, _ = outer.update(
        slots, State(before, {}), Contribution({n: 2 * vector(9) for n in ("model", "own")}, 2.0, 2), 0
    )
    torch.testing.assert_close(state.slots["model"], before["model"] - 0.1 * (vector(9) + 0.5 * before["model"]))
    torch.testing.assert_close(state.slots["own"], (before["own"] - 0.01 * vector(9)).clamp(min=-0.2))
    assert state.slots["own"].min() == -0.2
    assert state.slots["fixed"].equal(before["fixed"])


def test_an_average_slot_becomes_the_weighted_mean():
    slots = {"model": slot(), "moments": slot("average")}
    outer = OuterLoop()
    start = {"model": vector(0), "moments": vector(1)}
    total = Contribution({"model": vector(2), "moments": vector(3)}, 4.0, 4) + Contribution(
        {"model": vector(4), "moments": vector(5)}, 6.0, 6
    )
    state, _ = outer.update(slots, State(start, outer.initial(slots, start)), total, 0)
    torch.testing.assert_close(state.slots["moments"], (vector(3) + vector(5)) / 10)
    assert set(state.outer) == {"model/first", "model/second"}


def test_clipping_bounds_the_norm_over_all_slots():
    slots = {"a": slot(), "b": slot(), "mean": slot("average")}
    start = {n: torch.zeros(N, dtype=torch.float64) for n in slots}
    total = Contribution({"a": 10 * vector(0), "b": 10 * vector(1), "mean": 1e6 * vector(2)}, 10.0, 10)
    norm = math.sqrt(float(vector(0).square().sum() + vector(1).square().sum()))
    for limit, scale in ((0.5, 0.5 / norm), (100.0, 1.0)):
        state, report = OuterLoop(optimizer="sgd", lr=1.0, clip_norm=limit).update(slots, State(start, {}), total, 0)
        torch.testing.assert_close(state.slots["a"], -scale * vector(0))
        torch.testing.assert_close(state.slots["b"], -scale * vector(1))
        assert report["gradient_norm"] == pytest.approx(norm)


def test_the_weight_cancels():
    outer, slots = OuterLoop(lr=0.01), {"model": slot()}
    torch.testing.assert_close(
        run(outer, slots, weight=1.0).slots["model"], run(outer, slots, weight=512.0).slots["model"]
    )


def test_state_in_state_out():
    outer, slots = OuterLoop(), {"model": slot()}
    start = {"model": vector(0)}
    state = State(start, outer.initial(slots, start))
    before = {n: v.clone() for n, v in {**state.slots, **state.outer}.items()}
    outer.update(slots, state, Contribution({"model": vector(1)}, 1.0, 1), 0)
    assert all(v.equal(before[n]) for n, v in {**state.slots, **state.outer}.items())


def test_norm_is_of_every_element():
    for size in (1, 1023, 1024, 1025, 1_050_000):
        v = torch.randn(size, generator=torch.Generator().manual_seed(size))
        assert float(squared_norm(v)) == pytest.approx(math.fsum(v.double().square().tolist()), rel=1e-13)


@pytest.mark.parametrize(
    ("options", "key"),
    [
        ({"meta_steps": 0}, "outer.meta_steps"),
        ({"clip_norm": 0.0}, "outer.clip_norm"),
        ({"momentum": 0.9}, "outer.momentum"),
        ({"optimizer": "adma"}, "'adam'"),
        ({"schedule": "cosin"}, "'cosine'"),
    ],
)
def test_bad_settings_are_named(options, key):
    with pytest.raises(ConfigError, match=key):
        OuterLoop(**options)
