"""Compare tasks of drawn sizes with tasks of one size, both compiled: tasks per second, and the number of graphs.

The fixed tasks have the mean numbers of rows of the drawn ones. The time of a drawn task is that of its bucket, so the
expected time is the mean over the buckets, weighted by the share of sizes that each bucket holds.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from statistics import fmean, median
from typing import Any

import torch

from metadist.benchmarks.timing import interleaved
from metadist.config.build import build
from metadist.config.document import override
from metadist.config.schema import Document
from metadist.core.algorithm import Theta
from metadist.core.engine import Engine
from metadist.core.errors import ConfigError
from metadist.core.random import TaskKey
from metadist.engine.buckets import Buckets
from metadist.learners import supervised
from metadist.learners.few_shot import FewShotLearner
from metadist.tasks.sizes import bounds

#: the keys of a config that can be ranges
RANGES = ("n_way", "k_shot", "query_shots")
FIXED = "one size"


@dataclass
class _Timed:
    """A compiled learner with its θ, and the number of compilations by the name of the graph."""

    learner: FewShotLearner
    graphs: Counter[str] = field(default_factory=Counter)

    def __post_init__(self) -> None:
        self.learner.prepare(torch.device("cpu"))
        self.learner.set_engine(Engine(compile=True), self._around)
        self.learner.warm_up(0)
        self.theta: Theta = self.learner.initial(0).theta(self.learner.slots)

    @contextmanager
    def _around(self, name: str) -> Iterator[None]:
        self.graphs[name] += 1
        yield

    def call(self, keys: TaskKey) -> Callable[[], object]:
        """Return a function that samples the tasks of ``keys`` and computes their contribution."""
        return lambda: self.learner.contribute(self.theta, keys, 0)


def fixed_like(document: Document) -> Document:
    """Return ``document`` with the tasks of one size whose mean rows are nearest to those of the drawn sizes."""
    tasks = supervised(build(document).learner).tasks
    possible = tasks.possible_sizes("train")
    mean = [fmean(rows) for rows in zip(*possible)]
    given = {key: document["tasks"].get(f"train_{key}") or document["tasks"].get(key, 1) for key in RANGES}
    low, high = zip(*(bounds(tuple(v) if isinstance(v, list) else v) for v in given.values()))
    choices = [
        (n, k, q)
        for n in range(low[0], high[0] + 1)
        for k in range(low[1], high[1] + 1)
        for q in range(low[2], high[2] + 1)
    ]
    n, k, q = min(choices, key=lambda c: abs(c[0] * c[1] / mean[0] - 1) + abs(c[0] * c[2] / mean[1] - 1))
    sizes = [f"tasks.{key}={value}" for key, value in zip(RANGES, (n, k, q))]
    return override(document, [*sizes, *(f"tasks.train_{key}=null" for key in RANGES)])


def run(document: Document, *, rounds: int = 5, threads: int = 1) -> dict[str, Any]:
    """Measure groups of tasks of one size, and of each bucket of the drawn sizes, in turn."""
    torch.set_num_threads(threads)
    drawn = _Timed(supervised(build(document).learner))
    family, fixed = drawn.learner.tasks, fixed_like(document)
    group = family.group_size("train")
    if group is None:
        raise ConfigError(
            "bench ragged: the tasks of this config have one size; give n_way, k_shot or query_shots as ranges"
        )
    one_size = _Timed(supervised(build(fixed).learner))
    count = min(group, drawn.learner.outer.shard_size)
    buckets = Buckets.of(family, drawn.learner.algorithm)
    possible = family.possible_sizes("train")
    shares = Counter(buckets.rows(*rows) for rows in possible)
    calls = {FIXED: one_size.call(TaskKey.of(0, "train", 0, range(count)))}
    for keys in drawn.learner.keys_of_graphs(0):
        first, task = int(keys.tasks[0]), drawn.learner.sample(keys)
        rows = buckets.rows(task.support.y.shape[1], task.query.y.shape[1])
        calls[_title(rows)] = drawn.call(replace(keys, tasks=torch.arange(first, first + count)))
    missing = [_title(rows) for rows in shares if _title(rows) not in calls]
    if missing:
        raise ConfigError(
            f"bench ragged: no task of the bucket {', '.join(missing)} among the first groups; try another seed"
        )
    seconds = {name: median(values) for name, values in interleaved(calls, rounds=rounds, block=2).items()}
    expected = sum(share * seconds[_title(rows)] for rows, share in shares.items()) / len(possible)
    rate = {FIXED: count / seconds[FIXED], "drawn sizes": count / expected}
    real, padded = (_passes(some, buckets) for some in (possible, [buckets.rows(*rows) for rows in possible]))
    return {
        "settings": {"config": document.get("name"), "tasks_together": count, "rounds": rounds, "threads": threads},
        "cases": {
            "compiled tasks": {
                "unit": "tasks/s",
                "contestants": {
                    FIXED: {"tasks_per_second": rate[FIXED], "ratio": 1.0},
                    "drawn sizes": {
                        "tasks_per_second": rate["drawn sizes"],
                        "ratio": rate["drawn sizes"] / rate[FIXED],
                    },
                },
                "one_size": {key: fixed["tasks"][key] for key in RANGES if key in fixed["tasks"]},
                "graphs": {"one size": _most(one_size.graphs), "drawn sizes": _most(drawn.graphs)},
                "share_of_padding": 1 - real / padded,
                "seconds": {name: round(value, 5) for name, value in seconds.items()},
            }
        },
    }


def _title(rows: tuple[int, int]) -> str:
    return f"bucket {rows[0]} + {rows[1]} rows"


def _most(graphs: Counter[str]) -> int:
    """Return the number of graphs of the piece of a contribution that has most."""
    return max(graphs.values(), default=0)


def _passes(sizes: list[tuple[int, int]] | Any, buckets: Buckets) -> int:
    return sum(buckets.support_cost * support + query for support, query in sizes)
