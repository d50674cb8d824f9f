"""Choose the engine of a run: resolve every ``auto`` once, from the configuration and the workers' device.

The memory plan is read off graphs: one task's meta-gradient is traced for one and for two inner steps, the bytes that
are alive at each operator are counted, and the peak is proportional to steps and tasks.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass, field, replace
from typing import Literal, Protocol

from metadist.core.algorithm import with_inner_steps
from metadist.core.engine import Differentiation, Engine, Hessian
from metadist.core.errors import ConfigError
from metadist.engine.agreement import mixed_disagrees
from metadist.engine.buckets import MOST
from metadist.engine.comparison import Estimator, estimators
from metadist.engine.estimators import ESTIMATORS
from metadist.engine.memory import Footprint, allocated_bytes, footprint
from metadist.engine.subject import Subject

#: under ``auto``, runs of fewer inner and outer passes over a task end before a compiler does
WORTH_COMPILING = 50_000
#: under ``auto``, a shard that takes less than this many times a core's cache is computed whole: a second call of the
#: graph costs more than the memory traffic that it saves (MLP, 25 tasks in 1.2 times a cache: 1.07 ms whole, 1.66 in
#: chunks of 16, 1.96 in chunks of 8)
CACHES_WORTH_CHUNKING = 4
#: share of a chunked shard's computation that padding may cost under ``auto``
MAX_PADDING = 0.15
#: under ``auto``, graphs of more inner steps take minutes to compile; mixed mode's graphs do not grow with inner steps
MAX_COMPILED_STEPS = 5
#: share of a device's memory that a plan may fill
USABLE = 0.6


class EngineRequest(Protocol):
    """The part of a configuration that a plan resolves."""

    @property
    def compile(self) -> Literal["auto", "always", "never"]: ...

    @property
    def differentiation(self) -> Literal["auto", "unrolled", "mixed", "implicit", "truncated", "es", "pes"]: ...

    @property
    def chunk(self) -> int | Literal["auto"]: ...

    @property
    def precision(self) -> Literal["float32", "tf32", "bfloat16"]: ...

    @property
    def deterministic(self) -> bool: ...


@dataclass(frozen=True)
class Device:
    """The facts about a worker's device that a plan needs."""

    kind: str
    name: str
    memory_bytes: int
    #: why nothing can be compiled for the device, or None
    no_compiler: str | None
    cores: int = 1
    #: the cache of one core, where it is known
    cache_bytes: int | None = None


@dataclass(frozen=True)
class Plan:
    """The engine of a run, and the reasons for it."""

    engine: Engine
    device: Device
    reasons: dict[str, str] = field(default_factory=dict)
    memory: _Memory | None = None
    #: measures the ways that an algorithm with carried state admits, as ``as_dict`` shows them
    measure: Callable[[], dict[str, object]] | None = None

    @classmethod
    def eager(cls, device: Device) -> Plan:
        """Compute eagerly and unrolled, without looking at the learner."""
        return cls(Engine(), device)

    def as_dict(self) -> dict[str, object]:
        """Return plain data, with the predicted peaks of a chunk in bytes and the measured ``estimators`` where there
        are tasks to measure them on."""
        memory = self.memory
        if memory is None:
            known = {"engine": asdict(self.engine), "reasons": self.reasons, "device": asdict(self.device)}
            return {**known, **(self.measure() if self.measure else {})}
        tasks = self.engine.chunk or memory.shard
        peaks = {kind: memory.peak(kind, tasks) for kind in memory.kinds}
        return {
            "engine": asdict(self.engine),
            "reasons": self.reasons,
            "device": asdict(self.device),
            "shard_size": memory.shard,
            "tasks_at_once": tasks,
            "predicted_peak_bytes": peaks,
            "estimators": [asdict(e) for e in memory.estimators(self.engine)],
            "usable_bytes": memory.budget,
        }


