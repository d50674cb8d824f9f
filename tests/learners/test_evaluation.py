"""Scores: one column per adaptation step; inductive and transductive normalisation against plain loops."""

from dataclasses import replace

import plain
import pytest
import torch
from toys import Blobs, Everything, WithoutDropout, keys, learner, somewhere

from metadist.algorithms import MAML, MetaSGD, ProtoNet, Reptile
from metadist.models import Conv4

FAMILY = Blobs(input_shape=(1, 8, 8))
ALGORITHM = MAML(inner_lr=0.2, inner_steps=2)


def conv(norm):
    return lambda: Conv4(filters=4, blocks=2, norm=norm).build(FAMILY.input_shape, FAMILY.outputs)


def plain_scores(learner, theta, key, normalization, steps):
    """Query losses after 0 … ``steps`` steps, each query judged by itself beside the support set where inductive."""
    model, task = plain.Plain(learner.model.module, key), learner.tasks.sample_task(key, key.split)
    support, query = (type(e)(e.x.double(), e.y) for e in (task.support, task.query))
    losses = []
    for k in range(steps + 1):
        leaves = {n: t.clone().requires_grad_() for n, t in theta["model"].items()}
        rates = dict.fromkeys(leaves, learner.algorithm.inner_lr)
        phi = plain.descend(lambda p, _: plain.loss(learner.tasks, model(p, support.x), support), leaves, rates, k)
        if normalization == "inductive":
            predictions = torch.cat([model(phi, torch.cat([support.x, x[None]]))[-1:] for x in query.x])
        else:
            predictions = model(phi, query.x)
        losses.append(plain.loss(learner.tasks, predictions, query))
    return torch.stack(losses).detach()


@pytest.mark.parametrize("normalization", ["transductive", "inductive"])
@pytest.mark.parametrize("norm", ["batch", "group"])
def test_scores_are_the_plain_loop_s(normalization, norm):
    subject, shard = learner(ALGORITHM, conv(norm), FAMILY, normalization=normalization), keys(0, 3, split="validation")
    theta = somewhere(subject)
    records = subject.evaluate(theta, shard, 0, inner_steps=3)
    assert records.columns["task"].tolist() == [0, 3]
    assert records.columns["loss"].shape == records.columns["accuracy"].shape == (2, 4)
    expected = torch.stack([plain_scores(subject, theta, key, normalization, 3) for key in shard.each()])
    torch.testing.assert_close(records.columns["loss"], expected, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("algorithm", [ALGORITHM, ProtoNet(), Reptile(inner_steps=2), MetaSGD()])
def test_the_two_agree_exactly_where_nothing_normalises_over_the_batch(algorithm):
    for norm, agree in (("group", True), ("batch", False)):
        both = [learner(algorithm, conv(norm), FAMILY, normalization=n) for n in ("transductive", "inductive")]
        theta = somewhere(both[0])
        a, b = (s.evaluate(theta, keys(0, 1), 0).columns["loss"] for s in both)
        assert torch.allclose(a, b, rtol=1e-10, atol=1e-12) == agree


def test_evaluation_has_no_dropout_and_no_shards():
    subject, bare = (
        learner(ALGORITHM, factory, Blobs(input_shape=(1, 6, 6))) for factory in (Everything, WithoutDropout)
    )
    theta = somewhere(subject)
    once, again = subject.evaluate(theta, keys(0, 1), 0), bare.evaluate(theta, keys(0, 1), 99)
    assert once.columns["loss"].equal(again.columns["loss"])
    apart = [subject.evaluate(theta, keys(i), 0).columns["loss"] for i in (0, 1)]
    torch.testing.assert_close(torch.cat(apart), once.columns["loss"], rtol=1e-12, atol=0)


@pytest.mark.parametrize("normalization", ["transductive", "inductive"])
def test_adapting_to_one_s_own_support_set_is_what_is_evaluated(normalization):
    subject = learner(replace(ALGORITHM, inner_steps=3), conv("batch"), FAMILY)
    subject.normalization = normalization
    state = subject.initial(0)
    task = subject.sample(keys(5, split="test"))
    support = type(task.support)(task.support.x[0], task.support.y[0])
    logits = subject.predict(state, subject.adapt(state, support), task.query.x[0], support)
    loss = torch.nn.functional.cross_entropy(logits, task.query.y[0])
    recorded = subject.evaluate(state.theta(subject.slots), keys(5, split="test"), 0).columns["loss"][0, -1]
    torch.testing.assert_close(loss, recorded, rtol=1e-12, atol=0)
