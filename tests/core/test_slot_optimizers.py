"""Warm-up, clipping by value, an optimiser for each slot; every setting counts, and settings without an effect are
refused.
"""

import math
from dataclasses import fields, replace

import pytest
import torch
import toys

from metadist.algorithms import MetaSGD
from metadist.core.errors import ConfigError
from metadist.core.optimizers import OPTIMIZERS
from metadist.core.outer import OuterLoop, SlotOptimizer
from metadist.core.parameters import Layout
from metadist.core.round import MetaStepKey
from metadist.core.schedules import SCHEDULES, Schedule
from metadist.core.state import Contribution, Slot, State, TreeSum
from metadist.models import MLP

SHAPE, STEPS = (3, 4), 12
LAYOUT = Layout(("w",), (SHAPE,), torch.float64)


def vector(seed):
    return torch.randn(math.prod(SHAPE), generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def gradient(theta, step):
    return theta + torch.sin(3 * theta) + 0.1 * vector(100 + step)


def slots(*names, **options):
    return {n: Slot(LAYOUT, matrices=("w",), **options) for n in names or ("model", "rates")}


def run(outer, declared=None, steps=STEPS):
    declared = declared or slots()
    start = {n: vector(i) for i, n in enumerate(declared)}
    state, reports = State(start, outer.initial(declared, start)), []
    for step in range(steps):
        total = Contribution({n: 3.0 * gradient(v, step) for n, v in state.slots.items()}, 3.0, 3)
        state, report = outer.update(declared, state, total, step)
        reports.append(report)
    return state, reports


# Warm-up --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("warmup", [0, 1, 5])
def test_a_warm_up_in_front_of_every_schedule_is_that_of_torch(schedule, warmup):
    lr, final, scheduled = 0.2, 0.02, 30 - warmup
    reference = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=lr)
    rates = torch.optim.lr_scheduler
    later = {
        "constant": lambda: rates.LambdaLR(reference, lambda _: 1.0),
        "linear": lambda: rates.LinearLR(reference, 1.0, final / lr, scheduled),
        "cosine": lambda: rates.CosineAnnealingLR(reference, scheduled, final),
    }[schedule]
    if warmup > 1:
        first = rates.LinearLR(reference, 1 / warmup, 1.0, warmup - 1)
        scheduler = rates.SequentialLR(reference, [first, later()], [warmup])
    elif warmup:
        scheduler = rates.SequentialLR(reference, [rates.LambdaLR(reference, lambda _: 1.0), later()], [1])
    else:
        scheduler = later()
    ours = Schedule(schedule, lr, final, 30, warmup)
    for step in range(30):
        assert ours.rate(lr, step) == pytest.approx(scheduler.get_last_lr()[0], rel=1e-12)
        assert ours.rate(3 * lr, step) == pytest.approx(3 * ours.rate(lr, step))
        reference.step()
        scheduler.step()


def test_a_run_that_ends_in_its_warm_up_is_told():
    assert "ends in its warm-up" in OuterLoop(warmup=10, meta_steps=10).remarks()[0]
    assert OuterLoop(warmup=9, meta_steps=10).remarks() == []
    assert "averaged (ema: 0.9)" in OuterLoop(ema=0.9).remarks()[0]


# Clipping -------------------------------------------------------------------------------------------------------------


def test_clipping_is_by_value_first_and_then_by_the_norm_of_the_clipped_gradients():
    declared = slots()
    start = {n: torch.zeros_like(vector(0)) for n in declared}
    means = {"model": vector(8), "rates": 5 * vector(9)}
    outer = OuterLoop(optimizer="sgd", lr=1.0, clip_value=0.7, clip_norm=0.5)
    state, report = outer.update(declared, State(start), Contribution({n: 2 * v for n, v in means.items()}, 2.0, 2), 0)
    parameters = [torch.nn.Parameter(start[n].clone()) for n in means]
    for parameter, mean in zip(parameters, means.values()):
        parameter.grad = mean.clone()
    norm = float(torch.cat(list(means.values())).norm())
    torch.nn.utils.clip_grad_value_(parameters, 0.7)
    torch.nn.utils.clip_grad_norm_(parameters, 0.5, error_if_nonfinite=True)
    for name, parameter in zip(means, parameters):
        torch.testing.assert_close(state.slots[name], -parameter.grad, rtol=1e-5, atol=0)  # torch adds 1e-6 to the norm
    assert report["gradient_norm"] == pytest.approx(norm), "the log has the norm before clipping"


