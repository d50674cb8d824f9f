"""What every algorithm, task family and model in the dicts must keep, in every combination. Nothing is named here.

A new one is tested by its line in the dict; a combination that makes no sense is one that it refuses in one line.
Every pair meets in the default run, every triple in the long one.
"""

from __future__ import annotations

import dataclasses
import itertools
import math
from functools import cache

import cloudpickle
import numpy as np
import pytest
import torch
from PIL import Image
from toys import train

from metadist.algorithms import ALGORITHMS
from metadist.core.algorithm import Algorithm, with_inner_steps
from metadist.core.errors import ConfigError
from metadist.core.model import Model
from metadist.core.outer import OuterLoop
from metadist.core.random import TaskKey
from metadist.core.round import MetaStepKey
from metadist.core.state import State
from metadist.learners.few_shot import FewShotLearner
from metadist.models import MODELS
from metadist.storage.checkpoints import Checkpoints
from metadist.tasks import TASKS
from metadist.wire import ResultHeader, ThetaHeader, decode_result, decode_theta, result_parts, theta_parts

#: given to every config that has such a field: what has no default, and what makes it small
SETTINGS = {
    "path": "images",
    "filters": 8,
    "hidden": (16, 16),
    "width": 16,
    "representation": 16,
    "query_shots": 4,
    "image_size": 28,
}
OUTER = OuterLoop(meta_batch_size=6, shard_size=4, lr=3e-3)


def built(cls):
    return cls(**{f.name: SETTINGS[f.name] for f in dataclasses.fields(cls) if f.name in SETTINGS})


@cache
def learner(algorithm, tasks, model, outer=OUTER) -> FewShotLearner:
    family, method, config = built(TASKS[tasks]), built(ALGORITHMS[algorithm]), built(MODELS[model])
    return FewShotLearner(
        method, Model(lambda: config.build(tuple(family.input_shape), method.outputs(family))), family, outer
    )


def refusal(*triple) -> str | None:
    try:
        learner(*triple)
    except ConfigError as error:
        return str(error)
    return None


def covering(triples):
    """Few of ``triples`` that hold every pair which any of them holds."""

    def pairs(triple):
        return set(itertools.combinations(enumerate(triple), 2))

    missing, chosen = set().union(*map(pairs, triples)), []
    while missing:
        chosen.append(max(triples, key=lambda t: len(pairs(t) & missing)))
        missing -= pairs(chosen[-1])
    return chosen


SUPERVISED = [name for name, cls in ALGORITHMS.items() if issubclass(cls, Algorithm)]
NETWORKS = [name for name, cls in MODELS.items() if hasattr(cls, "build")]
TRIPLES = list(itertools.product(SUPERVISED, TASKS, NETWORKS))
REFUSED = {triple: reason for triple in TRIPLES if (reason := refusal(*triple))}
FITTING = [triple for triple in TRIPLES if triple not in REFUSED]
SHORT = covering(FITTING)


@pytest.fixture(scope="module", autouse=True)
def data(tmp_path_factory):
    """A ``METADIST_DATA`` that serves every family: noisy copies of one pattern per class, as folders and as
    Omniglot's array.
    """
    root, rng = tmp_path_factory.mktemp("data"), np.random.default_rng(0)
    patterns = rng.integers(0, 256, (30, 1, 7, 7)).repeat(4, 2).repeat(4, 3)
    images = np.clip(patterns + rng.normal(0, 90, (30, 20, 28, 28)), 0, 255).astype(np.uint8)
    names = np.array([f"{a}/character{i:02}" for a in ("Greek", "Hebrew", "Tibetan") for i in range(1, 11)])
    (root / "omniglot").mkdir()
    np.savez(
        root / "omniglot" / "omniglot28.npz", images=images, class_names=names, class_is_background=np.arange(30) < 20
    )
    for split, c in ((s, c) for s, part in enumerate(np.split(np.arange(30), 3)) for c in part):
        folder = root / "images" / ("train", "validation", "test")[split] / f"class{c}"
        folder.mkdir(parents=True)
        for i, pixels in enumerate(images[c, :8]):
            Image.fromarray(pixels).save(folder / f"{i}.png")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("METADIST_DATA", str(root))
        patch.setenv("METADIST_CACHE", str(root / "cache"))
        yield root


@pytest.fixture(
    params=[pytest.param(t, id="-".join(t), marks=() if t in SHORT else pytest.mark.long) for t in FITTING],
    scope="module",
)
def subject(request, data):
    found = learner(*request.param)
    found.prepare(torch.device("cpu"))
    return found


def start(subject) -> State:
    return subject.initial(0)


def shards(subject, function="gradient", split="train"):
    return subject.shards(MetaStepKey("run", 2, 0), function, split=split, tasks=6)


def same(a, b) -> bool:
    """Bit for bit."""
    return a.keys() == b.keys() and all(v.dtype == b[n].dtype and v.equal(b[n]) for n, v in a.items())


def test_everything_is_in_some_combination():
    for i, names in enumerate((SUPERVISED, TASKS, NETWORKS)):
        assert {triple[i] for triple in SHORT} == set(names)


@pytest.mark.parametrize("triple", REFUSED, ids="-".join)
def test_refused_in_one_line(triple):
    assert len(REFUSED[triple]) > 20
    assert "\n" not in REFUSED[triple]


