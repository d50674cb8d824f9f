"""The executor that computes in this process, one shard per call of ``wait``."""

from __future__ import annotations

import platform
import traceback
from collections import deque
from collections.abc import Collection
from typing import Any

import torch

from metadist.config.groups import ROLES
from metadist.core.errors import CompilerError, NonFiniteError, WorkerError
from metadist.core.round import Event, Failed, Finished, Shard
from metadist.core.state import Records, State
from metadist.engine.plan import Plan
from metadist.learners.base import Learner
from metadist.workers.calls import Content
from metadist.workers.kept_outputs import KeepingExecutor, KeptOutput
from metadist.workers.numerics import Numerics
from metadist.workers.plan import Planner, planned_without_compiler
from metadist.workers.settings import RunSettings
from metadist.workers.worker import TaskError, Worker


class LocalExecutor(KeepingExecutor[dict[str, torch.Tensor], Records]):
    """Compute shards in this process, with ``threads`` threads of PyTorch. Needs neither Ray nor Arrow.

    ``numerics`` judges this process for the ``roles`` that it serves; WorkerError where it is refused. ``close``
    restores PyTorch's thread count.
    """

    blocks = False

    def __init__(
        self,
        learner: Learner,
        settings: RunSettings = RunSettings("local"),
        *,
        threads: int = 1,
        planner: Planner = Plan.eager,
        numerics: Numerics | None = None,
        roles: Collection[str] = ROLES,
    ) -> None:
        super().__init__()
        self._threads = torch.get_num_threads()
        gpus = 1.0 if torch.cuda.is_available() else 0.0
        self._worker = Worker(learner, name="local", device=settings.device, gpus=gpus, threads=threads)
        device = self._worker.describe()
        self.plan = planner(device)
        if self.plan.engine.compile:
            settings.note("compiling…")
        try:
            about = self._worker.configure(self.plan.engine, settings.seed)
        except CompilerError as error:
            self.plan = planned_without_compiler(planner, device, error)
            settings.note(f"not compiled: {error.reason}")
            about = self._worker.configure(self.plan.engine, settings.seed)
        if self.plan.engine.compile:
            settings.note(f"compiled in {about['compile_seconds']:.1f} s")
        if numerics and (refusal := numerics.refusal_of_process(platform.node(), roles, about["fingerprint"])):
            self.close()
            raise WorkerError(refusal)
        self._queue: deque[tuple[Shard, int]] = deque()

    def publish(self, meta_step: int, round: int, state: State) -> int:
        self._kept.publish(meta_step, round, {n: v.to(self._worker.device) for n, v in state.slots.items()})
        return 0

    def capacity(self, role: str) -> int:
        return 1 - len(self._queue)

    def near(self, shard: Shard) -> bool:
        return not self._kept.lacking(shard)

    def submit(self, shard: Shard, attempt: int) -> None:
        self._queue.append((shard, attempt))

    def cancel(self, shard: Shard, attempt: int) -> None:
        self._queue = deque(item for item in self._queue if item != (shard, attempt))

    def wait(self, timeout: float) -> list[Event]:
        if not self._queue:
            return []
        shard, attempt = self._queue.popleft()
        if missing := self._missing(shard, attempt):
            return [missing]
        inputs = [output.stored for output in self._kept.needed(shard)]
        try:
            result, output, stats = self._worker.compute(shard, self._kept.theta(shard)[1] or {}, inputs)
        except NonFiniteError as error:
            return [Failed(shard, attempt, "local", "rejected", str(error), error.tasks)]
        except TaskError as error:
            detail = "".join(traceback.format_exception(error))
            return [Failed(shard, attempt, "local", "error", str(error), error.tasks, detail=detail)]
        if output is not None:
            self._kept.keep(shard, output)
        return [Finished(shard, attempt, "local", result, stats)]

    def shortage(self) -> str:
        return "this process computes its shards itself"

    def workers(self) -> dict[str, dict[str, Any]]:
        return {"local": {"role": "learner", **self._worker.about()}}

    def cannot_resize(self, role: str, count: int) -> str | None:
        return "this run computes in its own process; stop it, and continue with --resume --workers N to have workers"

    def resize(self, role: str, count: int) -> None:
        raise NotImplementedError

    def kill_busy(self) -> str | None:
        """Return None: this process is the only worker."""
        return None

    def close(self) -> None:
        torch.set_num_threads(self._threads)

    # Sharing outputs with another executor; Arrow is imported only here -----------------------------------------------

    def content_of(self, output: KeptOutput[Records]) -> Content:
        from metadist.wire.codec import ResultHeader, output_parts

        return lambda: output_parts(output.stored, ResultHeader(output.shard, 0, "local"))

    def stored_from(self, shard: Shard, content: Content) -> Records:
        from metadist.wire.codec import decode_output

        return decode_output(list(content()), shard, self._worker.device)
