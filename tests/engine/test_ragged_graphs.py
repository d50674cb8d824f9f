"""Compiled shards of tasks whose sizes are drawn: a graph for each bucket, and the numbers of eager shards."""

from __future__ import annotations

from collections import Counter
from contextlib import contextmanager

import pytest
import torch
from ragged import Lines, Shades
from toys import keys, learner, relative_error, somewhere

from metadist.algorithms import MAML, ProtoNet, Reptile
from metadist.core.engine import Engine
from metadist.core.errors import ConfigError
from metadist.core.outer import OuterLoop
from metadist.engine import buckets
from metadist.engine.buckets import MOST, Buckets
from metadist.engine.memory import footprint
from metadist.engine.plan import Device, plan_shards
from metadist.models import MLP, Conv4
from metadist.workers.worker import Worker

WIDE = Shades(k_shot=(1, 8), query_shots=(1, 4))
ALGORITHMS = {
    "maml": MAML(inner_lr=0.3, inner_steps=2),
    "minibatches": MAML(inner_lr=0.3, inner_steps=2, inner_batch_size=5),
    "reptile": Reptile(inner_lr=0.1, inner_steps=2, inner_optimizer="adam"),
    "protonet": ProtoNet(),
}


class Request:
    compile, differentiation, chunk, precision, deterministic = "auto", "auto", "auto", "float32", True

    def __init__(self, **options):
        vars(self).update(options)


def compiling(whole, engine):
    """Set the engine; return a counter of compilations by the name of the graph."""
    graphs = Counter()

    @contextmanager
    def around(name):
        graphs[name] += 1
        yield

    whole.set_engine(engine, around)
    return graphs


def subject(algorithm=ALGORITHMS["maml"], family=WIDE, norm=None, **options):
    model = Conv4(filters=4, blocks=2, norm=norm) if norm else MLP(hidden=(8,), activation="tanh")
    options = {"outer": OuterLoop(shard_size=4, meta_batch_size=8, meta_steps=10**6), **options}
    return learner(algorithm, lambda: model.build(family.input_shape, algorithm.outputs(family)), family, **options)


@pytest.mark.lane("compile")
@pytest.mark.parametrize(
    ("name", "differentiation"),
    [
        ("maml", "unrolled"),
        pytest.param("maml", "mixed", marks=pytest.mark.long),
        pytest.param("minibatches", "unrolled", marks=pytest.mark.long),
        pytest.param("minibatches", "mixed", marks=pytest.mark.long),
        pytest.param("reptile", "unrolled", marks=pytest.mark.long),
        ("protonet", "unrolled"),
    ],
)
def test_graphs_of_buckets_give_the_numbers_of_eager_shards(name, differentiation, monkeypatch):
    """With two buckets: a graph takes seconds to compile."""
    monkeypatch.setattr(buckets, "MOST", 2)
    whole = subject(ALGORITHMS[name])
    theta, shards = somewhere(whole), [keys(*range(i, i + 5)) for i in range(0, 30, 5)]
    expected = [whole.contribute(theta, shard, 3) for shard in shards]
    graphs = compiling(whole, Engine(compile=True, differentiation=differentiation))
    whole.warm_up(7)
    compiled = dict(graphs)
    assert max(compiled.values()) == 2
    for shard, exact in zip(shards, expected):
        got = whole.contribute(theta, shard, 3)
        assert got.metrics == pytest.approx(exact.metrics, rel=1e-9)
        assert all(relative_error(got.slots[n], v) < 1e-9 for n, v in exact.slots.items())
    assert dict(graphs) == compiled  # the warm-up compiled them all


@pytest.mark.long
@pytest.mark.lane("compile")
def test_few_graphs_serve_all_sizes_and_a_worker_compares_each():
    whole = subject(ALGORITHMS["protonet"], dtype=torch.float32)
    worker = Worker(whole, name="w", device="cpu", gpus=0, threads=1)
    worker.configure(Engine(compile=True), 0)  # compiles every bucket, and compares it with float64
    sizes = Buckets.of(WIDE, whole.algorithm).sizes
    assert len(whole.keys_of_graphs(0)) == len(sizes) == MOST
    spent = whole.warm_up(0)
    for start in range(0, 80, 4):
        whole.contribute(whole.initial(0).theta(whole.slots), keys(*range(start, start + 4)), 3)
    assert whole.warm_up(0) == spent  # no later shard needs another graph


def planned(whole, **options):
    return plan_shards(whole, Request(**options), Device("cpu", "a processor", 1 << 34, None, 2, 1 << 20))


def test_long_runs_are_compiled_where_padding_is_harmless():
    assert planned(subject()).engine.compile
    short = planned(subject(outer=OuterLoop(meta_steps=5000, meta_batch_size=8)))
    assert "120000 passes over tasks are fewer than 300000" in short.reasons["compile"]
    batch = subject(norm="batch")
    assert "batch normalisation would mix padding" in planned(batch).reasons["compile"]
    with pytest.raises(ConfigError, match=r"engine.compile: always, but tasks of several sizes .* norm: group"):
        planned(batch, compile="always")


def test_sizes_that_are_not_stated():
    class Unstated(Lines):
        def possible_sizes(self, split):
            return ()

    whole = subject(family=Unstated())
    assert "'Unstated' does not state possible_sizes()" in planned(whole).reasons["compile"]
    assert planned(whole, compile="always").engine.compile


def test_memory_is_that_of_the_largest_task():
    few, many = (subject(family=Shades(k_shot=k), norm="group") for k in ((1, 2), (1, 8)))
    largest = subject(family=Shades(n_way=5, k_shot=8, query_shots=3), norm="group")
    small, ragged, fixed = (footprint(s, Engine()).peak(1) for s in (few, many, largest))
    assert small < 0.5 * fixed
    assert fixed <= ragged < 1.2 * fixed
