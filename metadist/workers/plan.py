"""Which engine a run gets: everything that says ``auto`` is resolved here, once, from the configuration and the workers' device.

The memory plan is read off graphs: one task's meta-gradient is traced for one and for two inner steps, the bytes that are
alive at each operator are counted, and the peak goes on in proportion to steps and tasks.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import psutil
import torch

from metadist.config.engine import EngineSettings
from metadist.config.groups import WorkerGroup
from metadist.core.engine import Differentiation, Engine, Hessian
from metadist.core.errors import ConfigError
from metadist.engine.agreement import mixed_disagrees
from metadist.engine.memory import Footprint, allocated_bytes, footprint
from metadist.learners.few_shot import Learner
from metadist.learners.trials import TrialLearner

#: under ``auto``, shorter runs than this many inner and outer passes over a task are over before a compiler is
WORTH_COMPILING = 50_000
#: under ``auto``, a shard that takes less than this many times a core's cache is computed whole: a second call of the graph costs more
#: than what leaves the cache (MLP, 25 tasks in 1.2 times a cache: 1.07 ms whole, 1.66 in chunks of 16, 1.96 of 8)
FAR_BEYOND = 4
#: … and chunks of tasks, the last filled up to the same size, may compute this much in vain
MAX_FILLED_UP = 0.15
#: under ``auto``, a graph of more inner steps than this takes minutes to compile; the pieces of mixed don't grow with them
MAX_COMPILED_STEPS = 5
#: share of a device's memory that a plan may fill
USABLE = 0.6


@dataclass(frozen=True)
class Device:
    """What a plan must know of the device that a worker computes on: plain data that travels."""

    kind: str
    name: str
    memory_bytes: int
    #: why nothing can be compiled for it there, or None
    no_compiler: str | None
    cores: int = 1
    #: the cache that belongs to one core, where it is known
    cache_bytes: int | None = None

    @classmethod
    def of(cls, device: torch.device, name: str) -> Device:
        if device.type == "cuda":
            try:
                import triton  # noqa: F401

                reason = None
            except ImportError:
                reason = "triton is not installed"
            return cls("cuda", name, torch.cuda.get_device_properties(device).total_memory, reason, os.cpu_count() or 1)
        compiler = next((c for c in (os.environ.get("CXX"), "g++", "clang++") if c and shutil.which(c)), None)
        reason = None if compiler else "no C++ compiler (g++ or clang++) is on its PATH"
        return cls(device.type, name, _host_memory(), reason, os.cpu_count() or 1, _cache_of_a_core())


def _host_memory() -> int:
    """Physical memory, or the container's limit."""
    total = psutil.virtual_memory().total
    for path in ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory/memory.limit_in_bytes"):
        try:
            with open(path) as file:
                return min(total, int(file.read()))
        except (OSError, ValueError):
            continue
    return total


def _cache_of_a_core() -> int | None:
    """The level-2 cache of the first core, in bytes."""
    for index in range(8):
        folder = Path(f"/sys/devices/system/cpu/cpu0/cache/index{index}")
        try:
            if (folder / "level").read_text().strip() == "2":
                return int((folder / "size").read_text().strip().removesuffix("K")) << 10
        except (OSError, ValueError):
            return None
    return None


@dataclass(frozen=True)
class Plan:
    """The engine that a run gets, and why."""

    engine: Engine
    device: Device
    reasons: dict[str, str] = field(default_factory=dict)
    memory: _Memory | None = None

    def as_dict(self) -> dict[str, Any]:
        """With the predicted peaks of a chunk, in bytes, where they are known."""
        memory = self.memory
        if memory is None:
            return {"engine": asdict(self.engine), "reasons": self.reasons, "device": asdict(self.device)}
        tasks = self.engine.chunk or memory.shard
        peaks = {kind: memory.peak(kind, tasks) for kind in memory.kinds}
        return {
            "engine": asdict(self.engine),
            "reasons": self.reasons,
            "device": asdict(self.device),
            "shard_size": memory.shard,
            "tasks_at_once": tasks,
            "predicted_peak_bytes": peaks,
            "usable_bytes": memory.budget,
        }