def plan_shards(subject: Subject, request: EngineRequest, device: Device, sharing: float = 1.0) -> Plan:
    """Resolve ``request`` for the shards of ``subject`` on workers that compute on ``device``.

    ``sharing`` workers share the device's memory. Raises ConfigError where the request cannot be met.
    """
    reasons: dict[str, str] = {}
    if request.precision == "tf32" and device.kind != "cuda":
        raise ConfigError(
            f"engine.precision: tf32 is a format of NVIDIA GPUs; these workers compute on '{device.name}'. Use float32"
        )
    engine = Engine(
        compile=_compile(subject, request, device, reasons),
        precision=request.precision,
        deterministic=request.deterministic,
    )
    memory = _Memory(subject, request, engine.compile, int(device.memory_bytes * USABLE / sharing))
    engine = _differentiation(subject, request, engine, memory, reasons)
    engine = _chunk(request, engine, memory, device.cache_bytes, reasons)
    return Plan(engine, device, reasons, memory)


def plan_eager(request: EngineRequest, device: Device) -> Plan:
    """Plan for learners without inner-loop graphs: policies of meta-environments run eagerly, in whole shards."""
    _refuse_graphs(request, ("auto",), "supervised tasks; with a meta-environment")
    reasons = {"compile": "not: policies of meta-environments run eagerly"}
    return Plan(Engine(deterministic=request.deterministic), device, reasons)


def plan_carried(
    estimated: bool, request: EngineRequest, device: Device, measure: Callable[[], dict[str, object]] | None = None
) -> Plan:
    """Plan for algorithms with carried state, which run eagerly; ``estimated``: by one of ``ESTIMATORS``.

    ``measure`` is for the plan that is shown.
    """
    allowed = ("auto", *ESTIMATORS) if estimated else ("auto",)
    _refuse_graphs(request, allowed, "adaptation within a meta-step; with an algorithm with carried state")
    reasons = {"compile": "not: particles advance eagerly"}
    if not estimated:
        return Plan(Engine(deterministic=request.deterministic), device, reasons)
    chosen: Differentiation = "truncated"
    if request.differentiation != "auto":
        chosen = request.differentiation
    reasons["differentiation"] = ESTIMATORS[chosen]
    engine = Engine(differentiation=chosen, deterministic=request.deterministic)
    return Plan(engine, device, reasons, measure=measure)


def _refuse_graphs(request: EngineRequest, differentiations: tuple[str, ...], is_for: str) -> None:
    """Raise ConfigError where a request needs the graphs of an inner loop, or a differentiation that is not allowed."""
    allowed = (
        ("compile", request.compile, ("never", "auto")),
        ("differentiation", request.differentiation, differentiations),
        ("chunk", request.chunk, ("auto",)),
        ("precision", request.precision, ("float32",)),
    )
    for name, chosen, values in allowed:
        if chosen not in values:
            raise ConfigError(f"engine.{name}: {chosen} is for {is_for} use {' or '.join(values)}")


class _Memory:
    """Predicted memory of a shard. Each prediction is made when it is first needed."""

    def __init__(self, subject: Subject, request: EngineRequest, compile: bool, budget: int) -> None:
        self.budget, self._subject, self._compile, self._precision = budget, subject, compile, request.precision
        self.shard = min(subject.outer.shard_size, subject.outer.meta_batch_size)
        self.chunk = min(self.shard, request.chunk) if isinstance(request.chunk, int) else self.shard
        gradient = subject.meta_gradient_under(Engine())
        kinds: dict[Differentiation, str | None] = {
            "unrolled": None,
            "mixed": gradient.cannot_walk_back,
            "implicit": gradient.cannot_solve,
        }
        self.kinds = tuple(kind for kind, impossible in kinds.items() if impossible is None)
        self._footprints: dict[str, Footprint] = {}
        self._allocated: int | None = None

    def surely_fits(self, tasks: int, budget: int) -> bool:
        """Return whether the sum of all allocations fits: then the order of allocations does not matter."""
        if self._allocated is None:
            self._allocated = allocated_bytes(self._subject)
        return tasks * self._allocated <= budget

    def estimators(self, engine: Engine) -> list[Estimator]:
        """Measure time and bias of every way of differentiating, with the order of differentiation of ``engine``."""
        engine = replace(engine, compile=False, chunk=None)
        hessian: Hessian = engine.hessian if engine.differentiation != "unrolled" else "reverse"
        kinds = {kind: replace(engine, differentiation=kind, hessian=hessian) for kind in self.kinds}
        return estimators(self._subject, kinds, self.budget)

    def peak(self, differentiation: Differentiation, tasks: int) -> int:
        if differentiation not in self._footprints:
            engine = Engine(
                compile=self._compile,
                differentiation=differentiation,
                precision=self._precision,
                hessian="forward" if self._compile else "reverse",
            )
            self._footprints[differentiation] = footprint(self._subject, engine)
        return self._footprints[differentiation].peak(tasks)


