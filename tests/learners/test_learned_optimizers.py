"""Learned optimisers in the carried learner, with networks of several shapes: against particles in plain Python."""

import pytest
import torch

from metadist.algorithms.lstm_optimizer import LSTMOptimizer
from metadist.algorithms.mlp_optimizer import MLPOptimizer
from metadist.core.engine import Engine
from metadist.core.errors import ConfigError
from metadist.core.model import Model
from metadist.core.outer import OuterLoop
from metadist.core.random import TaskKey
from metadist.core.round import MetaStepKey
from metadist.learners.carried import CarriedLearner
from metadist.models.mlps import MLPs
from metadist.testing.carried import Population
from metadist.testing.quadratics import Quadratics

NETWORKS = MLPs(networks=((3,), (2, 2)), test_networks=((4,),), each=2)
OUTER = OuterLoop(meta_batch_size=4, shard_size=2)


def learner(algorithm, networks=NETWORKS, outer=OUTER, dtype=torch.float64):
    return CarriedLearner(algorithm, Model(networks.variants((3,), 1), dtype=dtype), Quadratics(), outer)


def advanced(subject, theta, meta_steps):
    """The contributions of the shards of each meta-step, with the states handed on as an executor does."""
    kept, found = {}, []
    for meta_step in range(meta_steps):
        rounds = subject.meta_step(MetaStepKey("run", meta_step, 0), subject.initial(0))
        shards = next(rounds).shards
        done = [subject.compute(shard, theta, [kept[key] for key in shard.needs]) for shard in shards]
        kept = {shard.key: one.output for shard, one in zip(shards, done)}
        found.append([one.result for one in done])
    return found


@pytest.mark.parametrize("estimator", ["truncated", "es", "pes"])
@pytest.mark.parametrize("kind", [LSTMOptimizer, MLPOptimizer])
def test_shards_are_particles_in_plain_python(kind, estimator):
    algorithm = kind(window=2, unroll=(2, 6), batch_size=3, scales=(0.5, 2.0))
    subject, engine = learner(algorithm), Engine(differentiation=estimator)
    subject.set_engine(engine)
    state = subject.initial(0)
    theta = state.theta(subject.slots)
    plain = Population(algorithm, subject.model, Quadratics(), size=4, engine=engine)
    for meta_step, shards in enumerate(advanced(subject, state.slots, 4)):
        each = plain.advance(theta, meta_step)
        for number, shard in enumerate(shards):
            pair = each[2 * number : 2 * number + 2]
            vectors = [subject.slots["optimizer"].layout.flatten(c.slots["optimizer"]) for c in pair]
            expected = vectors[0] + vectors[1]
            assert shard.slots.keys() == {"optimizer"}
            assert (shard.slots["optimizer"] - expected).abs().max() < 1e-8 * (1e-3 + expected.abs().max())


def test_tasks_have_networks_of_their_split():
    subject = learner(MLPOptimizer(evaluation_steps=2))
    shapes = {
        split: [tuple(p.shape for p in subject.model.variant(split, i).module.parameters())[0] for i in range(5)]
        for split in ("train", "validation", "test")
    }
    assert shapes["train"] == shapes["validation"] == [(3, 3), (3, 3), (2, 3), (2, 3), (3, 3)]
    assert shapes["test"] == [(4, 3)] * 5
    records = subject.evaluate(subject.initial(0).theta(subject.slots), TaskKey.of(0, "test", 0, range(3)), 2)
    assert records.columns["loss"].shape == (3, 3)


def test_a_shard_of_several_shapes_is_refused():
    with pytest.raises(ConfigError, match=r"outer.shard_size: 4, .* let model.each be a multiple of outer.shard_size"):
        learner(MLPOptimizer(), outer=OuterLoop(meta_batch_size=4, shard_size=4))