def sharing(device: Device, groups: Sequence[WorkerGroup]) -> float:
    """How many workers may have to share the memory of one device."""
    groups = [g for g in groups if not g.outside]  # those have machines of their own
    if device.kind == "cuda":
        return max((1 / g.gpus for g in groups if isinstance(g.gpus, float) and 0 < g.gpus < 1), default=1.0)
    cpus = min((g.cpus for g in groups if g.cpus > 0), default=1.0)
    return max(1.0, min(sum(g.max for g in groups), device.cores // cpus))


def _plan_for_trials(settings: EngineSettings, device: Device) -> Plan:
    """Policies run eagerly and whole: there is no inner loop to be compiled, differentiated or cut into chunks."""
    for name, without in (
        ("compile", "never"),
        ("differentiation", "auto"),
        ("chunk", "auto"),
        ("precision", "float32"),
    ):
        chosen = getattr(settings, name)
        if chosen not in (without, "auto", None):
            raise ConfigError(f"engine.{name}: {chosen} is for supervised tasks; with a meta-environment use {without}")
    return Plan(
        Engine(deterministic=settings.deterministic),
        device,
        {"compile": "not: policies of meta-environments run eagerly"},
    )


def make_plan(
    learner: Learner | TrialLearner, settings: EngineSettings, device: Device, groups: Sequence[WorkerGroup] = ()
) -> Plan:
    """Resolve ``settings`` for ``learner`` on workers of ``groups`` that compute on ``device``.

    Raises ConfigError where what is asked for can't be had.
    """
    if isinstance(learner, TrialLearner):
        return _plan_for_trials(settings, device)
    reasons: dict[str, str] = {}
    if settings.precision == "tf32" and device.kind != "cuda":
        raise ConfigError(
            f"engine.precision: tf32 is a format of NVIDIA GPUs; these workers compute on '{device.name}'. Use float32"
        )
    engine = Engine(
        compile=_compile(learner, settings, device, reasons),
        precision=settings.precision,
        deterministic=settings.deterministic,
    )
    memory = _Memory(learner, settings, engine.compile, int(device.memory_bytes * USABLE / sharing(device, groups)))
    engine = _differentiation(learner, settings, engine, memory, reasons)
    engine = _chunk(settings, engine, memory, device.cache_bytes, reasons)
    return Plan(engine, device, reasons, memory)


class _Memory:
    """What a plan knows of memory, found out only as far as it is asked."""

    def __init__(self, learner: Learner, settings: EngineSettings, compile: bool, budget: int) -> None:
        self.budget, self._learner, self._compile, self._precision = budget, learner, compile, settings.precision
        self.shard = min(learner.outer.shard_size, learner.outer.meta_batch_size)
        self.chunk = min(self.shard, settings.chunk) if isinstance(settings.chunk, int) else self.shard
        self.kinds: tuple[Differentiation, ...] = (
            ("unrolled", "mixed") if learner.meta_gradient.cannot_walk_back is None else ("unrolled",)
        )
        self._footprints: dict[str, Footprint] = {}
        self._allocated: int | None = None

    def fits_anyhow(self, tasks: int, budget: int) -> bool:
        """Without a look at the order of things: all that is ever allocated is less than there may be at once."""
        if self._allocated is None:
            self._allocated = allocated_bytes(self._learner)
        return tasks * self._allocated <= budget

    def peak(self, differentiation: Differentiation, tasks: int) -> int:
        if differentiation not in self._footprints:
            engine = Engine(
                compile=self._compile,
                differentiation=differentiation,
                precision=self._precision,
                hessian="forward" if self._compile else "reverse",
            )
            self._footprints[differentiation] = footprint(self._learner, engine)
        return self._footprints[differentiation].peak(tasks)


def _compile(learner: Learner, settings: EngineSettings, device: Device, reasons: dict[str, str]) -> bool:
    algorithm, outer = learner.algorithm, learner.outer
    if settings.compile == "never":
        reasons["compile"] = "as asked for"
        return False
    if settings.compile == "always":
        if device.no_compiler:
            raise ConfigError(
                f"engine.compile: always, but on '{device.name}' {device.no_compiler}; install one, or use never"
            )
        reasons["compile"] = "as asked for"
        return True
    passes = outer.meta_steps * outer.meta_batch_size * (algorithm.inner_steps + 1)
    if device.no_compiler:
        reasons["compile"] = f"not: {device.no_compiler}"
    elif not learner.tasks_alike():
        reasons["compile"] = "not: tasks differ in size, and each size would be compiled"
    elif passes < WORTH_COMPILING:
        reasons["compile"] = (
            f"not: {passes} passes over tasks are fewer than {WORTH_COMPILING} and over before a compiler is"
        )
    else:
        reasons["compile"] = f"{passes} passes over tasks repay it"
        return True
    return False


def _differentiation(
    learner: Learner, settings: EngineSettings, engine: Engine, memory: _Memory, reasons: dict[str, str]
) -> Engine:
    impossible = learner.meta_gradient.cannot_walk_back
    steps = learner.algorithm.inner_steps
    chosen = settings.differentiation
    tasks, budget = memory.chunk, memory.budget
    if chosen == "mixed" and impossible:
        raise ConfigError(f"engine.differentiation: mixed, but {impossible}; use unrolled or auto")
    if chosen != "auto":
        why = "as asked for"
    elif impossible:
        chosen, why = "unrolled", impossible
    elif learner.algorithm.first_order or steps < 2:
        chosen, why = "unrolled", f"{steps} inner steps" + (", first order" if steps > 1 else "") + ": nothing to save"
    elif not memory.fits_anyhow(tasks, budget) and memory.peak("unrolled", tasks) > budget:
        chosen, why = (
            "mixed",
            f"unrolled would take {size(memory.peak('unrolled', tasks))} of the {size(budget)} that a worker may use",
        )
    elif engine.compile and steps > MAX_COMPILED_STEPS:
        chosen, why = (
            "mixed",
            f"a graph of {steps} inner steps takes minutes to compile; these graphs don't grow with them",
        )
    else:
        chosen, why = "unrolled", f"it fits in the {size(budget)} that a worker may use"
    reasons["differentiation"] = why
    engine = replace(engine, differentiation=chosen)
    if chosen == "unrolled":
        return engine
    # Eagerly, forward mode lacks the fused kernels and holds tangents of everything: 1.6 times unrolled's time on a transformer
    # against 1.3 in reverse. A compiled forward graph is one pass less.
    first: Hessian
    second: Hessian
    first, second = ("forward", "reverse") if engine.compile else ("reverse", "forward")
    trials = {kind: replace(engine, compile=False, precision="float32", hessian=kind) for kind in (first, second)}
    reason = mixed_disagrees(learner, trials[first])
    if reason is None:
        reasons["hessian"] = f"{first} over reverse, found right in float64"
        return replace(engine, hessian=first)
    other = mixed_disagrees(learner, trials[second])
    if other is not None and settings.differentiation == "auto":
        reasons["differentiation"] = f"mixed is wrong for this model and algorithm in float64: {other}"
        return replace(engine, differentiation="unrolled")
    if other is not None:
        raise ConfigError(
            f"engine.differentiation: mixed is wrong for this model and algorithm in float64: {other}; use unrolled"
        )
    reasons["hessian"] = f"{second} over reverse, because {first} over reverse {reason}"
    return replace(engine, hessian=second)


def _chunk(
    settings: EngineSettings, engine: Engine, memory: _Memory, cache: int | None, reasons: dict[str, str]
) -> Engine:
    shard, budget, place = memory.shard, memory.budget, "the memory that a worker may use, "
    if isinstance(settings.chunk, int):
        reasons["chunk"] = "as asked for"
        return replace(engine, chunk=None if settings.chunk >= shard else settings.chunk)
    if engine.compile and cache and shard > 1 and memory.peak(engine.differentiation, shard) > FAR_BEYOND * cache:
        # Without a launch to save, tasks are computed together only for as long as they stay in the cache together.
        budget, place = cache, "a core's cache of "
    if memory.fits_anyhow(shard, budget) or memory.peak(engine.differentiation, shard) <= budget:
        reasons["chunk"] = f"the whole shard of {shard} tasks fits"
        return engine
    chunk = 1 << (shard - 1).bit_length() >> 1
    while chunk > 1 and (
        memory.peak(engine.differentiation, chunk) > budget
        or (engine.compile and _filled_up(shard, chunk) > MAX_FILLED_UP)
    ):
        chunk //= 2
    need = memory.peak(engine.differentiation, chunk)
    over = f"; even so {size(need)} are predicted, more than there may be" if need > memory.budget else ""
    reasons["chunk"] = (
        f"{shard} tasks take {size(memory.peak(engine.differentiation, shard))}, {place}{size(budget)}{over}"
    )
    return replace(engine, chunk=chunk)


def _filled_up(shard: int, chunk: int) -> float:
    """How much more than ``shard`` tasks a compiled graph of ``chunk`` tasks computes for them."""
    return -(-shard // chunk) * chunk / shard - 1


def size(count: float) -> str:
    for unit in ("B", "KiB", "MiB"):
        if count < 1024:
            return f"{count:.0f} {unit}"
        count /= 1024
    return f"{count:.1f} GiB"


Planner = Callable[[Device], Plan]


def as_it_is(device: Device) -> Plan:
    """Eager and unrolled, without a look at anything."""
    return Plan(Engine(), device)


def obey(recorded: dict[str, Any]) -> Planner:
    """The engine of a run that began before."""
    try:
        engine = Engine(**recorded)
    except (TypeError, ConfigError) as error:
        raise ConfigError(f"the run's manifest states an engine that this version doesn't know: {error}") from error
    return lambda device: Plan(engine, device, {"engine": "as the run began"})
