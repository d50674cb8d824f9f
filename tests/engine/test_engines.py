"""Compare every engine with the plain autograd loop, in float64: eager and compiled, unrolled and mixed."""

from __future__ import annotations

import re
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import ClassVar

import pytest
import torch
from gradient_cases import (
    ALGORITHMS,
    CASES,
    MODELS,
    cnp_learner,
    make,
    plain_cnp,
    plain_contribution,
    plain_objective,
)
from toys import Blobs, Curves, Everything, Ragged, keys, learner, relative_error, somewhere, train

import metadist.engine.compiled as compiled_module
from metadist.algorithms import ANIL, CNP, MAML, Reptile
from metadist.core.engine import Engine
from metadist.core.errors import ConfigError, NonFiniteError
from metadist.core.inner_loop import InnerLoop
from metadist.core.outer import OuterLoop
from metadist.core.parameters import Layout, Parameters
from metadist.core.state import Slot
from metadist.core.task import Examples, Task
from metadist.engine.agreement import compiled_disagrees
from metadist.models import MLP, Transformer

HESSIANS = ("forward", "reverse")
SHARD = OuterLoop(meta_batch_size=6, shard_size=4, meta_steps=4)
PICTURES = (Blobs(input_shape=(1, 8, 8)), Transformer(patch=4, width=8, heads=2, dropout=0.1))


@pytest.fixture(autouse=True)
def transformer(monkeypatch):
    monkeypatch.setitem(MODELS, "transformer", PICTURES)


def check(subject, engine, shard, meta_step=3, tolerance=1e-10, objective=plain_objective):
    theta = somewhere(subject)
    expected, loss = plain_contribution(subject, theta, shard, objective)
    subject.set_engine(engine)
    got = subject.contribute(theta, shard, meta_step)
    assert got.slots.keys() == expected.keys()
    for slot, vector in expected.items():
        assert relative_error(got.slots[slot], vector) <= tolerance, slot
    assert got.metrics["loss"] == pytest.approx(loss, rel=1e-12)
    return got


# Mixed ----------------------------------------------------------------------------------------------------------------

WALKING = [(a, m) for a, m in CASES if isinstance(ALGORITHMS[a], InnerLoop)]


@pytest.mark.lane("numerics")
@pytest.mark.parametrize("hessian", HESSIANS)
@pytest.mark.parametrize(
    ("algorithm", "model"),
    [*WALKING, *((a, "transformer") for a in ("maml-5", "anil", "meta_sgd", "momentum", "adam", "minibatches"))],
)
def test_mixed(algorithm, model, hessian):
    check(make(ALGORITHMS[algorithm], model), Engine(differentiation="mixed", hessian=hessian), keys(0, 1, 5))


@pytest.mark.lane("numerics")
@pytest.mark.parametrize("hessian", HESSIANS)
def test_mixed_on_the_network_and_the_data_of_the_main_job(hessian, data):
    """At the initial θ, too: φ_0 is then the same memory for all tasks, and forward mode must not write to it."""
    from metadist.config.build import build as build_config
    from metadist.config.document import override, read_document

    document = override(
        read_document("omniglot_maml_5w1s"), ["algorithm.inner_steps=3", "engine.dtype=float64", "outer.shard_size=2"]
    )
    subject = build_config(document).learner
    subject.prepare(torch.device("cpu"))
    theta, shard = subject.initial(0).theta(subject.slots), keys(0, 1)
    expected, _ = plain_contribution(subject, theta, shard)
    subject.set_engine(Engine(differentiation="mixed", hessian=hessian))
    assert relative_error(subject.contribute(theta, shard, 3).slots["model"], expected["model"]) <= 1e-10


@pytest.mark.parametrize("algorithm", ["maml-5", "meta_sgd", "anil"])
@pytest.mark.parametrize("hessian", HESSIANS)
def test_mixed_with_frozen_parts(algorithm, hessian):
    subject = make(ALGORITHMS[algorithm], "own", freeze=("stem.*", "first.weight"))
    theta = subject.initial(0).theta(subject.slots)
    expected, _ = plain_contribution(subject, theta, keys(0, 1))
    subject.set_engine(Engine(differentiation="mixed", hessian=hessian))
    assert relative_error(subject.contribute(theta, keys(0, 1), 3).slots["model"], expected["model"]) <= 1e-10


