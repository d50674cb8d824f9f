"""Test the predicted memory: its growth with inner steps, and the bytes of graphs."""

from __future__ import annotations

import pytest
import torch
from toys import Blobs, Curves, learner

from metadist.algorithms import ANIL, MAML, MetaSGD, ProtoNet
from metadist.core.engine import Engine
from metadist.engine.compiled import trace
from metadist.engine.memory import allocated_bytes, footprint, peak_bytes
from metadist.models import MLP, Conv4

UNROLLED, MIXED = Engine(), Engine(differentiation="mixed")
COMPILED = Engine(differentiation="mixed", compile=True)
FLOAT = 4


def subject(algorithm, hidden=(16, 16)):
    return learner(algorithm, lambda: MLP(hidden=hidden).build((2,), 2), Curves(), dtype=torch.float32)


def numel(subject):
    return subject.slots["model"].layout.numel


@pytest.mark.lane("numerics")
@pytest.mark.parametrize(
    ("options", "vectors", "engines"),
    [
        ({}, 1, [MIXED, COMPILED]),
        ({"inner_momentum": 0.9}, 2, [MIXED]),
        ({"inner_optimizer": "adam"}, 3, [MIXED]),
        pytest.param({"inner_optimizer": "adam"}, 3, [COMPILED], marks=pytest.mark.long),
    ],
    ids=["sgd", "momentum", "adam", "adam-compiled"],
)
def test_mixed_grows_by_the_stored_state_alone(options, vectors, engines):
    for engine in engines:
        s = subject(MAML(inner_steps=4, **options))
        plan = footprint(s, engine)
        assert plan.state == vectors * numel(s) * FLOAT
        assert plan.further <= 1.1 * plan.state + 64
        assert plan.peak(8) == plan.shared + 8 * (plan.first + 3 * plan.further)


def test_unrolled_grows_by_more():
    s = subject(MAML(inner_steps=10))
    assert footprint(s, UNROLLED).further > 3 * footprint(s, MIXED).further
    assert footprint(s, UNROLLED).peak(4) <= 4 * allocated_bytes(s) + footprint(s, UNROLLED).shared


def test_anil_stores_its_head_alone():
    plan = footprint(subject(ANIL(inner_steps=3)), MIXED)
    assert plan.state == (16 * 2 + 2) * FLOAT


def test_learned_rates_are_counted():
    """Their gradient is one vector for any number of steps."""
    plain, learned = (footprint(subject(a(inner_steps=5)), MIXED) for a in (MAML, MetaSGD))
    assert learned.first > plain.first
    assert learned.further <= plain.further + 64
    assert learned.shared == 2 * plain.shared


def test_without_inner_steps_nothing_grows():
    s = learner(ProtoNet(), lambda: Conv4(filters=4).build((1, 16, 16), None), Blobs(input_shape=(1, 16, 16)))
    plan = footprint(s, UNROLLED)
    assert (plan.inner_steps, plan.further, plan.state) == (0, 0, 0)
    assert plan.peak(3) == plan.shared + 3 * plan.first > 0


def test_the_bytes_of_a_graph_by_hand():
    """Two products of 80 bytes are alive together; two inputs do not count."""

    def f(x, w):
        a = x @ w
        b = (a + 1).view(-1)
        return b.sum()

    _, spec = torch.utils._pytree.tree_flatten((torch.zeros(5, 3), torch.zeros(3, 4)))
    graph, _ = trace(f, spec, [torch.zeros(5, 3), torch.zeros(3, 4)])
    assert peak_bytes(graph, skip=2) == 80 + 80
    assert peak_bytes(graph) == 60 + 48 + 80  # x, w and the first product; x and w end with it


@pytest.mark.parametrize("engine", [UNROLLED, MIXED], ids=["unrolled", "mixed"])
def test_nothing_stays_behind(engine):
    """All counted bytes are freed with the result: the count follows storages, not names."""
    from metadist.engine.memory import _measured

    assert _measured(subject(MAML(inner_steps=3)), engine, 3).alive == 0
