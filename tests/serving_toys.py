"""Small served models of every supervised algorithm, and support sets for them."""

from __future__ import annotations

import torch
from torch import nn
from toys import Blobs, Curves

from metadist.algorithms import ALGORITHMS
from metadist.core.algorithm import Algorithm
from metadist.core.model import Model, use_batch_statistics
from metadist.core.outer import OuterLoop
from metadist.core.random import TaskKey
from metadist.learners.few_shot import FewShotLearner
from metadist.models.cnp import ConditionalNeuralProcess
from metadist.models.supernet import Supernet
from metadist.serving.model import Limits, ServedModel

SUPERVISED = sorted(name for name, kind in ALGORITHMS.items() if issubclass(kind, Algorithm))
OPTIONS = {
    "reptile": {"inner_optimizer": "adam", "moments": "carried", "inner_steps": 3},
    "maml": {"inner_steps": 2, "inner_optimizer": "adam", "inner_batch_size": 2},
    "meta_sgd": {"inner_steps": 2},
}


def network(inputs, outputs):
    return lambda: nn.Sequential(nn.Linear(inputs, 16), nn.Tanh(), nn.Linear(16, outputs))


def images():
    layers = nn.Sequential(nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(), nn.Linear(4 * 16, 3))
    return use_batch_statistics(layers)


def learner(algorithm="maml", normalization="transductive"):
    made = ALGORITHMS[algorithm](**OPTIONS.get(algorithm, {}))
    outer = OuterLoop(meta_steps=1)
    if algorithm == "cnp":
        family = Curves()
        return FewShotLearner(made, Model(lambda: ConditionalNeuralProcess(8, 8).build((2,), 2)), family, outer)
    if algorithm == "metanas":
        config = Supernet(filters=4, cells=2)
        return FewShotLearner(made, Model(lambda: config.build((1, 16, 16), 3)), Blobs(input_shape=(1, 16, 16)), outer)
    if algorithm in ("protonet", "anil"):
        return FewShotLearner(made, Model(network(4, 3)), Blobs(), outer)
    if normalization == "inductive" or algorithm == "meta_sgd":
        return FewShotLearner(made, Model(images), Blobs(input_shape=(1, 6, 6)), outer, normalization)
    return FewShotLearner(made, Model(network(2, 2)), Curves(), outer)


def served(algorithm="maml", normalization="transductive", name=None, **limits):
    own = learner(algorithm, normalization)
    return ServedModel(name or algorithm, own, own.initial(5), "toy", Limits(**limits))


def tasks(model, count, start=0):
    """Return ``count`` different tasks, each as (x, y, query)."""
    stacked = model.learner.tasks.sample(TaskKey.of(1, "test", 0, range(start, start + count)), "test")
    return [(stacked.support.x[i], stacked.support.y[i], stacked.query.x[i]) for i in range(count)]


def expected(model, x, y, query, inner_steps=None):
    """Return the prediction as ``Result.adapt`` and ``Result.predict`` compute it."""
    from metadist.core.task import Examples

    support = Examples(x, y)
    phi = model.learner.adapt(model.state, support, inner_steps)
    return model.learner.predict(model.state, phi, query, support)


def close(a, b):
    """Compare up to rounding: batches change the last bits of sums over a few dozen terms."""
    return torch.allclose(a, b, rtol=1e-4, atol=1e-5)