def _compile(subject: Subject, request: EngineRequest, device: Device, reasons: dict[str, str]) -> bool:
    algorithm, outer = subject.algorithm, subject.outer
    if request.compile == "never":
        reasons["compile"] = "as configured"
        return False
    if request.compile == "always":
        if device.no_compiler:
            raise ConfigError(
                f"engine.compile: always, but on '{device.name}' {device.no_compiler}; install one that works, or use "
                "never"
            )
        if reason := _wrong_with_padding(subject):
            raise ConfigError(f"engine.compile: always, but {reason}; use norm: group or layer, or compile: never")
        reasons["compile"] = "as configured"
        return True
    passes = outer.meta_steps * outer.meta_batch_size * (algorithm.inner_steps + 1)
    worth = WORTH_COMPILING * (1 if subject.tasks.group_size("train") is None else MOST)
    if device.no_compiler:
        reasons["compile"] = f"not: {device.no_compiler}"
    elif reason := _wrong_with_padding(subject) or subject.several_graphs():
        reasons["compile"] = f"not: {reason}"
    elif passes < worth:
        reasons["compile"] = f"not: {passes} passes over tasks are fewer than {worth}: they end before a compiler does"
    else:
        reasons["compile"] = f"{passes} passes over tasks repay it"
        return True
    return False


def _wrong_with_padding(subject: Subject) -> str | None:
    """Return why tasks of drawn sizes cannot be padded to the sizes of a few graphs, or None."""
    if subject.tasks.group_size("train") is None or not subject.model.normalises_over_batch:
        return None
    return "tasks of several sizes would be padded, and batch normalisation would mix padding into its statistics"


def _differentiation(
    subject: Subject, request: EngineRequest, engine: Engine, memory: _Memory, reasons: dict[str, str]
) -> Engine:
    chosen, reasons["differentiation"] = _chosen_differentiation(subject, request, engine.compile, memory)
    if chosen == "unrolled":
        return engine
    return _hessian(subject, request, replace(engine, differentiation=chosen), memory.budget, reasons)


def _chosen_differentiation(
    subject: Subject, request: EngineRequest, compile: bool, memory: _Memory
) -> tuple[Differentiation, str]:
    """Return the mode and the reason for it."""
    gradient = subject.meta_gradient_under(Engine())
    impossible = gradient.cannot_solve if request.differentiation == "implicit" else gradient.cannot_walk_back
    steps = subject.algorithm.inner_steps
    tasks, budget = memory.chunk, size(memory.budget)
    if request.differentiation in ESTIMATORS:
        raise ConfigError(
            f"engine.differentiation: {request.differentiation} estimates the gradient of an algorithm with carried "
            f"state, and {type(subject.algorithm).__name__} has none; use unrolled, mixed or auto"
        )
    if request.differentiation in ("mixed", "implicit") and impossible:
        raise ConfigError(f"engine.differentiation: {request.differentiation}, but {impossible}; use unrolled or auto")
    if request.differentiation != "auto":
        return request.differentiation, "as configured"
    if impossible:
        return "unrolled", impossible
    if gradient.cannot_solve is None:
        return "implicit", "the algorithm states that its inner loop ends in a minimum"
    if subject.algorithm.first_order or steps < 2:
        return "unrolled", f"{steps} inner steps" + (", first order" if steps > 1 else "") + ": nothing to save"
    if not memory.surely_fits(tasks, memory.budget) and memory.peak("unrolled", tasks) > memory.budget:
        need = size(memory.peak("unrolled", tasks))
        return "mixed", f"unrolled would take {need} of the {budget} that a worker may use"
    if compile and steps > MAX_COMPILED_STEPS:
        return (
            "mixed",
            f"a graph of {steps} inner steps takes minutes to compile; the graphs of mixed do not grow with steps",
        )
    return "unrolled", f"it fits in the {budget} that a worker may use"


