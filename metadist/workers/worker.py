"""The worker in every process that computes shards: device, threads, numerics fingerprint, measurements."""

from __future__ import annotations

import contextlib
import ctypes
import math
import os
import platform
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

import filelock
import psutil
import torch
from torch import Tensor

from metadist.core.computation import LoadStates, SaveStates
from metadist.core.engine import Engine
from metadist.core.errors import CompilerError, ConfigError, MetadistError, NonFiniteError
from metadist.core.round import Result, Shard, WithOutput
from metadist.core.state import Contribution, Records, TreeSum
from metadist.core.stopwatch import timing
from metadist.engine.plan import Device
from metadist.learners.base import Learner
from metadist.workers.fingerprint import DETERMINISTIC_CUBLAS, numerics_fingerprint
from metadist.workers.plan import device_facts, why_not_compiled
from metadist.workers.states import loaded, saved


def resolve_device(wanted: str, gpus: float) -> torch.device:
    """Return the device for ``engine.device``: ``auto`` is the first visible GPU where ``gpus`` > 0, else the CPU."""
    if wanted == "auto":
        return torch.device("cuda:0" if gpus > 0 and torch.cuda.is_available() else "cpu")
    if wanted.startswith("cuda") and not torch.cuda.is_available():
        raise ConfigError(
            f"engine.device: '{wanted}', but PyTorch {torch.__version__} sees no GPU here; use cpu or auto"
        )
    return torch.device(wanted)


