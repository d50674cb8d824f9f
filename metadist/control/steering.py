"""A run that obeys commands, at the boundaries of its meta-steps.

Commands arrive in any thread and wait. At a boundary the loop's own thread checks each, writes it to the command log with the number
of the meta-step before which it takes effect, and only then lets it. What changes the parameters is read back from the log, at
every boundary: so a resumed run repeats it, and the parameters are those of a run that was never interrupted.
"""

from __future__ import annotations

import logging
import os
import platform
import threading
import time
from collections import OrderedDict
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

from metadist.control.command_log import CommandLog
from metadist.control.commands import Answer, Command, Feed, RefusedError, Standing
from metadist.control.feed import Board
from metadist.core.errors import MetadistError
from metadist.core.round import Executor
from metadist.learners.base import Learner
from metadist.training.scheduler import Scheduler

log = logging.getLogger(__name__)

#: commands that wait for a boundary at once, and settled ones that are remembered by their id
WAITING, REMEMBERED = 64, 256
#: how often a paused run looks around
PAUSE_SECONDS = 0.1
#: how often the workers are counted for those who ask
COUNT_SECONDS = 1.0
OVER = "the run's training is over; there is nothing left to steer"

AnyLearner = Learner


class Recorder(Protocol):
    """What steering needs of experiment tracking."""

    def metrics(self, step: int, values: Mapping[str, float]) -> None: ...

    def artifact(self, path: str | Path, folder: str = "") -> None: ...


@dataclass
class _Order:
    """A command on its way: ``settled`` once it took effect or was refused."""

    command: Command
    settled: threading.Event = field(default_factory=threading.Event)
    answer: Answer | None = None
    refusal: MetadistError | None = None

    def settle(self, answer: Answer | None = None, refusal: MetadistError | None = None) -> None:
        self.answer, self.refusal = answer, refusal
        self.settled.set()


def resized(learner: AnyLearner, size: int) -> AnyLearner:
    """The same learner for the driver's side of the loop, whose meta-steps have ``size`` tasks. ConfigError where that can't be."""
    steered, outer = learner.with_meta_batch_size(size), learner.outer
    planned, shard = min(outer.shard_size, outer.meta_batch_size), min(outer.shard_size, size)
    if shard > planned:
        raise RefusedError(
            f"outer.meta_batch_size: {size} would make shards of {shard} tasks, and the workers' memory was planned for {planned} "
            f"(outer.meta_batch_size {outer.meta_batch_size}, outer.shard_size {outer.shard_size} in the config); stay at {planned} or less, "
            "or begin a run with a smaller shard_size"
        )
    return steered


def _same(known: _Order, command: Command) -> _Order:
    if known.command != command:
        raise RefusedError(
            f"command id '{command.id}' was given to '{known.command}' before; use a new one for '{command}'"
        )
    if known.answer is not None:
        known.settled.set()
    return known


