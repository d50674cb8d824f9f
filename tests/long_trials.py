"""RL² whose trials are longer than a meta-step: a run of two seconds, as a config document."""

from __future__ import annotations

import copy
from typing import Any

from metadist.config.document import override

_DOCUMENT = {
    "name": "long-trials",
    "seed": 5,
    "environment": {"name": "bandit", "arms": 3, "episodes": 12},
    "model": {"name": "gru", "hidden": 8},
    "algorithm": {"name": "rl2", "window": 5, "epochs": 2, "minibatches": 2},
    "outer": {"lr": 0.01, "meta_batch_size": 5, "shard_size": 2, "meta_steps": 9},
    "evaluate": {"every": 4, "tasks": 4, "test_tasks": 4},
    "workers": [{"min": 0, "max": 0}],
    "engine": {"worker_patience": 400},
    "checkpoint": {"every": 4, "states_every": 3},
    "tracking": {"uri": "none", "log_every": 1},
}


def document(*overrides: str) -> dict[str, Any]:
    return override(copy.deepcopy(_DOCUMENT), overrides)
