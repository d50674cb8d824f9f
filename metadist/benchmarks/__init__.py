"""Run benchmarks: contestants that do the same work, measured in turn in one process.

To add a benchmark, write ``metadist/benchmarks/NAME.py`` with ``run(...) -> dict`` (``settings``, and ``cases``: title
→ ``unit``, ``contestants`` and further facts), a line in ``BENCHMARKS``, and a subcommand in ``metadist/cli/bench.py``
that ends with ``measure(…)``.
"""

from __future__ import annotations

import importlib
from typing import Any

#: The name of a benchmark → its subject. ``bench`` imports the module of one benchmark only.
BENCHMARKS = {
    "inner-loop": "one shard's meta-gradient against the plain loop, higher, TorchOpt and JAX",
    "memory": "peak memory and time over the number of inner steps: unrolled against mixed",
    "tasks": "the task samplers without learning: a whole shard, task by task, and image by image in a plain loop",
    "ragged": "tasks of drawn sizes against tasks of one size, both compiled: tasks per second, and graphs",
    "tracking": "seconds per meta-step with a dead and with a frozen MLflow server against none",
    "transport": "θ to one Ray actor and contributions back, against a memcpy of the same bytes",
    "scaling": "N Ray actors against N processes without driver, Ray and transport; the overhead of a meta-step",
    "rl2": "environment steps and end-to-end steps of RL² against a plain Gymnasium vector environment",
    "serve": "adaptations over gRPC from 1, 8 and 64 callers: batched against one at a time",
    "optimizers": "a learned optimiser against Adam and SGD with momentum at seven rates each, on held-out tasks",
    "weighting": "training on wrong labels and rare classes: plain, Meta-Weight-Net, learning to reweight, by seed",
    "nas": "architecture search: the discretised network against random ones of its space, on held-out tasks",
    "driver-memory": "resident memory of the driver over meta-steps, through one Ray actor",
}


def bench(name: str, **options: Any) -> dict[str, Any]:
    """Run a benchmark with its options; return its report with its name and the facts of the machine."""
    from metadist.benchmarks.timing import machine
    from metadist.core.errors import one_of

    one_of("bench", name, BENCHMARKS)
    report = importlib.import_module(f"metadist.benchmarks.{name.replace('-', '_')}").run(**options)
    return {"benchmark": name, **report, "machine": machine()}