class Steering:
    """``stop`` asks for the end as Ctrl-C does. ``asked``: workers by role, as the run began. ``learner`` is the config's."""

    def __init__(
        self,
        log: CommandLog,
        board: Board,
        learner: AnyLearner,
        recorder: Recorder,
        *,
        run_id: str,
        run_dir: str,
        asked: Mapping[str, int],
        stop: Callable[[], bool] = lambda: False,
    ) -> None:
        self._log, self._board, self._recorder, self._stop = log, board, recorder, stop
        self._learner = self._steered = learner
        self._run_id, self._run_dir, self._asked, self._there = run_id, run_dir, dict(asked), dict[str, int]()
        self._changed = threading.Condition()
        self._waiting: list[_Order] = []
        self._orders: OrderedDict[str, _Order] = OrderedDict()
        self._phase, self._paused, self._stopping = "starting", False, False
        self._meta_step = 0
        self._checkpoint: int | None = None
        self._counted, self._started = 0.0, time.time()
        self._executor: Executor | None = None

    # From any thread --------------------------------------------------------------------------------------------------

    def submit(self, command: Command, timeout: float) -> Answer:
        order = self._order(command)
        order.settled.wait(timeout)
        if order.refusal is not None:
            raise order.refusal
        return order.answer or Answer(None, f"{command} waits for the next meta-step")

    def _order(self, command: Command) -> _Order:
        with self._changed:
            if (known := self._orders.get(command.id)) is not None:
                return _same(known, command)
            if (entry := self._log.obeyed(command.id)) is not None:
                return _same(
                    _Order(entry.command, answer=Answer(entry.meta_step, f"{command} took effect before already")),
                    command,
                )
        self._check(command)
        with self._changed:
            if (known := self._orders.get(command.id)) is not None:  # sent twice at once
                return _same(known, command)
            if self._phase == "finishing":
                raise RefusedError(OVER)
            if len(self._waiting) >= WAITING:
                raise RefusedError(f"{WAITING} commands wait for the next meta-step already; wait for it")
            order = self._orders[command.id] = _Order(command)
            self._waiting.append(order)
            while len(self._orders) > REMEMBERED:
                self._orders.popitem(last=False)
            self._changed.notify()
        return order

    def standing(self) -> Standing:
        newest = self._board.newest
        meta_step = max(self._meta_step, newest.meta_step if newest else 0)
        with self._changed:
            waiting = [str(o.command) for o in self._waiting]
        return Standing(
            self._run_id,
            self._run_dir,
            self._phase,
            meta_step,
            self._learner.outer.meta_steps,
            self._steered.outer.meta_batch_size,
            self._checkpoint,
            dict(self._asked),
            self._there,
            self._board.tasks_per_second,
            {k: v for k, v in (newest.values if newest else {}).items() if k != "tasks_per_second"},
            self._board.validation,
            [e.as_dict() for e in self._log.entries[-20:]],
            waiting,
            os.getpid(),
            platform.node(),
            self._started,
        )

    def watch(self) -> AbstractContextManager[Feed]:
        return self._board.watch()

    # From the loop ----------------------------------------------------------------------------------------------------

    def boundary(self, meta_step: int, fleet: Scheduler, save: Callable[[], bool]) -> tuple[AnyLearner, str | None]:
        """Obey what waits, and return once the run isn't paused: the learner for the next meta-step, and why to stop, if at all."""
        self._executor, self._meta_step = fleet.executor, meta_step
        obeyed = 0
        while True:
            for order in self._taken():
                obeyed += self._obey(order, save)
            if self._replay():  # said to an earlier attempt of the run
                obeyed += 1
                self._board.note(
                    f"meta-step {meta_step}: meta_batch_size {self._steered.outer.meta_batch_size} from here on, as the command log says"
                )
            self._count()
            interrupted = self._stop() or self._stopping
            if interrupted or not self._paused:
                break
            self._phase = "paused"
            fleet.idle()
            with self._changed:
                if not self._waiting:
                    self._changed.wait(PAUSE_SECONDS)
        self._phase = "training"
        if obeyed:
            self._record(meta_step)
        return self._steered, "interrupted" if interrupted else None

    def saved(self, meta_step: int) -> None:
        self._checkpoint = self._meta_step = meta_step

    def history(self, before: int) -> list[dict[str, Any]]:
        """What the parameters after ``before`` meta-steps were trained under."""
        return self._log.history(before)

    def over(self) -> None:
        """The loop has ended: what still waits is refused, and so is what comes."""
        with self._changed:
            self._phase = "finishing"
            waiting, self._waiting = self._waiting, []
        for order in waiting:
            order.settle(refusal=RefusedError(OVER))

    def _taken(self) -> list[_Order]:
        with self._changed:
            taken, self._waiting = self._waiting, []
            return taken

    def _check(self, command: Command) -> None:
        """Raises where the run can't obey; whether it can does not depend on the meta-step."""
        if command.name == "set_meta_batch_size":
            assert command.value is not None
            resized(self._learner, command.value)
        if command.name == "set_workers" and self._executor is not None:
            assert command.value is not None
            if reason := self._executor.cannot_resize(command.role, command.value):
                raise RefusedError(f"workers: {reason}")

    def _obey(self, order: _Order, save: Callable[[], bool]) -> bool:
        """Whether the command took effect. Whatever goes wrong with it, the run goes on."""
        command = order.command
        try:
            self._check(command)
            if done := self._done_already(command):
                order.settle(Answer(self._meta_step, done))
                return False
            self._log.append(command, self._meta_step)
            message = self._apply(command, save)
        except MetadistError as error:
            log.warning("command %s refused: %s", command, error)
            order.settle(refusal=error)
            return False
        except Exception as error:  # a cluster that breaks at this moment is the loop's affair, not the command's
            log.exception("command %s failed", command)
            order.settle(refusal=RefusedError(f"{command} failed: {type(error).__name__}; the driver's log says more"))
            return False
        self._board.note(f"meta-step {self._meta_step}: {message}")
        order.settle(Answer(self._meta_step, message))
        return True

    def _done_already(self, command: Command) -> str:
        if command.name == "pause" and self._paused:
            return "paused already"
        if command.name == "resume" and not self._paused:
            return "it isn't paused"
        return ""

    def _apply(self, command: Command, save: Callable[[], bool]) -> str:
        value = command.value or 0
        if command.name == "pause":
            self._paused, self._phase = True, "paused"
            return f"paused; go on with 'metadist control {self._run_dir} resume', or stop with a checkpoint by Ctrl-C"
        if command.name == "resume":
            self._paused, self._phase = False, "training"
            return "goes on"
        if command.name == "checkpoint":
            if not save():
                raise RefusedError("the checkpoint could not be written; the driver's log says why. Older ones stay")
            return "checkpoint written"
        if command.name == "set_meta_batch_size":
            self._replay()
            return f"meta_batch_size {value} from here on"
        if command.name == "set_workers":
            before = self._asked.get(command.role, 0)
            assert self._executor is not None
            self._executor.resize(command.role, value)
            self._asked[command.role] = value
            return f"{command.role}s {before} → {value}" + (
                "; the new ones join when they are ready" if value > before else ""
            )
        self._stopping = True
        return "stops with a checkpoint, by command"

    def _replay(self) -> bool:
        """What the log says of this meta-step holds, whether it was said just now or to an earlier attempt of the run."""
        size = self._log.value_at("set_meta_batch_size", self._meta_step) or self._learner.outer.meta_batch_size
        if size != self._steered.outer.meta_batch_size:
            self._steered = resized(self._learner, size)
            return True
        return False

    def _count(self) -> None:
        assert self._executor is not None
        if time.monotonic() - self._counted > COUNT_SECONDS:
            self._counted, there = time.monotonic(), dict[str, int]()
            for about in self._executor.workers().values():
                there[about["role"]] = there.get(about["role"], 0) + 1
            self._there = there

    def _record(self, meta_step: int) -> None:
        """In MLflow: what holds from here on, as metrics over meta-steps, and the whole log as an artifact."""
        self._recorder.metrics(0, {"steering/meta_batch_size": float(self._learner.outer.meta_batch_size)})
        values = {"steering/meta_batch_size": float(self._steered.outer.meta_batch_size)}
        values |= {f"steering/{role}s": float(count) for role, count in self._asked.items()}
        self._recorder.metrics(meta_step, values)
        if self._log.path is not None:
            with suppress(OSError):
                self._recorder.artifact(self._log.path)
