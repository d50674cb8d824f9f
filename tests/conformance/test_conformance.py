"""Every algorithm, task family and model of the tables has the properties of ``metadist.testing``, in every
combination.

A new component is tested by its line in the table. A combination that makes no sense is one that the algorithm refuses
in one line. Every pair meets in the default run, every triple in the long one.
"""

from __future__ import annotations

import dataclasses
import itertools
import math
from functools import cache

import numpy as np
import pytest
import torch
from PIL import Image
from toys import train

from metadist.algorithms import ALGORITHMS
from metadist.core.algorithm import Algorithm
from metadist.core.errors import ConfigError
from metadist.core.model import Model
from metadist.core.outer import OuterLoop
from metadist.core.random import SPLITS, TaskKey
from metadist.learners.few_shot import FewShotLearner
from metadist.models import MODELS, ModelConfig
from metadist.tasks import TASKS
from metadist.tasks.table import Table
from metadist.testing import FEW_SHOT_PROPERTIES, TASK_PROPERTIES
from metadist.testing.models import embedding, pure_function, seeded_parameters
from metadist.testing.tasks import travels

#: given to every config that has such a field: fields without a default, and small sizes
SETTINGS = {
    "path": "images",
    "filters": 8,
    "hidden": (16, 16),
    "width": 16,
    "representation": 16,
    "query_shots": 4,
    "image_size": 28,
    "rows": 20,
    "query_rows": 20,
}
OUTER = OuterLoop(meta_batch_size=6, shard_size=4, lr=3e-3)


def built(cls):
    # ``hidden`` is a tuple for networks alone
    given = {n: v for n, v in SETTINGS.items() if n != "hidden" or issubclass(cls, ModelConfig)}
    return cls(**{f.name: given[f.name] for f in dataclasses.fields(cls) if f.name in given})


@cache
def learner(algorithm, tasks, model) -> FewShotLearner:
    return made(algorithm, tasks, model, OUTER)


def made(algorithm, tasks, model, outer) -> FewShotLearner:
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
    """Few of ``triples`` that hold every algorithm, family and model which any of them holds."""
    missing, chosen = {place for triple in triples for place in enumerate(triple)}, []
    while missing:
        chosen.append(max(triples, key=lambda t: len(set(enumerate(t)) & missing)))
        missing -= set(enumerate(chosen[-1]))
    return chosen


SUPERVISED = [name for name, cls in ALGORITHMS.items() if issubclass(cls, Algorithm)]
NETWORKS = [name for name, cls in MODELS.items() if issubclass(cls, ModelConfig)]
#: tables need a file, and CIFAR-100 its archive; they have tests of their own in tests/tasks
FAMILIES = [name for name, family in TASKS.items() if not issubclass(family, Table) and name != "cifar_fs"]
TRIPLES = list(itertools.product(SUPERVISED, FAMILIES, NETWORKS))
REFUSED = {triple: reason for triple in TRIPLES if (reason := refusal(*triple))}
FITTING = [triple for triple in TRIPLES if triple not in REFUSED]
SHORT = covering(FITTING)


@pytest.fixture(scope="module", autouse=True)
def data(tmp_path_factory):
    """A ``METADIST_DATA`` for every family: noisy copies of a pattern per class, as folders and as Omniglot's array."""
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


@pytest.fixture(params=FAMILIES, scope="module")
def family(request, data):
    found = built(TASKS[request.param])
    found.prepare(torch.device("cpu"))
    return found


def test_everything_is_in_some_combination():
    for i, names in enumerate((SUPERVISED, FAMILIES, NETWORKS)):
        assert {triple[i] for triple in SHORT} == set(names)


@pytest.mark.parametrize("triple", REFUSED, ids="-".join)
def test_refused_in_one_line(triple):
    assert len(REFUSED[triple]) > 20
    assert "\n" not in REFUSED[triple]


@pytest.mark.lane("numerics")
@pytest.mark.parametrize("property", FEW_SHOT_PROPERTIES)
def test_every_combination(subject, property):
    for part in subject.parts:
        FEW_SHOT_PROPERTIES[property](part)


@pytest.mark.parametrize("split", SPLITS)
@pytest.mark.parametrize("property", TASK_PROPERTIES)
def test_every_task_family(family, property, split):
    TASK_PROPERTIES[property](family, split)


def test_every_task_family_travels(family):
    travels(family, another_process=False)


@pytest.mark.parametrize("model", NETWORKS)
def test_every_model(model, data):
    """The properties of a model alone, on the tasks that it is built for fastest."""
    found, config = learner(*min((t for t in FITTING if t[2] == model), key=size)), built(MODELS[model])
    found.prepare(torch.device("cpu"))
    seeded_parameters(found.model, config)
    pure_function(found)
    embedding(config, found)


def size(triple):
    found = learner(*triple)
    return math.prod(found.tasks.input_shape), len(list(found.model.module.modules()))


@pytest.mark.lane("numerics")
@pytest.mark.parametrize("algorithm", SUPERVISED)
def test_every_algorithm_learns(algorithm, data):
    """The loss on held-out tasks after adaptation falls, by far more than chance, where that is tried fastest."""
    lr = 1.5e-2 if algorithm == "meta_lstm" else 5e-3  # its rate is a gate, σ(−4.5) at the start, that moves slowly
    steps = 40 if algorithm == "metanas" else 150  # networks of images take their time
    outer = OuterLoop(meta_batch_size=16, shard_size=16, lr=lr, meta_steps=steps)
    found = made(*min((t for t in FITTING if t[0] == algorithm), key=size), outer)
    found.prepare(torch.device("cpu"))

    def held_out(state):
        records = found.evaluate(state.theta(found.slots), TaskKey.of(0, "validation", 0, range(400)), 0)
        return records.columns["loss"][:, -1]

    gained = held_out(found.initial(0)) - held_out(train(found, outer.meta_steps))
    assert float(gained.mean()) > 6 * float(gained.std()) / len(gained) ** 0.5