def test_a_slot_with_a_bound_of_its_own_is_clipped_alone():
    declared = slots("model", "rates", "others")
    start = {n: torch.zeros_like(vector(0)) for n in declared}
    means = {n: (i + 1) * vector(i) for i, n in enumerate(declared)}
    own = {"rates": SlotOptimizer(clip_norm=0.1), "others": SlotOptimizer(clip_value=0.2)}
    outer = OuterLoop(optimizer="sgd", lr=1.0, clip_norm=0.5, optimizers=own)
    state, _ = outer.update(declared, State(start), Contribution(means, 1.0, 1), 0)
    clipped = {**means, "others": means["others"].clamp(-0.2, 0.2)}
    together = float(torch.cat([clipped["model"], clipped["others"]]).norm())
    expected = {
        "model": clipped["model"] * (0.5 / together),
        "rates": means["rates"] * (0.1 / float(means["rates"].norm())),
        "others": clipped["others"] * (0.5 / together),
    }
    for name in declared:
        torch.testing.assert_close(state.slots[name], -expected[name], rtol=1e-12, atol=1e-14)


# An optimiser for each slot -------------------------------------------------------------------------------------------

OWN = {
    "sgd": SlotOptimizer(optimizer="sgd", lr=0.1, schedule="linear", final_lr=0.01, momentum=0.8),
    "adamw": SlotOptimizer(optimizer="adamw", schedule="cosine", warmup=3, betas=(0.8, 0.9), weight_decay=0.2),
    "schedule_free": SlotOptimizer(optimizer="schedule_free", eps=1e-6, warmup=2),
    "muon": SlotOptimizer(optimizer="muon", lr=0.05, clip_value=0.5, clip_norm=0.4),
}


@pytest.mark.parametrize("name", OWN)
def test_a_slot_learns_as_in_a_run_of_its_own(name):
    """With every setting of the slot as one of the whole loop: the same bits, whatever the other slot does."""
    own, base = OWN[name], OuterLoop(lr=0.02, meta_steps=STEPS)
    state, reports = run(replace(base, optimizers={"rates": own}))
    given = {f.name: getattr(own, f.name) for f in fields(own) if getattr(own, f.name) is not None}
    start, alone = {"rates": vector(1)}, slots("rates")
    outer = replace(base, **given)
    expected = State(start, outer.initial(alone, start))
    for step in range(STEPS):
        total = Contribution({"rates": 3.0 * gradient(expected.slots["rates"], step)}, 3.0, 3)
        expected, report = outer.update(alone, expected, total, step)
        assert reports[step]["lr/rates"] == report["lr"]
    assert state.slots["rates"].equal(expected.slots["rates"])
    assert {n for n in state.outer if n.startswith("rates/")} == expected.outer.keys()
    assert all(v.equal(expected.outer[n]) for n, v in state.outer.items() if n.startswith("rates/"))
    assert state.slots["model"].equal(run(base)[0].slots["model"])


def test_settings_fall_back_on_the_slot_and_then_on_the_outer_loop():
    declared = {"model": slots()["model"], "rates": replace(slots()["rates"], lr=0.3, weight_decay=0.0)}
    outer = OuterLoop(lr=0.1, final_lr=0.01, schedule="cosine", weight_decay=0.5, optimizers={"rates": SlotOptimizer()})
    found = outer.settings("rates", declared["rates"])
    assert (found.group.lr, found.group.weight_decay, found.optimizer) == (0.3, 0.0, "adam")
    assert found.schedule.rate(0.3, outer.meta_steps) == pytest.approx(0.03), "the ratio is that of the outer loop"
    own = SlotOptimizer(weight_decay=0.2, final_lr=0.15)
    found = replace(outer, optimizers={"rates": own}).settings("rates", declared["rates"])
    assert found.group.weight_decay == 0.2
    assert found.schedule.rate(0.3, outer.meta_steps) == pytest.approx(0.15)


# Every setting counts -------------------------------------------------------------------------------------------------

#: field of OuterLoop → a loop in which it counts, and another value
CHANGES = {
    "optimizer": ({"weight_decay": 0.1}, "adamw"),
    "lr": ({}, 0.03),
    "final_lr": ({"schedule": "linear"}, 0.005),
    "schedule": ({}, "cosine"),
    "warmup": ({}, 4),
    "momentum": ({"optimizer": "sgd"}, 0.5),
    "betas": ({}, (0.8, 0.999)),
    "eps": ({}, 1e-3),
    "weight_decay": ({"optimizer": "adamw"}, 0.1),
    "clip_norm": ({"optimizer": "sgd"}, 0.1),
    "clip_value": ({"optimizer": "sgd"}, 0.1),
    "ema": ({"ema": 0.9}, 0.8),
    "tail": ({"tail": 0.5}, 0.25),
    "optimizers": ({}, {"rates": SlotOptimizer(lr=0.5)}),
    "meta_steps": ({"schedule": "cosine"}, 2 * STEPS),
}
#: fields that decide which tasks a meta-step sums, not the update
SIZES = {"meta_batch_size", "shard_size"}