def test_it_can_begin(subject):
    subject.dry_run(0)


def test_a_contribution_fits_the_slots(subject):
    state = start(subject)
    for shard in shards(subject):
        got = subject.compute(shard, state.slots)
        assert (got.tasks, got.weight) == (shard.count, float(shard.count))
        assert got.slots.keys() == {n for n, slot in subject.slots.items() if slot.rule != "constant"}
        for name, vector in got.slots.items():
            assert (vector.dtype, vector.shape) == (
                subject.slots[name].layout.dtype,
                (subject.slots[name].layout.numel,),
            )
        assert got.is_finite()
        assert got.slots["model"].any()
        assert got.metrics.keys() == {"loss", subject.tasks.metric_name}


def test_the_same_bits_again(subject):
    state, shard = start(subject), shards(subject)[0]
    first, second = (subject.compute(shard, state.slots) for _ in range(2))
    assert same(first.slots, second.slots)
    assert first.metrics == second.metrics
    assert start(subject).sha256() == state.sha256()


def test_the_same_tasks_in_whatever_shard(subject):
    for split in ("train", "validation", "test"):
        among = subject.sample(TaskKey.of(0, split, 2, range(6)))
        for i in (0, 4):
            alone = subject.sample(TaskKey.of(0, split, 2, [i]))
            for a, b in ((alone.support, among.support), (alone.query, among.query)):
                assert a.x[0].equal(b.x[i])
                assert a.y[0].equal(b.y[i])


def test_tasks_differ(subject):
    one = subject.sample(TaskKey.of(0, "train", 2, [0, 1])).support.x
    others = [subject.sample(TaskKey.of(*key, [0])).support.x[0] for key in ((1, "train", 2), (0, "train", 3))]
    assert not any(one[0].equal(other) for other in (one[1], *others))


def test_it_travels(subject):
    """Pickled without its data, and computing the same bits there."""
    state, shard = start(subject), shards(subject)[1]
    pickled = cloudpickle.dumps(subject)
    assert len(pickled) < 200_000
    there = cloudpickle.loads(pickled)
    there.prepare(torch.device("cpu"))
    assert same(there.compute(shard, state.slots).slots, subject.compute(shard, state.slots).slots)
    assert there.initial(0).sha256() == state.sha256()


def test_evaluation_has_a_column_per_step(subject):
    state, shard = start(subject), shards(subject, "evaluate", "validation")[0]
    for steps in (None, 0, 3):
        columns = subject.compute(dataclasses.replace(shard, settings=(("inner_steps", steps),)), state.slots).columns
        taken = with_inner_steps(subject.algorithm, steps).inner_steps
        for name in ("loss", subject.tasks.metric_name):
            assert columns[name].shape == (shard.count, 1 + taken)
            assert columns[name].dtype == torch.float64
            assert columns[name].isfinite().all()
        assert columns["task"].tolist() == list(range(shard.count))


def test_a_checkpoint_brings_back_every_bit(subject, request):
    state = start(subject)
    total = subject.compute(shards(subject)[0], state.slots)
    state, _ = subject.outer.update(subject.slots, state, total, 0)
    store = Checkpoints(f"memory://conformance/{request.node.callspec.id}")
    assert store.save(1, state, {}, slots=subject.slots)
    loaded = store.latest(subject.slots).state
    assert same(loaded.slots, state.slots)
    assert same(loaded.outer, state.outer)


def test_the_wire_brings_over_every_bit(subject):
    state, shard = start(subject), shards(subject)[0]
    header = ThetaHeader("run", 2, 0)
    sent = theta_parts(state.slots, subject.slots, header)
    assert same(decode_theta(sent, subject.slots, header), dict(state.slots))
    result = subject.compute(shard, state.slots)
    sent = result_parts(result, subject.slots, ResultHeader(shard, 1, "w"))
    got, _ = decode_result(sent, shard, subject.slots)
    assert same(got.slots, result.slots)
    assert (got.weight, got.tasks, got.metrics) == (result.weight, result.tasks, dict(result.metrics))
    judge = shards(subject, "evaluate", "test")[0]
    records = subject.compute(judge, state.slots)
    back, _ = decode_result(result_parts(records, subject.slots, ResultHeader(judge, 1, "w")), judge, subject.slots)
    assert same(back.columns, records.columns)


def size(found):
    return math.prod(found.tasks.input_shape), len(list(found.model.module.modules()))


@pytest.mark.parametrize("algorithm", SUPERVISED)
def test_every_algorithm_learns(algorithm, data):
    """The loss on held-out tasks after adaptation falls, by far more than chance, where that is tried fastest."""
    outer = OuterLoop(meta_batch_size=16, shard_size=16, lr=5e-3, meta_steps=150)
    found = min((learner(*t, outer) for t in FITTING if t[0] == algorithm), key=size)
    found.prepare(torch.device("cpu"))

    def held_out(state):
        records = found.evaluate(state.theta(found.slots), TaskKey.of(0, "validation", 0, range(200)), 0)
        return records.columns["loss"][:, -1]

    gained = held_out(found.initial(0)) - held_out(train(found, outer.meta_steps))
    assert float(gained.mean()) > 6 * float(gained.std()) / len(gained) ** 0.5
