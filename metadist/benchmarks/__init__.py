"""Benchmarks: contestants that do the same work, measured in turn in one process, and printed with what the machine can do.

To add one: write ``metadist/bench/NAME.py`` with ``run(...) -> dict`` (``settings``, ``cases``: title → ``unit``,
``contestants`` and further facts), a line in ``BENCHMARKS``, and a subcommand in ``commands.py`` that ends in
``measure(…)``.
"""

from __future__ import annotations

import importlib
from typing import Any

#: name → what it measures. Its module is imported when it is asked for.
BENCHMARKS = {
    "inner-loop": "one shard's meta-gradient against the plain loop, higher, TorchOpt and JAX",
    "memory": "peak memory and time over the number of inner steps: unrolled against mixed",
    "tasks": "the task samplers alone: a shard at once, task by task, and image by image as usually written",
    "tracking": "seconds per meta-step with a dead and with a frozen MLflow server against none",
    "transport": "θ out and contributions back through one Ray actor against a memcpy of the same bytes",
    "scaling": "N Ray actors against N processes without driver, Ray and transport; what a meta-step costs besides",
    "rl2": "environment steps and end-to-end steps of RL² against a plain Gymnasium vector environment",
    "serve": "adaptations over gRPC from 1, 8 and 64 callers: batched against one at a time",
    "driver-memory": "resident memory of the driver over meta-steps, through one Ray actor",
}


def bench(name: str, **options: Any) -> dict[str, Any]:
    """The benchmark's report, with its name and the machine."""
    from metadist.benchmarks.timing import machine
    from metadist.core.errors import one_of

    one_of("bench", name, BENCHMARKS)
    report = importlib.import_module(f"metadist.benchmarks.{name.replace('-', '_')}").run(**options)
    return {"benchmark": name, **report, "machine": machine()}