def _hessian(subject: Subject, request: EngineRequest, engine: Engine, budget: int, reasons: dict[str, str]) -> Engine:
    """Choose the order of differentiation for mixed and implicit mode, by a comparison in float64.

    It may take ``budget`` bytes. Implicit differentiation takes the derivatives of mixed, of one step at a time: two
    steps of the latter, which unrolled differentiation is a reference for, show whether they are right.
    """
    if engine.differentiation == "implicit":
        subject = subject.with_algorithm(with_inner_steps(subject.algorithm, min(2, subject.algorithm.inner_steps)))
    # Eagerly, forward mode lacks the fused kernels and holds tangents of all tensors: 1.6 times the time of unrolled
    # on a transformer against 1.3 in reverse. A compiled forward graph needs one pass less.
    chosen = engine.differentiation
    first: Hessian
    second: Hessian
    first, second = ("forward", "reverse") if engine.compile else ("reverse", "forward")
    trial = replace(engine, compile=False, precision="float32", differentiation="mixed")
    trials = {kind: replace(trial, hessian=kind) for kind in (first, second)}
    reason = mixed_disagrees(subject, trials[first], budget)
    if reason is None:
        reasons["hessian"] = f"{first} over reverse, found right in float64"
        return replace(engine, hessian=first)
    other = mixed_disagrees(subject, trials[second], budget)
    if other is not None and request.differentiation == "auto":
        reasons["differentiation"] = f"{chosen} is wrong for this model and algorithm in float64: {other}"
        return replace(engine, differentiation="unrolled")
    if other is not None:
        raise ConfigError(
            f"engine.differentiation: {chosen} is wrong for this model and algorithm in float64: {other}; use unrolled"
        )
    reasons["hessian"] = f"{second} over reverse, because {first} over reverse {reason}"
    return replace(engine, hessian=second)


def _chunk(
    request: EngineRequest, engine: Engine, memory: _Memory, cache: int | None, reasons: dict[str, str]
) -> Engine:
    shard, budget, place = memory.shard, memory.budget, "the memory that a worker may use, "
    if isinstance(request.chunk, int):
        reasons["chunk"] = "as configured"
        return replace(engine, chunk=None if request.chunk >= shard else request.chunk)
    if (
        engine.compile
        and cache
        and shard > 1
        and memory.peak(engine.differentiation, shard) > CACHES_WORTH_CHUNKING * cache
    ):
        # A CPU has no kernel launch to save: tasks are computed together only while they stay in the cache together.
        budget, place = cache, "a core's cache of "
    if memory.surely_fits(shard, budget) or memory.peak(engine.differentiation, shard) <= budget:
        reasons["chunk"] = f"the whole shard of {shard} tasks fits"
        return engine
    chunk = 1 << (shard - 1).bit_length() >> 1
    while chunk > 1 and (
        memory.peak(engine.differentiation, chunk) > budget or (engine.compile and _padding(shard, chunk) > MAX_PADDING)
    ):
        chunk //= 2
    need = memory.peak(engine.differentiation, chunk)
    over = f"; the smallest chunk still needs {size(need)}, more than there is" if need > memory.budget else ""
    reasons["chunk"] = (
        f"{shard} tasks take {size(memory.peak(engine.differentiation, shard))}, {place}{size(budget)}{over}"
    )
    return replace(engine, chunk=chunk)


def _padding(shard: int, chunk: int) -> float:
    """Return the share of padding that a compiled graph of ``chunk`` tasks adds to ``shard`` tasks."""
    return -(-shard // chunk) * chunk / shard - 1


def size(count: float) -> str:
    """Format a number of bytes."""
    for unit in ("B", "KiB", "MiB"):
        if count < 1024:
            return f"{count:.0f} {unit}"
        count /= 1024
    return f"{count:.1f} GiB"
