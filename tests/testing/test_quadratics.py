"""The closed forms of quadratic tasks against metadist's contributions, for any number of inner steps."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch.utils import _pytree as pytree

from metadist import ANIL, MAML, Learner, MetaSGD, Model, OuterLoop, Reptile
from metadist.core.differences import relative_error
from metadist.core.engine import Engine
from metadist.core.random import TaskKey
from metadist.testing import quadratics

FAMILY = quadratics.Quadratics(dimension=4, rows=7)
KEYS = TaskKey.of(3, "train", 5, range(5))
THETA = torch.tensor([0.3, -1.0, 2.0, 7.0], dtype=torch.float64)


def learner(algorithm, **options):
    model = Model(lambda: quadratics.Linear().build(FAMILY.input_shape, 1), dtype=torch.float64)
    return Learner(algorithm, model, FAMILY, OuterLoop(), **options)


def contribution(subject):
    theta = subject.initial(0).theta(subject.slots)
    return subject.contribute({**theta, "model": subject.slots["model"].layout.unflatten(THETA)}, KEYS, 5)


def each(subject):
    tasks = subject.sample(KEYS)
    return [pytree.tree_map(lambda t, i=i: t[i], tasks) for i in range(len(KEYS.tasks))]


@pytest.mark.parametrize("steps", [0, 1, 2, 5, 12])
@pytest.mark.parametrize("differentiation", ["unrolled", "mixed"])
def test_maml(steps, differentiation):
    subject = learner(MAML(inner_lr=0.05, inner_steps=steps), engine=Engine(differentiation=differentiation))
    got = contribution(subject)
    expected = sum(quadratics.maml_gradient(task, THETA, 0.05, steps) for task in each(subject))
    assert relative_error(got.slots["model"], expected) < 1e-12
    loss = sum(quadratics.maml_loss(task, THETA, 0.05, steps) for task in each(subject))
    assert got.metrics["loss"] == pytest.approx(loss, rel=1e-12)


@pytest.mark.parametrize("steps", [1, 3])
def test_first_order_maml(steps):
    subject = learner(MAML(inner_lr=0.05, inner_steps=steps, first_order=True))
    expected = sum(quadratics.maml_gradient(task, THETA, 0.05, steps, first_order=True) for task in each(subject))
    assert relative_error(contribution(subject).slots["model"], expected) < 1e-12


@pytest.mark.parametrize("steps", [1, 4, 60])
def test_reptile(steps):
    subject = learner(Reptile(inner_lr=0.05, inner_steps=steps))
    expected = sum(quadratics.reptile_delta(task, THETA, 0.05, steps) for task in each(subject))
    assert relative_error(contribution(subject).slots["model"], expected) < 1e-12


@pytest.mark.parametrize("algorithm", [ANIL(inner_lr=0.05, inner_steps=2), MetaSGD(inner_lr=0.05, inner_steps=2)])
def test_algorithms_that_are_maml_here(algorithm):
    """The model is its own head, and all rates start equal."""
    subject = learner(algorithm)
    expected = sum(quadratics.maml_gradient(task, THETA, 0.05, 2) for task in each(subject))
    assert relative_error(contribution(subject).slots["model"], expected) < 1e-12


def test_the_optimum_is_where_adaptation_ends():
    (task, *_) = each(learner(MAML()))
    assert relative_error(quadratics.adapted(task, THETA, 0.05, 4000), quadratics.optimum(task.support)) < 1e-6
    assert (
        relative_error(
            quadratics.adapted(task, quadratics.optimum(task.support), 0.05, 3), quadratics.optimum(task.support)
        )
        < 1e-12
    )


def test_the_noise_free_optimum_is_near_the_one_that_was_drawn():
    family = replace(FAMILY, shift=0.0)
    task = pytree.tree_map(lambda t: t[0], family.sample(KEYS, "train"))
    assert relative_error(quadratics.optimum(task.query), quadratics.optimum(task.support)) < 1e-5