class Worker:
    """Compute shards with one learner on one device.

    ``threads`` is PyTorch's intra-op thread count; it is set for the whole process.
    """

    def __init__(self, learner: Learner, *, name: str, device: str, gpus: float, threads: int) -> None:
        self.learner, self.name, self.threads = learner, name, threads
        torch.set_num_threads(threads)
        keep_freed_memory()
        self.device = resolve_device(device, gpus)
        if self.device.type == "cuda":
            # cuBLAS reads it when it starts; its kernels are deterministic only with such a workspace.
            os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", DETERMINISTIC_CUBLAS)
            torch.cuda.set_device(self.device)
        learner.prepare(self.device)
        self.fingerprint = numerics_fingerprint(
            self.device, threads, learner.model.dtype, release=learner.algorithm.release(Engine())
        )
        self.compile_seconds = 0.0
        self._process = psutil.Process()
        self._process.cpu_percent()
        self._measured_at, self._measured = -math.inf, dict[str, float]()

    def describe(self) -> Device:
        """Return the facts about the device that a plan needs."""
        return device_facts(self.device, self.fingerprint["device"])

    def configure(self, engine: Engine, seed: int) -> dict[str, Any]:
        """Compute with ``engine`` from now on, compile everything that it compiles, and return ``about()``.

        Raises CompilerError where this machine can't comply.
        """
        if engine.compile and (reason := self.describe().no_compiler):
            raise self._cannot_compile(reason)
        if self.device.type == "cuda":
            torch.use_deterministic_algorithms(engine.deterministic)
            torch.backends.cudnn.benchmark = not engine.deterministic
            tf32 = engine.precision == "tf32"
            torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = tf32
        self.learner.set_engine(engine, one_at_a_time)
        release = self.learner.algorithm.release(engine)
        self.fingerprint = numerics_fingerprint(self.device, self.threads, self.learner.model.dtype, engine, release)
        if engine.compile:
            try:
                self.compile_seconds = self.learner.warm_up(seed)
                wrong = self.learner.miscompiled(seed, self.describe().memory_bytes // 4)
            except MetadistError:
                raise
            except Exception as error:  # compilers fail with many types
                raise self._cannot_compile(f"the compiler does not work ({why_not_compiled(error)})") from error
            if wrong:
                raise self._cannot_compile(f"PyTorch's compiler makes a wrong graph of this model, which {wrong}")
        return self.about()

    def _cannot_compile(self, reason: str) -> CompilerError:
        device = self.fingerprint["device"]
        return CompilerError(
            f"worker {self.name} can't comply with engine.compile: on '{device}' {reason}; use engine.compile=never",
            reason,
        )

    def about(self) -> dict[str, Any]:
        """Return the facts about this worker: name, process, device, numerics fingerprint, data."""
        return {
            "name": self.name,
            "pid": os.getpid(),
            "host": platform.node(),
            "device": str(self.device),
            "fingerprint": self.fingerprint,
            "compile_seconds": self.compile_seconds,
            "data_sha256": self.learner.data_sha256,
        }

    def compute(
        self, shard: Shard, theta: Mapping[str, Tensor], inputs: Sequence[Records] = ()
    ) -> tuple[Result, Records | None, dict[str, float]]:
        """Return the shard's result, the output that it keeps (on this worker's device) or None, and measurements.

        The result of a block is the sum over its shards. ``inputs`` are the outputs that the shard needs, in their
        order. The measurements are seconds, resident bytes, CPU %, GPU bytes. Raises TaskError where task code raises.
        """
        started = time.perf_counter()
        with timing() as split:
            result, output = self._summed(shard, theta) if shard.leaf else self._explained(shard, theta, inputs)
        now = time.perf_counter()
        if now > self._measured_at + 1.0:  # these calls take as long as a small shard
            self._measured_at = now
            self._measured = {
                "cpu_percent": self._process.cpu_percent(),
                "memory_bytes": float(self._process.memory_info().rss),
            }
        stats = {
            "seconds": now - started,
            **{f"seconds/{name}": seconds for name, seconds in split.items()},
            **self._measured,
        }
        if self.device.type == "cuda":
            stats["gpu_memory_bytes"] = float(torch.cuda.memory_allocated(self.device))
            with contextlib.suppress(ModuleNotFoundError, RuntimeError):  # needs NVIDIA's management library
                stats["gpu_percent"] = float(torch.cuda.utilization(self.device))
        return result, output, stats

    def _summed(self, block: Shard, theta: Mapping[str, Tensor]) -> tuple[Result, None]:
        """Compute the shards of a block one after another, and add them up in the driver's order."""
        total: TreeSum[Any] = TreeSum(block.leaves, Contribution.absorb)
        for index, shard in enumerate(block.each()):
            total.add(index, self._explained(shard, theta, ())[0])
        return total.result(), None

    def _explained(
        self, shard: Shard, theta: Mapping[str, Tensor], inputs: Sequence[Records]
    ) -> tuple[Result, Records | None]:
        try:
            return self._computed(shard, theta, inputs)
        except (MetadistError, NonFiniteError):
            raise
        except Exception as error:
            if "deterministic" in str(error) and self.device.type == "cuda":
                raise ConfigError(
                    f"this model has no deterministic kernel on a GPU ({str(error).partition(chr(10))[0]}); replace "
                    "the operator, or give exactness up with engine.deterministic=false engine.exact=false"
                ) from error
            raise self._blame(shard, theta, inputs, error) from error

    def _computed(
        self, shard: Shard, theta: Mapping[str, Tensor], inputs: Sequence[Records]
    ) -> tuple[Result, Records | None]:
        if isinstance(shard.computation, SaveStates):
            return saved(shard, inputs[0], self.name), None
        if isinstance(shard.computation, LoadStates):
            found: Result | WithOutput = loaded(shard, self.device)
        else:
            found = self.learner.compute(shard, theta, inputs) if shard.needs else self.learner.compute(shard, theta)
        if isinstance(found, WithOutput) != shard.keeps:
            has = "no output" if shard.keeps else "an output"
            raise ValueError(f"function '{shard.function}' has {has}; the shard says otherwise")
        return (found.result, aligned(found.output, self.device)) if isinstance(found, WithOutput) else (found, None)

    def _blame(
        self, shard: Shard, theta: Mapping[str, Tensor], inputs: Sequence[Records], error: Exception
    ) -> TaskError:
        """Return the error with the tasks of the shard that fail when they are computed alone."""
        tasks = []
        for position in range(shard.count):
            single = replace(shard, start=shard.start + position, count=1)
            try:
                self._computed(single, theta, [_rows_of(records, position, shard.count) for records in inputs])
            except Exception:
                tasks.append(single.start)
        return TaskError(f"{type(error).__name__}: {error}", tuple(tasks))


def aligned(records: Records, device: torch.device) -> Records:
    """Return ``records`` as a receiver decodes them: contiguous, aligned columns on ``device``.

    Kernels may differ in the last bits on a strided or misaligned view, and the worker that rolled out must compute the
    same bits as any other worker.
    """

    def settle(column: Tensor) -> Tensor:
        column = column.to(device).contiguous()
        return column if column.data_ptr() % 64 == 0 else column.clone()

    return Records({name: settle(column) for name, column in records.columns.items()})


def _rows_of(records: Records, position: int, count: int) -> Records:
    """Return one task's rows of an output of ``count`` tasks, which lie one task after another."""
    each = records.rows // count
    return records.part(slice(position * each, (position + 1) * each))


class TaskError(Exception):
    """A task's own code raised. ``tasks`` are the indices of the tasks that fail when they are computed alone."""

    def __init__(self, message: str, tasks: tuple[int, ...] = ()) -> None:
        super().__init__(message)
        self.tasks = tasks

    def __reduce__(self) -> Any:
        return (type(self), (str(self), self.tasks))


@contextlib.contextmanager
def one_at_a_time(name: str) -> Iterator[None]:
    """Hold this machine's lock on the compiler: the first process compiles, and the others find its kernels cached."""
    from torch._inductor.runtime.cache_dir_utils import cache_dir

    os.makedirs(cache_dir(), exist_ok=True)
    with filelock.FileLock(os.path.join(cache_dir(), "metadist.lock")):
        yield


def keep_freed_memory() -> None:
    """Make glibc keep freed blocks of up to 32 MB: the page faults of fresh ones cost a tenth of a conv4 step."""
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None) if sys.platform == "linux" else None
    if mallopt is not None:
        mmap_threshold, trim_threshold = -3, -1
        mallopt(mmap_threshold, 32 << 20)
        mallopt(trim_threshold, 512 << 20)
