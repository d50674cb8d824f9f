"""Averages of θ: torch's AveragedModel, the equations of schedule-free learning in float64, states that hold both."""

import math

import pytest
import torch
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from metadist.core.outer import OuterLoop
from metadist.core.parameters import Layout
from metadist.core.state import Contribution, Slot, State

N, STEPS = 7, 40


def vector(seed):
    return torch.randn(N, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def gradient(theta, step):
    return theta + torch.sin(3 * theta) + 0.1 * vector(100 + step)


def states(outer, slot=None, steps=STEPS):
    """The state after each of ``steps`` updates of one slot."""
    slots = {"model": slot or Slot(Layout(("w",), ((N,),), torch.float64))}
    start = {"model": vector(0)}
    state, found = State(start, outer.initial(slots, start)), []
    for step in range(steps):
        total = Contribution({"model": 3.0 * gradient(state.slots["model"], step)}, 3.0, 3)
        state, _ = outer.update(slots, state, total, step)
        found.append(state)
    return found


def averaged(state):
    return state.judged().slots["model"]


def test_an_exponential_average_is_that_of_torch():
    got = states(OuterLoop(lr=0.05, ema=0.9))
    plain = states(OuterLoop(lr=0.05))
    module = torch.nn.Linear(N, 1, bias=False, dtype=torch.float64)
    reference = AveragedModel(module, multi_avg_fn=get_ema_multi_avg_fn(0.9))
    for state, trained in zip(got, plain):
        assert state.slots["model"].equal(trained.slots["model"]), "the average changes no bit of training"
        module.weight.data = trained.slots["model"].unsqueeze(0)
        reference.update_parameters(module)
        torch.testing.assert_close(averaged(state), reference.module.weight.detach()[0], rtol=1e-13, atol=1e-14)


def test_a_tail_is_a_share_and_not_its_rounding_error():
    """0.07 · 100 is 7.000000000000001 in floating point."""
    slot = Slot(Layout(("w",), ((N,),), torch.float64))
    assert OuterLoop(tail=0.07, meta_steps=100).settings("model", slot).tail_start == 93


@pytest.mark.parametrize(("tail", "first"), [(0.25, 30), (0.02, 39), (1.0, 0)])
def test_a_tail_average_is_that_of_torch(tail, first):
    got = states(OuterLoop(lr=0.05, tail=tail, meta_steps=STEPS))
    module = torch.nn.Linear(N, 1, bias=False, dtype=torch.float64)
    reference = AveragedModel(module)
    for step, (state, trained) in enumerate(zip(got, states(OuterLoop(lr=0.05)))):
        assert state.slots["model"].equal(trained.slots["model"])
        module.weight.data = trained.slots["model"].unsqueeze(0)
        if step >= first:
            reference.update_parameters(module)
        expected = reference.module.weight.detach()[0] if step >= first else trained.slots["model"]
        torch.testing.assert_close(averaged(state), expected, rtol=1e-13, atol=1e-14)


@pytest.mark.parametrize(("warmup", "decay"), [(0, 0.0), (10, 0.0), (5, 0.3)])
def test_schedule_free_is_algorithm_1(warmup, decay):
    """Defazio et al. 2024, algorithm 1, with Adam's bias correction of v in place of one in the rate."""
    lr, (beta1, beta2), eps = 0.05, (0.8, 0.95), 1e-8
    z = x = y = vector(0)
    v, weights = torch.zeros_like(z), 0.0
    outer = OuterLoop(optimizer="schedule_free", lr=lr, betas=(beta1, beta2), weight_decay=decay, warmup=warmup)
    for step, state in enumerate(states(outer)):
        g, t = gradient(y, step), step + 1
        v = beta2 * v + (1 - beta2) * g * g
        rate = lr * min(1.0, t / warmup) if warmup else lr
        z = z - rate * g / ((v / (1 - beta2**t)).sqrt() + eps) - rate * decay * y
        weights += rate**2
        c = rate**2 / weights
        x = (1 - c) * x + c * z
        y = (1 - beta1) * z + beta1 * x
        torch.testing.assert_close(state.slots["model"], y, rtol=1e-12, atol=1e-13)
        torch.testing.assert_close(averaged(state), x, rtol=1e-12, atol=1e-13)


def test_schedule_free_goes_below_the_noise_of_adamw():
    """On a quadratic with noise, the average converges at a constant rate where AdamW's iterate does not."""
    generator, target = torch.Generator().manual_seed(3), vector(5)
    slots, start = {"model": Slot(Layout(("w",), ((N,),), torch.float64))}, {"model": vector(0)}
    errors = {}
    for name in ("adamw", "schedule_free"):
        outer = OuterLoop(optimizer=name, lr=0.1)
        state = State(start, outer.initial(slots, start))
        for step in range(400):
            noise = torch.randn(N, generator=generator, dtype=torch.float64)
            total = Contribution({"model": state.slots["model"] - target + noise}, 1.0, 1)
            state, _ = outer.update(slots, state, total, step)
        errors[name] = float((averaged(state) - target).norm())
    assert errors["schedule_free"] < 0.5 * errors["adamw"]


@pytest.mark.parametrize("options", [{"ema": 0.8}, {"tail": 1.0}, {"optimizer": "schedule_free"}])
def test_averages_stay_within_the_bounds_of_a_slot(options):
    slot = Slot(Layout(("w",), ((N,),), torch.float64), bounds=(-0.3, 0.2))
    for state in states(OuterLoop(lr=0.1, meta_steps=STEPS, **options), slot):
        for held in (state, state.judged()):
            assert held.slots["model"].min() >= -0.3 and held.slots["model"].max() <= 0.2


def test_a_state_says_what_is_judged_and_keeps_both():
    state = states(OuterLoop(lr=0.1, ema=0.9), steps=3)[-1]
    assert state.weights == "averaged" and state.judged().outer is state.outer
    assert not state.judged().slots["model"].equal(state.slots["model"])
    assert state.judged().judged().sha256() == state.judged().sha256() != state.sha256()
    assert state.trained().weights == "trained" and state.trained().judged().sha256() == state.sha256()
    plain = states(OuterLoop(lr=0.1), steps=3)[-1]
    assert plain.weights == "trained" and plain.judged() is plain


def test_slots_that_are_not_learned_have_no_average():
    layout = Layout(("w",), ((N,),), torch.float64)
    slots = {"model": Slot(layout), "moments": Slot(layout, "average"), "fixed": Slot(layout, "constant")}
    start = {n: vector(i) for i, n in enumerate(slots)}
    outer = OuterLoop(ema=0.5, optimizer="sgd", lr=0.1)
    state = State(start, outer.initial(slots, start))
    for step in range(3):
        state, _ = outer.update(slots, state, Contribution({"model": vector(7), "moments": vector(8)}, 1.0, 1), step)
    assert set(state.outer) == {"model/average"}
    assert state.judged().slots["moments"].equal(vector(8)) and state.judged().slots["fixed"].equal(start["fixed"])


def test_the_count_of_updates_begins_the_exponential_average():
    """Where a meta-step makes several updates, the average starts at the first of them."""
    slots, start = {"model": Slot(Layout(("w",), ((N,),), torch.float64))}, {"model": vector(0)}
    outer = OuterLoop(ema=0.9, optimizer="sgd", lr=1.0)
    state, values = State(start, outer.initial(slots, start)), []
    for count in range(3):
        state, _ = outer.update(slots, state, Contribution({"model": vector(count)}, 1.0, 1), 0, count=count)
        values.append(state.slots["model"])
    expected = 0.9 * (0.9 * values[0] + 0.1 * values[1]) + 0.1 * values[2]
    torch.testing.assert_close(averaged(state), expected)
    assert math.isclose(float(averaged(state).sum()), float(expected.sum()))