@dataclass(frozen=True)
class EveryStep(MAML):
    """The objective has φ after every step, the inner loss a distance to θ, and the rate (one number) is learned."""

    whole_trajectory: ClassVar[bool] = True

    def slots(self, model, parameters):
        rate = Parameters({"alpha": torch.tensor(self.inner_lr, dtype=next(iter(parameters.values())).dtype)})
        return {"rate": (Slot(Layout.of(rate)), rate)}

    def descent(self, model, theta, support, context):
        plain = super().descent(model, theta, support, context)

        def loss(phi, step):
            return plain.loss(phi, step) + 0.3 * sum(
                (p - t).square().sum() for p, t in zip(phi.values(), theta["model"].values())
            )

        return replace(plain, loss=loss, rate=theta["rate"]["alpha"])

    def objective(self, model, theta, trajectory, task, context):
        losses = [context.loss(prediction := self.predict(model, phi, task.query.x), task.query) for phi in trajectory]
        return sum(loss * (i + 1) for i, loss in enumerate(losses)), prediction


@pytest.mark.parametrize("hessian", HESSIANS)
@pytest.mark.parametrize("optimizer", [{}, {"inner_momentum": 0.9}, {"inner_optimizer": "adam", "inner_eps": 1e-3}])
def test_mixed_follows_every_path_on_which_theta_comes_in(hessian, optimizer):
    subject = make(EveryStep(inner_lr=0.1, inner_steps=3, **optimizer), "mlp")
    theta, shard = somewhere(subject), keys(0, 1, 5)
    expected = subject.contribute(theta, shard, 3)
    subject.set_engine(Engine(differentiation="mixed", hessian=hessian))
    got = subject.contribute(theta, shard, 3)
    for slot in ("model", "rate"):
        assert relative_error(got.slots[slot], expected.slots[slot]) <= 1e-10, slot


def test_without_inner_steps_mixed_equals_unrolled():
    for subject in (
        make(ALGORITHMS["protonet"], "conv4-max-batch"),
        cnp_learner(),
        make(Reptile(inner_lr=0.1, inner_steps=2), "mlp"),
    ):
        theta = somewhere(subject)
        expected = subject.contribute(theta, keys(0, 1), 3)
        subject.set_engine(Engine(differentiation="mixed"))
        assert subject.contribute(theta, keys(0, 1), 3).slots["model"].equal(expected.slots["model"])


# Compiled -------------------------------------------------------------------------------------------------------------

UNROLLED, MIXED = Engine(compile=True), Engine(compile=True, differentiation="mixed")
LATE = [
    ("protonet", "conv4-stride-batch", UNROLLED),
    *((a, m, e) for a, m in WALKING for e in (UNROLLED, MIXED, replace(MIXED, hessian="reverse")) if a != "maml-1"),
    *((a, "transformer", e) for a in ("maml-5", "anil", "meta_sgd") for e in (UNROLLED, MIXED)),
    ("protonet", "conv4-max-batch", UNROLLED),
    ("protonet", "own", UNROLLED),
]


#: Inductor (2.13) gets the second order behind ``mean`` → ``layer_norm`` → ``x[:, order]`` wrong;
#: ``compiled_disagrees`` finds it
WRONG = pytest.mark.xfail(reason="a bug of Inductor; workers refuse such a graph", strict=False)


def late(algorithm, model, engine):
    marks = [pytest.mark.long, WRONG] if model == "own" and engine.differentiation == "unrolled" else pytest.mark.long
    return pytest.param(algorithm, model, engine, marks=marks)


def name_of(value):
    return f"{value.differentiation}-{value.hessian}" if isinstance(value, Engine) else None


@pytest.mark.lane("compile")
@pytest.mark.timeout(900)
@pytest.mark.parametrize(("algorithm", "model", "engine"), [late(*case) for case in LATE], ids=name_of)
def test_compiled(algorithm, model, engine):
    """Compute three tasks in a graph of four."""
    check(make(ALGORITHMS[algorithm], model, outer=SHARD), engine, keys(0, 1, 5))


@pytest.mark.lane("compile")
def test_compiled_cnp():
    subject = replace(cnp_learner(), outer=SHARD)
    assert isinstance(subject.algorithm, CNP)
    check(subject, UNROLLED, keys(0, 1, 5), objective=plain_cnp)


@pytest.mark.lane("compile")
@pytest.mark.parametrize("engine", [UNROLLED, MIXED], ids=name_of)
@pytest.mark.long
@pytest.mark.timeout(900)
def test_compiled_follows_every_path_on_which_theta_comes_in(engine):
    subject = make(EveryStep(inner_lr=0.1, inner_steps=3, inner_momentum=0.9), "mlp", outer=SHARD)
    theta, shard = somewhere(subject), keys(0, 1, 5)
    expected = subject.contribute(theta, shard, 3)
    subject.set_engine(engine)
    got = subject.contribute(theta, shard, 3)
    for slot in ("model", "rate"):
        assert relative_error(got.slots[slot], expected.slots[slot]) <= 1e-10, slot