def hashes(outer):
    state, _ = run(outer)
    return state.sha256(), state.judged().sha256()


def test_every_field_of_the_outer_loop_changes_the_bits():
    assert CHANGES.keys() == {f.name for f in fields(OuterLoop)} - SIZES
    for name, (options, value) in CHANGES.items():
        outer = OuterLoop(**{"lr": 0.02, "meta_steps": STEPS, **options})
        assert hashes(outer) == hashes(outer)
        assert hashes(outer) != hashes(replace(outer, **{name: value})), name


def test_every_field_of_a_slot_s_optimiser_changes_the_bits_of_the_slot_alone():
    assert {f.name for f in fields(SlotOptimizer)} <= CHANGES.keys()
    for field in fields(SlotOptimizer):
        options, value = CHANGES[field.name]
        outer = OuterLoop(**{"lr": 0.02, "meta_steps": STEPS, **options})
        before, _ = run(outer)
        after, _ = run(replace(outer, optimizers={"rates": SlotOptimizer(**{field.name: value})}))
        assert not after.slots["rates"].equal(before.slots["rates"]), field.name
        assert after.slots["model"].equal(before.slots["model"]), field.name


@pytest.mark.parametrize("change", [{"name": "linear"}, {"final_lr": 0.05}, {"meta_steps": 20}, {"warmup": 3}])
def test_every_field_of_a_schedule_changes_a_rate(change):
    schedule = Schedule("cosine", 0.1, 0.01, 10, 0)
    assert any(schedule.rate(0.1, t) != replace(schedule, **change).rate(0.1, t) for t in range(10))
    assert schedule.rate(0.1, 10) != replace(schedule, lr=0.2).rate(0.1, 10), "the ratio of the rates"


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_the_order_of_the_shards_is_irrelevant(name):
    """0, 1 or 2 workers differ in the order in which shards arrive; the state, averages included, does not."""
    outer = OuterLoop(optimizer=name, meta_batch_size=5, shard_size=2, clip_value=0.05, clip_norm=0.1, warmup=2)
    outer = outer if OPTIMIZERS[name].averages else replace(outer, ema=0.9)
    subject = toys.learner(MetaSGD(), lambda: MLP(hidden=(6,)).build((2,), 2), toys.Curves(), outer=outer)
    found = []
    for order in ((0, 1, 2), (2, 0, 1), (1, 2, 0)):
        state = subject.initial(0)
        for step in range(2):
            rounds = subject.meta_step(MetaStepKey("run", step, 0), state)
            shards, total = next(rounds).shards, TreeSum(3)
            for i in order:
                total.add(i, subject.compute(shards[i], state.slots))
            with pytest.raises(StopIteration) as done:
                rounds.send(total.result())
            state = done.value.value[0]
        found.append((state.sha256(), state.judged().sha256()))
    assert len(set(found)) == 1 and found[0][0] != found[0][1]


# Refusals -------------------------------------------------------------------------------------------------------------

REFUSED = {
    "outer.momentum: 0.9 goes with optimizer: sgd or muon; adam has betas": {"momentum": 0.9},
    "outer.warmup: -1 is below 0": {"warmup": -1},
    "outer.clip_value: 0.0 is not above 0": {"clip_value": 0.0},
    "outer.ema: 1.0 is not a number in [0, 1)": {"ema": 1.0},
    "outer.tail: 0.0 is not a number in (0, 1]": {"tail": 0.0},
    "outer: ema: 0.9 and tail: 0.5 would each average": {"ema": 0.9, "tail": 0.5},
    "outer: ema: 0.9 and optimizer: schedule_free would each average": {"ema": 0.9, "optimizer": "schedule_free"},
    "outer.schedule: cosine with optimizer: schedule_free": {"schedule": "cosine", "optimizer": "schedule_free"},
    "outer.optimizers.rates.betas: (0.9, 0.9) goes with optimizer: adam or": {
        "optimizers": {"rates": SlotOptimizer(optimizer="sgd", betas=(0.9, 0.9))}
    },
    "outer.optimizers.rates.final_lr: 0.1 has no effect with schedule: constant": {
        "optimizers": {"rates": SlotOptimizer(final_lr=0.1)}
    },
    "outer.optimizers.rates.schedule: linear with optimizer: schedule_free": {
        "schedule": "linear",
        "optimizers": {"rates": SlotOptimizer(optimizer="schedule_free")},
    },
    "outer.optimizers.rates.lr: nan is not a finite number": {"optimizers": {"rates": SlotOptimizer(lr=math.nan)}},
    "outer.optimizers.rates: expected a SlotOptimizer, got {'lr': 1}": {"optimizers": {"rates": {"lr": 1}}},
}


