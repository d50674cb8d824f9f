"""Time θ to one Ray actor and contributions back, against a plain memcpy of the same bytes.

The actor's learner computes nothing: its contribution is θ itself. Executor, wire, checks and sum are those of
training.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from typing import Any

import torch
import xxhash
from torch import Tensor

from metadist.benchmarks.timing import compare, interleaved
from metadist.config.build import build
from metadist.config.groups import WorkerGroup
from metadist.core.computation import Computation, Evaluate, Gradient
from metadist.core.errors import ConfigError, WorkerError, one_of
from metadist.core.outer import OuterLoop
from metadist.core.parameters import Layout
from metadist.core.round import Executor, Finished, Result, Shard
from metadist.core.state import Contribution, Records, Slot, State
from metadist.learners import supervised
from metadist.learners.few_shot import FewShotLearner
from metadist.wire import WIRES
from metadist.workers.numerics import Numerics
from metadist.workers.settings import RunSettings

BLOCK = 3
#: The number of parameter tensors: that of a transformer with twelve layers.
TENSORS = 150

#: The passes over the bytes that no known implementation avoids. Out: hash, copy into the object store, copy out of it
#: (and hash in the cache).
FLOOR_OUT = {"hash": 1, "memcpy": 2}
FLOOR_BACK = {"hash": 1, "memcpy": 2, "finite check": 1, "add": 1}


class Echo(FewShotLearner):
    """A learner that returns θ as its contribution, or one record per task.

    In this process it must ``copy`` θ: a sum overwrites its terms.
    """

    copy = False

    @classmethod
    def of(cls, parameters: int, outer: OuterLoop | None = None) -> Echo:
        """Return a learner with a number of parameters, in ``TENSORS`` tensors."""
        document = {
            "tasks": {"name": "sinusoid"},
            "model": {"name": "mlp", "hidden": [1]},
            "algorithm": {"name": "maml"},
        }
        base = supervised(build(document).learner)
        echo = cls(base.algorithm, base.model, base.tasks, outer or base.outer)
        sizes = [parameters // TENSORS] * (TENSORS - 1)
        sizes.append(parameters - sum(sizes))
        echo.slots = {"model": Slot(Layout(tuple(f"p{i}" for i in range(TENSORS)), tuple((s,) for s in sizes)))}
        return echo

    def initial(self, seed: int, start_from: Mapping[str, Tensor] | None = None) -> State:
        values = {"model": torch.randn(self.slots["model"].layout.numel, generator=torch.Generator().manual_seed(seed))}
        return State(values, self.outer.initial(self.slots, values))

    def compute(self, shard: Shard, theta: Mapping[str, Tensor], inputs: Sequence[Records] = ()) -> Result:
        if isinstance(shard.computation, Gradient):
            return Contribution(
                {n: v.clone() for n, v in theta.items()} if self.copy else theta, float(shard.count), shard.count
            )
        return Records({"task": torch.arange(shard.count)})


class Line:
    """One executor, with θ and the sum of contributions."""

    def __init__(self, executor: Executor, parameters: int) -> None:
        self.executor = executor
        self.state = Echo.of(parameters).initial(0)
        self.source, self.target = self.state.slots["model"], torch.zeros(parameters)
        self.sum = Contribution({"model": torch.zeros(parameters)}, 0.0, 0)
        self._step = self._index = 0

    def contestants(self) -> dict[str, Callable[[], Any]]:
        """Return the calls to time, by name."""
        data: Any = self.source.numpy()
        return {
            "memcpy": lambda: self.target.copy_(self.source),
            "hash": lambda: xxhash.xxh3_128_digest(data),
            "finite check": lambda: Contribution({"model": self.source}, 1.0, 1).is_finite(),
            "add": lambda: self.target.add_(self.source),
            "call without bytes": lambda: self.call(Evaluate()),
            "theta out": self.out,
            "contribution back": self.back,
        }

    def out(self) -> None:
        """Publish θ; the actor fetches, checks and decodes it."""
        self._step += 1
        self.executor.publish(self._step, 0, self.state)
        self.call(Evaluate())

    def back(self) -> None:
        """Let the actor encode and return its contribution; fetch, check, decode and add it."""
        result = self.call(Gradient())
        assert isinstance(result, Contribution)
        if not result.is_finite():
            raise WorkerError("the contribution differs from the parameters that were sent")
        self.sum = self.sum.absorb(result)

    def call(self, computation: Computation) -> Result:
        """Compute one shard on the actor and return its result. Raises WorkerError where the actor fails."""
        self._index += 1
        self.executor.submit(Shard("bench", self._step, 0, self._index, computation, self._index, 1, seed=0), 1)
        while not (events := self.executor.wait(10.0)):
            pass
        (event,) = events
        if not isinstance(event, Finished):
            raise WorkerError(f"the actor failed: {event.message}")
        return event.result


def run(sizes: Sequence[float], *, wire: str = "exact", rounds: int = 5) -> dict[str, Any]:
    """Time every contestant for every size, in a case each.

    ``sizes`` are megabytes of float32 parameters. Each contestant has ``rounds`` turns of three calls, and more for
    small sizes.
    """
    one_of("--wire", wire, WIRES)
    if not sizes or min(sizes) * 250_000 < TENSORS:
        raise ConfigError(f"--sizes: {list(sizes)}; expected megabytes, such as 1,10,100,400")
    cases = {}
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        with ExitStack() as stack:
            for size in sizes:
                cases[f"{size:g} MB of parameters"] = _case(stack, size, wire, rounds)
    finally:
        torch.set_num_threads(threads)
    return {"settings": {"wire": wire, "tensors": TENSORS, "rounds": rounds}, "cases": cases}


def _case(stack: ExitStack, size: float, wire: str, rounds: int) -> dict[str, Any]:
    from metadist.workers.ray.executor import RayExecutor

    parameters = int(size * 250_000)
    # All executors stay until the end: the first one owns the cluster, and an idle one takes no time.
    group = WorkerGroup(cpus=0.1, gpus=0)
    settings = RunSettings("bench", device="cpu", wire=wire)
    numerics = Numerics([group], exact=wire == "exact")
    executor = RayExecutor(Echo.of(parameters), [group], settings, numerics)
    stack.callback(executor.close)
    line = Line(executor, parameters)
    line.out()
    turns = max(rounds, min(10 * rounds, math.ceil(rounds * 50 / size)))
    seconds = interleaved(line.contestants(), rounds=turns, block=BLOCK)
    middle = {name: statistics.median(values) for name, values in seconds.items()}
    facts: dict[str, Any] = {}
    for name, floor in (("theta out", FLOOR_OUT), ("contribution back", FLOOR_BACK)):
        passes = sum(middle[stage] * count for stage, count in floor.items())
        facts[name] = {
            "MB/s": round(size / middle[name]),
            "floor_ms": round(1e3 * passes, 3),
            "floor": " + ".join(f"{count} × {stage}" for stage, count in floor.items()),
            "to_memcpy_without_the_call": round((middle[name] - middle["call without bytes"]) / middle["memcpy"], 2),
            "to_floor_without_the_call": round((middle[name] - middle["call without bytes"]) / passes, 2),
        }
    milliseconds = {name: [1e3 * s for s in values] for name, values in seconds.items()}
    return {"unit": "ms", "contestants": compare(milliseconds, "memcpy", block=BLOCK), **facts}
