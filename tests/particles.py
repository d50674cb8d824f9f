"""A population that learns the rate of gradient descent: a run of a second, as a config document."""

from __future__ import annotations

import copy
from typing import Any

import torch

from metadist.config.build import build
from metadist.config.document import override
from metadist.config.experiment import Experiment
from metadist.core.model import Model
from metadist.core.outer import OuterLoop
from metadist.learners.carried import CarriedLearner
from metadist.testing.carried import LearnedRate
from metadist.testing.quadratics import Linear, Quadratics

_DOCUMENT = {
    "name": "particles",
    "seed": 5,
    "tasks": {"name": "metadist.testing.quadratics:Quadratics"},
    "model": {"name": "metadist.testing.quadratics:Linear"},
    "algorithm": {"name": "metadist.testing.carried:LearnedRate", "windows": 3, "evaluation_steps": 3},
    "outer": {"lr": 0.05, "meta_batch_size": 5, "shard_size": 2, "meta_steps": 9},
    "evaluate": {"every": 4, "tasks": 4, "test_tasks": 4},
    "workers": [{"min": 0, "max": 0}],
    "engine": {"worker_patience": 400},
    "checkpoint": {"every": 4, "states_every": 3},
    "tracking": {"uri": "none", "log_every": 1},
}


def document(*overrides: str) -> dict[str, Any]:
    return override(copy.deepcopy(_DOCUMENT), overrides)


def experiment(*overrides: str) -> Experiment:
    return build(document(*overrides))


def learner(
    algorithm: Any = LearnedRate(windows=3, evaluation_steps=3),
    *,
    dtype: torch.dtype = torch.float32,
    outer: OuterLoop = OuterLoop(lr=0.05, meta_batch_size=5, shard_size=2),
    family: Any = Quadratics(),
    **settings: Any,
) -> CarriedLearner:
    model = Model(lambda: Linear().build(family.input_shape, 1), dtype=dtype)
    return CarriedLearner(algorithm, model, family, outer, **settings)
