"""The executor that computes in this process, one shard per call of ``wait``."""

from __future__ import annotations

import traceback
from collections import deque
from collections.abc import Callable
from typing import Any

import torch

from metadist.core.errors import NonFiniteError
from metadist.core.round import Event, Failed, Finished, OutputKey, Shard
from metadist.core.state import Records, State
from metadist.engine.plan import Plan
from metadist.learners.base import Learner
from metadist.workers.kept_outputs import Kept
from metadist.workers.plan import Planner
from metadist.workers.remote.messages import Content
from metadist.workers.worker import TaskError, Worker


class LocalExecutor:
    """Needs neither Ray nor Arrow. Restores PyTorch's thread count on ``close``."""

    blocks = False

    def __init__(
        self,
        learner: Learner,
        *,
        device: str = "auto",
        threads: int = 1,
        planner: Planner = Plan.eager,
        seed: int = 0,
        note: Callable[[str], None] = lambda message: None,
    ) -> None:
        self._threads = torch.get_num_threads()
        gpus = 1.0 if torch.cuda.is_available() else 0.0
        self._worker = Worker(learner, name="local", device=device, gpus=gpus, threads=threads)
        self.plan = planner(self._worker.describe())
        if self.plan.engine.compile:
            note("compiling…")
        about = self._worker.configure(self.plan.engine, seed)
        if self.plan.engine.compile:
            note(f"compiled in {about['compile_seconds']:.1f} s")
        self._queue: deque[tuple[Shard, int]] = deque()
        self._kept: Kept[dict[str, torch.Tensor], Records] = Kept()
        #: by output: the shard that it comes from
        self._kept_by: dict[OutputKey, Shard] = {}

    def publish(self, meta_step: int, round: int, state: State) -> int:
        self._kept.publish(round, {n: v.to(self._worker.device) for n, v in state.slots.items()})
        return 0

    def capacity(self, role: str) -> int:
        return 1 - len(self._queue)

    def submit(self, shard: Shard, attempt: int) -> None:
        self._queue.append((shard, attempt))

    def cancel(self, shard: Shard, attempt: int) -> None:
        self._queue = deque(item for item in self._queue if item != (shard, attempt))

    def wait(self, timeout: float) -> list[Event]:
        if not self._queue:
            return []
        shard, attempt = self._queue.popleft()
        if missing := self._kept.lacking(shard):
            return [Failed(shard, attempt, "local", "missing", "an output that it needs is not there", missing=missing)]
        inputs = [self._kept.outputs[key] for key in shard.needs]
        try:
            result, output, stats = self._worker.compute(shard, self._kept.thetas[shard.round], inputs)
        except NonFiniteError as error:
            return [Failed(shard, attempt, "local", "rejected", str(error), error.tasks)]
        except TaskError as error:
            detail = "".join(traceback.format_exception(error))
            return [Failed(shard, attempt, "local", "error", str(error), error.tasks, detail=detail)]
        if output is not None:
            self._keep(shard, output)
        return [Finished(shard, attempt, "local", result, stats)]

    def shortage(self) -> str:
        return "this process computes its shards itself"

    def workers(self) -> dict[str, dict[str, Any]]:
        return {"local": {"role": "learner", **self._worker.about()}}

    # Beside other executors -------------------------------------------------------------------------------------------

    def _keep(self, shard: Shard, output: Records) -> None:
        self._kept.keep(shard, output)
        self._kept_by = {key: s for key, s in self._kept_by.items() if key in self._kept.outputs} | {shard.key: shard}

    def lacking(self, shard: Shard) -> tuple[OutputKey, ...]:
        return self._kept.lacking(shard)

    def hold(self, round: int) -> None:
        self._kept.hold(round)

    def output(self, key: OutputKey) -> tuple[Shard, Content] | None:
        from metadist.wire.codec import output_parts

        records = self._kept.outputs.get(key)
        if records is None:
            return None
        shard = self._kept_by[key]
        return shard, lambda: output_parts(records, shard, attempt=0, worker="local")

    def adopt(self, shard: Shard, content: Content) -> None:
        from metadist.wire.codec import decode_output

        self._keep(shard, decode_output(list(content()), shard, device=self._worker.device))

    def cannot_resize(self, role: str, count: int) -> str | None:
        return "this run computes in its own process; stop it, and go on with --resume --workers N to have workers"

    def resize(self, role: str, count: int) -> None:
        raise NotImplementedError

    def kill_busy(self) -> str | None:
        """Return None: this process is the only worker."""
        return None

    def close(self) -> None:
        torch.set_num_threads(self._threads)
