"""An inner optimiser of one's own: the extension point ``update``, in every engine, near θ_0 and away from it."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import ClassVar

import pytest
import torch
from toys import Curves, keys, learner, relative_error

from metadist.algorithms import MAML, MetaSGD
from metadist.core.engine import Engine
from metadist.core.inner_loop import InnerLoop, Moments
from metadist.core.outer import OuterLoop
from metadist.engine.agreement import compiled_disagrees, mixed_disagrees, perturbed_theta
from metadist.engine.compiled import Compiled
from metadist.engine.memory import float64_within, footprint
from metadist.engine.subject import initial_theta
from metadist.models import MLP

SHARD = OuterLoop(meta_batch_size=4, shard_size=4, meta_steps=4)
COMPILED_MIXED = Engine(compile=True, differentiation="mixed", hessian="forward")
#: larger than every element of an inner gradient near θ_0
LIMIT = 1.0


def clipped(gradient):
    return gradient.map(lambda t: t.clamp(-LIMIT, LIMIT))


def norm(gradient):
    return sum(t.square().sum() for t in gradient.values()).sqrt()


@dataclass(frozen=True)
class Clipped(MAML):
    """Clips the inner gradient, which does nothing near θ_0."""

    def update(self, phi, gradient, rate, moments):
        return super().update(phi, clipped(gradient), rate, moments)


@dataclass(frozen=True)
class ClippedByNorm(MAML):
    def update(self, phi, gradient, rate, moments):
        return super().update(phi, gradient * (0.3 / norm(gradient)).clamp(max=1.0), rate, moments)


@dataclass(frozen=True)
class WronglyDeclared(Clipped):
    linear_optimizers: ClassVar[tuple[str, ...]] = ("sgd",)

    def update(self, phi, gradient, rate, moments):
        return super().update(phi, gradient, rate, moments)


@dataclass(frozen=True)
class Decayed(MAML):
    """Divides the rate by the number of steps: moments without vectors, with a count."""

    def update(self, phi, gradient, rate, moments):
        phi, _ = super().update(phi, gradient, rate, moments)
        count = moments.count + 1
        return phi - gradient * (0.5 / count), Moments(moments.first, moments.second, count, moments.counted)


@dataclass(frozen=True)
class SquaredMomentum(MAML):
    """A momentum of squares: nonlinear in the moments."""

    def fresh(self, phi):
        return Moments(phi.zeros(), phi.zeros())

    def update(self, phi, gradient, rate, moments):
        first = moments.first * 0.9 + gradient.square() * 0.1
        return phi - gradient * rate - first * 0.05, replace(moments, first=first, count=moments.count + 1)


class Clip:
    """The same clipping as a mix-in beside MAML."""

    def update(self, phi, gradient, rate, moments):
        return super().update(phi, clipped(gradient), rate, moments)


@dataclass(frozen=True)
class Mixed(Clip, MetaSGD):
    pass


def subject_of(algorithm, dtype=torch.float64):
    return learner(algorithm, lambda: MLP(hidden=(16, 16)).build((2,), 2), Curves(), outer=SHARD, dtype=dtype)


def far(subject):
    """θ where the clipping acts."""
    return {
        n: p * 3.0 if subject.slots[n].rule == "gradient" and n == "model" else p
        for n, p in initial_theta(subject, 0).items()
    }


OWN = {
    "clipped": Clipped(inner_lr=0.3, inner_steps=3),
    "clipped-momentum": Clipped(inner_lr=0.1, inner_steps=3, inner_momentum=0.9),
    "clipped-adam": Clipped(inner_lr=0.05, inner_steps=3, inner_optimizer="adam", inner_eps=1e-4),
    "clipped-by-norm": ClippedByNorm(inner_lr=0.3, inner_steps=3),
    "decayed": Decayed(inner_lr=0.1, inner_steps=3),
    "squares": SquaredMomentum(inner_lr=0.1, inner_steps=3),
    "mix-in": Mixed(inner_lr=0.3, inner_steps=3),
}


def eagerly(self, name, function, spec, tensors):
    """In the place of ``Compiled._compile``: the function with the first call's numbers, as a graph has them."""

    def flat(*tensors):
        return torch.utils._pytree.tree_leaves(function(*torch.utils._pytree.tree_unflatten(tensors, spec)))

    returned = function(*torch.utils._pytree.tree_unflatten(tensors, spec))
    return flat, torch.utils._pytree.tree_structure(returned)