@pytest.mark.parametrize("message", REFUSED)
def test_settings_that_exclude_each_other_are_refused(message):
    with pytest.raises(ConfigError) as refused:
        OuterLoop(**REFUSED[message])
    assert message in str(refused.value) and "\n" not in str(refused.value)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"final_lr": 1e-4}, "outer.final_lr: 0.0001 has no effect with schedule: constant; use linear or cosine"),
        ({"optimizer": "sgd", "betas": (0.8, 0.9)}, "outer.betas: (0.8, 0.9) goes with optimizer: adam or adamw or"),
        ({"optimizer": "sgd", "eps": 1e-3}, "outer.eps: 0.001 goes with optimizer: adam or"),
    ],
)
def test_settings_without_an_effect_are_refused_in_new_runs(options, message):
    outer = OuterLoop(**options)  # a run of an earlier version may have them
    with pytest.raises(ConfigError) as refused:
        outer.refuse_without_effect()
    assert message in str(refused.value) and "\n" not in str(refused.value)
    for name in ("lr", "weight_decay", "clip_norm"):
        OuterLoop(**{name: 0.5}).refuse_without_effect()


def meta_sgd(outer, **options):
    return toys.learner(MetaSGD(**options), lambda: MLP(hidden=(6,)).build((2,), 2), toys.Curves(), outer=outer)


def test_unknown_slots_are_refused_with_the_names_of_the_slots():
    for name, message in {
        "inner_rl": "is not in this experiment; expected one of model, inner_lr; did you mean 'inner_lr'",
        "order": "slot 'order' is not in this experiment",
    }.items():
        with pytest.raises(ConfigError, match="outer.optimizers." + name) as refused:
            meta_sgd(OuterLoop(optimizers={name: SlotOptimizer(lr=0.1)}))
        assert message in str(refused.value)
    with pytest.raises(ConfigError, match="slot 'fixed' is constant and has no optimiser; expected one of model"):
        OuterLoop(optimizers={"fixed": SlotOptimizer()}).check_slots(
            {**slots("model"), "fixed": Slot(LAYOUT, "constant")}
        )


def test_a_rate_is_given_once():
    outer = OuterLoop(optimizers={"inner_lr": SlotOptimizer(lr=0.1)})
    with pytest.raises(ConfigError, match="inner_lr.lr: 0.1, but the algorithm gives slot 'inner_lr' the rate 0.2"):
        meta_sgd(outer, lr_of_inner_lr=0.2)
    meta_sgd(outer)


def test_whether_more_meta_steps_continue_the_trajectory():
    assert OuterLoop(warmup=5, ema=0.9).open_ended
    for options in (
        {"schedule": "linear"},
        {"tail": 0.5},
        {"optimizers": {"model": SlotOptimizer(schedule="cosine")}},
    ):
        assert not OuterLoop(**options).open_ended


@pytest.mark.parametrize(
    "settings",
    [
        {"final_lr": 0.01, "optimizers": {"rates": SlotOptimizer(schedule="linear")}},
        {"optimizer": "sgd", "betas": (0.5, 0.6), "optimizers": {"rates": SlotOptimizer(optimizer="adam")}},
        {"momentum": 0.5, "optimizers": {"rates": SlotOptimizer(optimizer="sgd")}},
    ],
)
def test_a_setting_that_only_a_slot_inherits_has_an_effect(settings):
    outer = OuterLoop(lr=0.1, meta_steps=10, **settings)
    outer.refuse_without_effect()
    (name,) = settings.keys() - {"optimizer", "optimizers"}
    used = outer.settings("rates", slots()["rates"])
    assert settings[name] == (used.schedule.final_lr if name == "final_lr" else getattr(used, name))
    own = {"final_lr": 0.02, "betas": (0.7, 0.8), "momentum": 0.7}[name]
    ((_, slot),) = settings["optimizers"].items()
    overridden = {**settings, "optimizers": {"rates": replace(slot, **{name: own})}}
    with pytest.raises(ConfigError, match=f"outer.{name}: "):  # nobody uses that of the outer loop now
        OuterLoop(lr=0.1, meta_steps=10, **overridden).refuse_without_effect()