@pytest.mark.lane("compile")
@pytest.mark.long
def test_compiled_reptile():
    """Another test compares the eager deltas with an optimiser's."""
    subject = make(Reptile(inner_lr=0.05, inner_steps=2, inner_optimizer="adam", moments="carried"), "mlp", outer=SHARD)
    theta, shard = somewhere(subject), keys(0, 1, 5)
    expected = subject.contribute(theta, shard, 3)
    subject.set_engine(UNROLLED)
    got = subject.contribute(theta, shard, 3)
    assert got.slots.keys() == expected.slots.keys() >= {"model", "inner_first", "inner_second", "inner_count"}
    for slot, vector in expected.slots.items():
        assert relative_error(got.slots[slot], vector) <= 1e-12, slot


class Noisy(torch.nn.Sequential):
    """A network with keyed dropout and batch norm that compiles quickly."""

    def __init__(self):
        norm = torch.nn.BatchNorm1d(6, track_running_stats=False)
        super().__init__(
            torch.nn.Linear(2, 6, bias=False), norm, torch.nn.Tanh(), torch.nn.Dropout(0.3), torch.nn.Linear(6, 2)
        )


SGD = replace(SHARD, optimizer="sgd", lr=0.1)


def noisy():
    return learner(MAML(inner_lr=0.1, inner_steps=2), Noisy, Curves(), outer=SGD)


@lru_cache
def compiled_noisy(differentiation="unrolled"):
    """Return the learner, compiled once for all tests."""
    subject = noisy()
    subject.set_engine(Engine(compile=True, differentiation=differentiation))
    return subject


@pytest.mark.lane("compile")
@pytest.mark.parametrize("differentiation", ["unrolled", pytest.param("mixed", marks=pytest.mark.long)])
@pytest.mark.timeout(900)
def test_one_graph_serves_every_meta_step_task_and_short_shard(differentiation):
    """Four meta-steps of two shards, the second short; dropout's masks differ in each."""
    ours, eager = compiled_noisy(differentiation), noisy()
    got, expected = train(ours, 4), train(eager, 4)
    graphs = len(ours._compiled._functions)
    assert relative_error(got.slots["model"], expected.slots["model"]) <= 1e-12
    theta = somewhere(ours)
    for meta_step, tasks in ((3, (0, 1, 5)), (9, (2, 7, 8, 11)), (3, (4,))):
        shard = keys(*tasks, seed=0, meta_step=meta_step)
        one, other = ours.contribute(theta, shard, meta_step), eager.contribute(theta, shard, meta_step)
        assert relative_error(one.slots["model"], other.slots["model"]) <= 1e-12
        assert one.metrics == pytest.approx(other.metrics, rel=1e-12)
        assert (one.weight, one.tasks) == (len(tasks), len(tasks))
    assert len(ours._compiled._functions) == graphs


@pytest.mark.lane("compile")
def test_the_padding_of_a_short_shard_has_no_effect():
    ours = compiled_noisy()
    theta, four = somewhere(ours), keys(0, 1, 5, 9, seed=0)
    tasks, keep = ours.sample(four), torch.tensor([True, True, True, False])
    run, sums = ours._compiled.runner(four.seed, four.split), []

    def spoilt(t):
        return torch.cat([t[:3], torch.full_like(t[3:], float("nan"))]) if t.is_floating_point() else t

    for filled in (tasks, torch.utils._pytree.tree_map(spoilt, tasks)):
        sums.append(ours._sum(run, theta, filled, four, 3, keep))
    sums.append(ours.contribute(theta, keys(0, 1, 5, seed=0), 3))
    assert all(s.slots["model"].equal(sums[0].slots["model"]) for s in sums)
    assert all(s.metrics == sums[0].metrics for s in sums)


class Spoiling:
    """A compiler with a bug: its results are a hundredth too large."""

    seconds = 0.0

    def runner(self, *static):
        def run(name, function, *arguments):
            return torch.utils._pytree.tree_map(
                lambda t: t * 1.01 if t.is_floating_point() else t, function(*arguments)
            )

        return run


@pytest.mark.lane("compile")
def test_a_right_graph_agrees():
    assert compiled_disagrees(compiled_noisy(), 0) is None


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_wrong_graph_is_found_before_it_is_used(dtype):
    subject = learner(MAML(inner_lr=0.1, inner_steps=2), Noisy, Curves(), outer=SHARD, dtype=dtype)
    subject.set_engine(UNROLLED)
    subject._compiled = Spoiling()
    assert re.fullmatch(r"is off by 1e-02 in slot model, where rounding explains .*", compiled_disagrees(subject, 0))


