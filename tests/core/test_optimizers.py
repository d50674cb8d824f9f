"""Every optimiser of the table: the values of torch.optim, the bits of the formulas in one function, and properties."""

import itertools
from dataclasses import dataclass, replace

import pytest
import torch

from metadist.core.optimizers import OPTIMIZERS, SlotSettings
from metadist.core.outer import OuterLoop
from metadist.core.parameters import Layout
from metadist.core.schedules import SCHEDULES, Schedule
from metadist.core.state import Contribution, Slot, State
from metadist.core.transformations import (
    ClampToBounds,
    ClipByGlobalNorm,
    Momentum,
    ParameterGroup,
    Proposal,
    ScaleByAdam,
    ScaleBySchedule,
    TakeStep,
    Transformation,
    UpdateContext,
    chain,
)

N = 7
STEPS = 50
CONSTANT = Schedule("constant", 0.1, 0.0, STEPS)

#: name in OPTIMIZERS → the settings to test, each with the optimiser of torch that does the same
TORCH = {
    "sgd": [
        ({"lr": 0.1}, torch.optim.SGD, {"lr": 0.1}),
        (
            {"lr": 0.05, "momentum": 0.9, "weight_decay": 0.1},
            torch.optim.SGD,
            {"lr": 0.05, "momentum": 0.9, "weight_decay": 0.1},
        ),
    ],
    "adam": [
        ({"lr": 0.03, "betas": (0.8, 0.95)}, torch.optim.Adam, {"lr": 0.03, "betas": (0.8, 0.95)}),
        ({"lr": 0.03, "weight_decay": 0.2}, torch.optim.Adam, {"lr": 0.03, "weight_decay": 0.2}),
    ],
    "adamw": [({"lr": 0.03, "weight_decay": 0.2}, torch.optim.AdamW, {"lr": 0.03, "weight_decay": 0.2})],
}


def slot(rule="gradient", *, dtype=torch.float64, **options):
    return Slot(Layout(("w",), ((N,),), dtype), rule, **options)