@pytest.mark.lane("numerics")
@pytest.mark.parametrize("name", OWN)
@pytest.mark.parametrize("changes", [{}, {"hessian": "reverse"}, {"compile": False}])
def test_every_way_back_follows_an_own_update(name, changes, monkeypatch):
    monkeypatch.setattr(Compiled, "_compile", eagerly)
    subject = subject_of(OWN[name])
    for theta in (initial_theta(subject, 0), far(subject)):
        subject.set_engine(Engine())
        expected = subject.contribute(theta, keys(0, 1, 2), 0)
        subject.set_engine(replace(COMPILED_MIXED, **changes))
        got = subject.contribute(theta, keys(0, 1, 2), 0)
        for slot, vector in expected.slots.items():
            assert relative_error(got.slots[slot], vector) < 1e-10, slot


@pytest.mark.lane("compile")
@pytest.mark.long
@pytest.mark.parametrize("name", ["clipped", "decayed"])
@pytest.mark.timeout(900)
def test_compiled_too(name):
    subject = subject_of(OWN[name])
    theta = far(subject)
    expected = subject.contribute(theta, keys(0, 1, 2), 0)
    subject.set_engine(COMPILED_MIXED)
    assert relative_error(subject.contribute(theta, keys(0, 1, 2), 0).slots["model"], expected.slots["model"]) < 1e-10
    assert compiled_disagrees(subject, 0) is None


def test_linearity_is_declared_by_the_class_that_defines_the_update():
    assert MAML().update_is_linear and MetaSGD().update_is_linear
    assert not MAML(inner_optimizer="adam").update_is_linear
    assert not Clipped().update_is_linear and not Mixed().update_is_linear
    assert WronglyDeclared().update_is_linear
    assert InnerLoop.linear_optimizers == ("sgd",)


def test_a_wrong_declaration_is_found_away_from_the_initial_parameters():
    """At θ_0 the clipping does nothing, and the comparison there finds nothing."""
    wrong, right = subject_of(WronglyDeclared(inner_lr=0.3, inner_steps=3)), subject_of(OWN["clipped"])
    engine = Engine(differentiation="mixed", hessian="forward")
    assert "is off by" in mixed_disagrees(wrong, engine)
    assert mixed_disagrees(right, engine) is None
    for subject in (wrong, right):
        theta, shard = initial_theta(subject, 0), keys(0, seed=0, meta_step=0)
        subject.set_engine(Engine())
        expected = subject.contribute(theta, shard, 0)
        subject.set_engine(engine)
        assert relative_error(subject.contribute(theta, shard, 0).slots["model"], expected.slots["model"]) < 1e-8


def test_a_wrong_compiled_way_back_is_compared_with_the_unrolled_loop(monkeypatch):
    """Not with mixed differentiation itself, which is wrong in the same way."""
    monkeypatch.setattr(Compiled, "_compile", eagerly)
    subject = subject_of(WronglyDeclared(inner_lr=0.3, inner_steps=3))
    subject.set_engine(COMPILED_MIXED)
    assert "is off by" in compiled_disagrees(subject, 0)
    subject = subject_of(OWN["clipped"])
    subject.set_engine(COMPILED_MIXED)
    assert compiled_disagrees(subject, 0) is None


@dataclass(frozen=True)
class LateClip(MAML):
    """Wrong from the fourth inner step on: a declared update that is linear until then."""

    linear_optimizers: ClassVar[tuple[str, ...]] = ("sgd",)

    def update(self, phi, gradient, rate, moments):
        taken = gradient if moments.count < 3 else gradient.map(torch.tanh) * 5.0
        phi, _ = super().update(phi, taken, rate, moments)
        return phi, replace(moments, count=moments.count + 1)


def test_all_inner_steps_of_the_run_are_compared_where_they_fit():
    subject = subject_of(LateClip(inner_lr=0.1, inner_steps=5))
    engine = Engine(differentiation="mixed", hessian="forward")
    assert "is off by" in mixed_disagrees(subject, engine)
    one_task = footprint(subject, Engine())
    assert float64_within(subject, None) == (5, None)
    assert float64_within(subject, 2 * one_task.peak(4)) == (5, None)
    steps, tasks = float64_within(subject, 2 * (one_task.first + 2 * one_task.further))
    assert (steps, tasks) == (3, 1)
    assert mixed_disagrees(subject, engine, 2 * (one_task.first + 2 * one_task.further)) is None


def test_noise_is_the_same_in_every_dtype_and_leaves_constants_alone():
    exact, single = (subject_of(OWN["mix-in"], dtype) for dtype in (torch.float64, torch.float32))
    a, b = (perturbed_theta(s, 0, 0.5) for s in (exact, single))
    start = initial_theta(exact, 0)
    for slot in ("model", "inner_lr"):
        for name, tensor in a[slot].items():
            torch.testing.assert_close(b[slot][name].double(), tensor, rtol=1e-5, atol=1e-6)
            assert relative_error(tensor, start[slot][name]) > 0.1