@pytest.mark.lane("compile")
def test_another_seed_and_split_are_not_served_by_the_same_graph():
    """Seed and split are constants of the graph: they key dropout."""

    def factory():
        return torch.nn.Sequential(torch.nn.Linear(2, 2), torch.nn.Dropout(0.5))

    ours, eager = (learner(MAML(inner_lr=0.1), factory, Curves(), outer=SHARD) for _ in range(2))
    ours.set_engine(UNROLLED)
    theta, sums = somewhere(ours), []
    for seed in (7, 8):
        shard = keys(0, 1, 2, 3, seed=seed)
        sums.append(ours.contribute(theta, shard, 3).slots["model"])
        assert relative_error(sums[-1], eager.contribute(theta, shard, 3).slots["model"]) <= 1e-12
    assert relative_error(sums[0], sums[1]) > 1e-2


@dataclass(frozen=True)
class Poisoned(Curves):
    poisoned: tuple[int, ...] = (12, 14)

    def sample(self, keys, split):
        task = super().sample(keys, split)
        bad = torch.isin(keys.tasks, torch.tensor(self.poisoned))
        return Task(task.support, Examples(task.query.x, torch.where(bad[..., None, None], float("nan"), task.query.y)))


@pytest.mark.lane("compile")
@pytest.mark.parametrize("differentiation", ["unrolled", pytest.param("mixed", marks=pytest.mark.long)])
def test_a_nan_in_a_compiled_shard(differentiation):
    def factory():
        return MLP(hidden=(4,)).build((2,), 2)

    def subject(family, **options):
        return learner(MAML(inner_steps=2), factory, family, outer=SHARD, **options)

    engine = Engine(compile=True, differentiation=differentiation)
    strict, lenient, healthy = subject(Poisoned()), subject(Poisoned(), non_finite="skip"), subject(Curves())
    strict.set_engine(engine), lenient.set_engine(engine)
    theta, shard = somewhere(strict), keys(11, 12, 13, 14)
    with pytest.raises(NonFiniteError, match=r"tasks \[12, 14\] gave NaN or Inf \(seed 7, meta-step 3\)") as caught:
        strict.contribute(theta, shard, 3)
    assert caught.value.tasks == (12, 14)
    got, expected = lenient.contribute(theta, shard, 3), healthy.contribute(theta, keys(11, 13), 3)
    assert (got.weight, got.tasks) == (2.0, 2)
    assert relative_error(got.slots["model"], expected.slots["model"]) < 1e-13
    short = lenient.contribute(theta, keys(11, 12), 3)
    assert (short.weight, short.tasks) == (1.0, 1)
    assert relative_error(short.slots["model"], healthy.contribute(theta, keys(11), 3).slots["model"]) < 1e-13


@pytest.mark.lane("compile")
def test_tasks_of_many_sizes_are_refused(monkeypatch):
    monkeypatch.setattr(compiled_module, "MAX_SIGNATURES", 1)
    subject = learner(ANIL(), lambda: MLP(hidden=(4,)).build((2,), 2), Ragged(Curves()), outer=OuterLoop(shard_size=1))
    subject.set_engine(UNROLLED)
    theta = somewhere(subject)
    subject.contribute(theta, keys(0), 3)
    with pytest.raises(ConfigError, match=r"engine.compile: .* more than 1 different shapes .* engine.compile=never"):
        subject.contribute(theta, keys(1), 3)


# Convolutions ---------------------------------------------------------------------------------------------------------


class Convolutions(Everything):
    """All kinds of convolutions: strides, padding, dilation, an oblong kernel, groups, circular padding."""

    def __init__(self):
        super().__init__()
        self.stem = torch.nn.Sequential(
            torch.nn.Conv2d(1, 4, (2, 3), stride=(1, 2), padding=(0, 1), dilation=(2, 1)),
            torch.nn.Conv2d(4, 4, 3, padding=1, groups=2),
            torch.nn.Conv2d(4, 4, 3, padding=1, padding_mode="circular", bias=False),
        )


@pytest.mark.lane("compile")
@pytest.mark.long
@pytest.mark.timeout(900)
@pytest.mark.parametrize("engine", [UNROLLED, MIXED], ids=name_of)
def test_compiled_convolutions_of_all_kinds(engine):
    check(learner(MAML(inner_lr=0.1), Convolutions, Blobs(input_shape=(1, 6, 6)), outer=SHARD), engine, keys(0, 1, 5))