def vector(seed, dtype=torch.float64):
    return torch.randn(N, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def gradient(theta, step):
    """The gradient of a bumpy bowl plus noise that depends on the step."""
    return theta + torch.sin(3 * theta) + 0.1 * vector(100 + step, theta.dtype)


def settings(name, momentum=None):
    group, layout = ParameterGroup(0.1), Layout(("m", "v"), ((2, 3), (1,)), torch.float64)
    return SlotSettings(name, group, CONSTANT, momentum, (0.9, 0.99), 1e-8, layout, ("m",))


def context(*, lr=0.1, weight_decay=0.0, bounds=(None, None), meta_step=0, updates=0, norm=1.0):
    return UpdateContext(ParameterGroup(lr, weight_decay, bounds), meta_step, updates, norm)


def test_every_optimiser_has_a_reference():
    elsewhere = {"muon", "schedule_free"}  # test_muon.py, test_averages.py
    assert TORCH.keys() | elsewhere == OPTIMIZERS.keys()


@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize(("name", "number"), [(name, i) for name, cases in TORCH.items() for i in range(len(cases))])
def test_fifty_steps_of_torch_optim(name, number, schedule):
    ours, optimizer, theirs = TORCH[name][number]
    outer = OuterLoop(optimizer=name, **ours, schedule=schedule, final_lr=0.001, meta_steps=STEPS)
    theta = torch.nn.Parameter(vector(0))
    reference = optimizer([theta], **theirs)
    scheduler = {
        "constant": lambda: torch.optim.lr_scheduler.LambdaLR(reference, lambda _: 1.0),
        "linear": lambda: torch.optim.lr_scheduler.LinearLR(reference, 1.0, 0.001 / outer.lr, STEPS),
        "cosine": lambda: torch.optim.lr_scheduler.CosineAnnealingLR(reference, STEPS, 0.001),
    }[schedule]()
    slots, start = {"model": slot()}, {"model": vector(0)}
    state = State(start, outer.initial(slots, start))
    for step in range(STEPS):
        assert outer.rate(outer.lr, step) == pytest.approx(scheduler.get_last_lr()[0], rel=1e-12)
        theta.grad = gradient(theta.detach(), step)
        reference.step()
        scheduler.step()
        total = Contribution({"model": 3.0 * gradient(state.slots["model"], step)}, 3.0, 3)
        state, _ = outer.update(slots, state, total, step)
    torch.testing.assert_close(state.slots["model"], theta.detach(), rtol=1e-12, atol=1e-13)


# Bit for bit ----------------------------------------------------------------------------------------------------------


def written_out(outer, slot, theta, gradient, memory, *, meta_step, before, norm):
    """The whole update of one slot in one function. Golden runs depend on the order of these operations."""
    rate = outer.rate(outer.lr if slot.lr is None else slot.lr, meta_step)
    decay = outer.weight_decay if slot.weight_decay is None else slot.weight_decay
    if outer.clip_norm is not None and norm > outer.clip_norm:
        gradient = gradient * (outer.clip_norm / norm)
    if decay and outer.optimizer == "adamw":
        theta = theta * (1 - rate * decay)
    elif decay:
        gradient = gradient + decay * theta
    if outer.optimizer == "sgd":
        if outer.momentum:
            gradient = memory["first"] = memory["first"] * outer.momentum + gradient
        theta = theta - rate * gradient
    else:
        beta1, beta2 = outer.betas
        memory["first"] = memory["first"] * beta1 + gradient * (1 - beta1)
        memory["second"] = memory["second"] * beta2 + gradient.square() * (1 - beta2)
        root = (memory["second"] / (1 - beta2 ** (before + 1))).sqrt() + outer.eps
        theta = theta - rate * (memory["first"] / (1 - beta1 ** (before + 1))) / root
    low, high = slot.bounds
    return theta if low is None and high is None else theta.clamp(low, high)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("name", TORCH)
def test_the_chain_has_the_bits_of_the_formulas(name, dtype):
    options = itertools.product(SCHEDULES, (None, 0.3, 1e6), (0.0, 0.07), (0.0, 0.9) if name == "sgd" else (None,))
    for schedule, clip, decay, momentum in options:
        outer = OuterLoop(
            optimizer=name,
            lr=0.037,
            final_lr=0.0013,
            schedule=schedule,
            momentum=momentum,
            betas=(0.85, 0.97),
            weight_decay=decay,
            clip_norm=clip,
            meta_steps=5,
        )
        slots = {
            "model": slot(dtype=dtype),
            "own": slot(dtype=dtype, lr=0.2, weight_decay=0.3, bounds=(-0.4, 0.5)),
            "half": slot(dtype=dtype, weight_decay=0.0, bounds=(None, 0.6)),
        }
        start = {n: vector(i, dtype) for i, n in enumerate(slots)}
        state = State(start, outer.initial(slots, start))
        theta, memory = dict(start), {n: {"first": torch.zeros(N, dtype=dtype)} for n in slots}
        for own in memory.values():
            own["second"] = own["first"].clone()
        for step in range(7):
            total = Contribution({n: 3.0 * gradient(v, step) for n, v in state.slots.items()}, 3.0, 3)
            state, report = outer.update(slots, state, total, step, count=2 * step)
            for n in slots:
                where = {"meta_step": step, "before": 2 * step, "norm": report["gradient_norm"]}
                theta[n] = written_out(outer, slots[n], theta[n], total.slots[n] / 3.0, memory[n], **where)
                assert state.slots[n].equal(theta[n])
                kept = {k.removeprefix(f"{n}/"): v for k, v in state.outer.items() if k.startswith(f"{n}/")}
                assert all(v.equal(memory[n][k]) for k, v in kept.items())


# Properties of every entry --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_memory_has_the_shape_and_dtype_of_the_slot(name):
    update, value = settings(name, 0.9).chain(), vector(0, torch.float32)
    memory = update.init(value)
    _, kept = update.update(Proposal(value, vector(1, torch.float32)), memory, context())
    assert list(kept) == list(memory)
    for tensor in (*memory.values(), *kept.values()):
        # a vector like the slot's, or one exact number
        assert (tensor.shape, tensor.dtype) in (((N,), torch.float32), ((1,), torch.float64))


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_the_update_changes_no_argument(name):
    update, value, slope = settings(name, 0.9).chain(), vector(0), vector(1)
    memory = update.init(value)
    before = [value.clone(), slope.clone(), *(v.clone() for v in memory.values())]
    for _ in range(2):
        update.update(Proposal(value, slope), memory, context(weight_decay=0.1))
        assert all(a.equal(b) for a, b in zip(before, [value, slope, *memory.values()]))


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_a_rate_of_zero_moves_nothing(name):
    update = settings(name).chain()
    proposal, _ = update.update(Proposal(vector(0), vector(1)), update.init(vector(0)), context(lr=0, weight_decay=0.5))
    assert proposal.value.equal(vector(0))


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_it_finds_the_minimum_of_a_quadratic(name):
    target, value = vector(5), vector(0)
    update = settings(name, 0.5).chain()
    memory = update.init(value)
    for step in range(500):
        at = context(updates=step, lr=0.5 / (1 + step / 20) if name == "muon" else 0.1)  # its steps do not shrink
        proposal, memory = update.update(Proposal(value, value - target), memory, at)
        value = proposal.value
    torch.testing.assert_close(value, target, rtol=0, atol=1e-2)


# Transformations ------------------------------------------------------------------------------------------------------


def test_clipping_scales_by_the_global_norm():
    clip, proposal = ClipByGlobalNorm(2.0), Proposal(vector(0), vector(1))
    for norm, scale in ((8.0, 0.25), (2.0, 1.0), (0.0, 1.0)):
        clipped, _ = clip.update(proposal, {}, context(norm=norm))
        assert clipped.direction.equal(scale * vector(1))


@pytest.mark.parametrize("bounds", [(None, None), (-0.1, None), (None, 0.2), (-0.1, 0.2)])
def test_bounds_may_be_one_sided(bounds):
    value = torch.linspace(-1, 1, 21, dtype=torch.float64)
    proposal, _ = ClampToBounds().update(Proposal(value, value), {}, context(bounds=bounds))
    low, high = bounds
    expected = [max(min(v, 1.0 if high is None else high), -1.0 if low is None else low) for v in value.tolist()]
    assert proposal.value.tolist() == expected


def test_a_part_behind_adam_sees_the_divided_step():
    update = chain(ScaleByAdam((0.9, 0.99), 1e-8), Momentum(0.5))
    with pytest.raises(ValueError, match="first"):
        update.init(vector(0))  # both keep a vector of this name
    adam, _ = update.parts[0].update(Proposal(vector(0), vector(1)), update.parts[0].init(vector(0)), context())
    trace, memory = Momentum(0.5).update(adam, {"first": vector(2)}, context())
    assert trace.divisor is None
    assert memory["first"].equal(0.5 * vector(2) + adam.direction / adam.divisor)


def test_a_chain_of_chains_is_the_flat_chain():
    parts = (ClipByGlobalNorm(0.5), Momentum(0.9), ScaleBySchedule(CONSTANT), TakeStep())
    proposal, at = Proposal(vector(0), vector(1)), context(norm=3.0)
    flat, nested = chain(*parts), chain(chain(*parts[:2]), chain(*parts[2:]))
    first, second = (c.update(proposal, c.init(proposal.value), at)[0].value for c in (flat, nested))
    assert first.equal(second)


@dataclass(frozen=True)
class RunningMean(Transformation):
    """A user's own transformation, for the end of a chain: the mean of the values so far."""

    def init(self, value):
        return {"mean": torch.zeros_like(value)}

    def update(self, proposal, memory, context):
        mean = memory["mean"] + (proposal.value - memory["mean"]) / (context.updates + 1)
        return proposal, {**memory, "mean": mean}


def test_a_transformation_after_the_step_can_average_the_values():
    update = chain(settings("sgd").chain(), RunningMean())
    value, seen = vector(0), []
    memory = update.init(value)
    for step in range(5):
        at = replace(context(), updates=step)
        proposal, memory = update.update(Proposal(value, gradient(value, step)), memory, at)
        value = proposal.value
        seen.append(value)
    torch.testing.assert_close(memory["mean"], torch.stack(seen).mean(0))
