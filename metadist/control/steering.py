"""Obey commands at the boundaries of a run's meta-steps.

Commands arrive in any thread and wait. At a boundary the loop's own thread checks each command, records it in the
command log with the number of the meta-step before which it takes effect, and then applies it. At every boundary the
values that change the parameters are read from the log: a resumed run repeats them, and its parameters equal those of
a run without interruption.
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
from metadist.control.commands import Command, CommandRefusedError, CommandResult, Status, Subscription
from metadist.control.feed import Feed
from metadist.core.errors import MetadistError
from metadist.core.round import Executor
from metadist.learners.base import Learner
from metadist.training.scheduler import Scheduler

log = logging.getLogger(__name__)

#: commands that may wait for one boundary, and finished commands that are remembered by their id
MAX_WAITING, MAX_REMEMBERED = 64, 256
#: seconds between two checks of a paused run
PAUSE_SECONDS = 0.1
#: seconds between two counts of the workers for the status
COUNT_SECONDS = 1.0
ENDED = "the run's training is over; no command can take effect any more"


class Recorder(Protocol):
    """The methods of experiment tracking that steering calls."""

    def metrics(self, step: int, values: Mapping[str, float]) -> None: ...

    def artifact(self, path: str | Path, folder: str = "") -> None: ...


@dataclass(frozen=True)
class RunInfo:
    """The identity of a run, and the workers that it asks for, by role."""

    run_id: str
    run_dir: str
    asked: Mapping[str, int]


@dataclass
class _PendingCommand:
    """A command that was submitted; ``settled`` is set once it took effect or was refused."""

    command: Command
    settled: threading.Event = field(default_factory=threading.Event)
    result: CommandResult | None = None
    refusal: MetadistError | None = None

    def settle(self, result: CommandResult | None = None, refusal: MetadistError | None = None) -> None:
        self.result, self.refusal = result, refusal
        self.settled.set()


def resize_meta_batch(learner: Learner, size: int) -> Learner:
    """Return ``learner`` for the driver's loop with ``size`` tasks in a meta-step.

    Raises ``ConfigError`` if the algorithm cannot use that size, ``CommandRefusedError`` if the workers lack memory.
    """
    resized, outer = learner.with_meta_batch_size(size), learner.outer
    planned, shard = min(outer.shard_size, outer.meta_batch_size), min(outer.shard_size, size)
    if shard > planned:
        raise CommandRefusedError(
            f"outer.meta_batch_size: {size} would make shards of {shard} tasks, and the workers' memory was planned "
            f"for {planned} (outer.meta_batch_size {outer.meta_batch_size}, outer.shard_size {outer.shard_size} in the "
            f"config); use {planned} or less, or start a run with a smaller shard_size"
        )
    return resized


def _same(known: _PendingCommand, command: Command) -> _PendingCommand:
    if known.command != command:
        raise CommandRefusedError(
            f"command id '{command.id}' belongs to '{known.command}' already; use a new id for '{command}'"
        )
    if known.result is not None:
        known.settled.set()
    return known


class RunControl:
    """Steers one run: the server's threads submit commands, and the loop obeys them.

    ``learner`` is the learner of the config. ``stop`` returns whether the user pressed Ctrl-C.
    """

    def __init__(
        self,
        log: CommandLog,
        feed: Feed,
        learner: Learner,
        recorder: Recorder,
        info: RunInfo,
        stop: Callable[[], bool] = lambda: False,
    ) -> None:
        self._log, self._feed, self._recorder, self._stop = log, feed, recorder, stop
        self._learner = self._current = learner
        self._info, self._asked, self._there = info, dict(info.asked), dict[str, int]()
        self._changed = threading.Condition()
        self._waiting: list[_PendingCommand] = []
        self._remembered: OrderedDict[str, _PendingCommand] = OrderedDict()
        self._phase, self._paused, self._stopping = "starting", False, False
        self._meta_step = 0
        self._checkpoint: int | None = None
        self._counted, self._started = 0.0, time.time()
        self._executor: Executor | None = None

    # Called from any thread -------------------------------------------------------------------------------------------

    def submit(self, command: Command, timeout: float) -> CommandResult:
        """Submit a command for the next meta-step and wait up to ``timeout`` seconds until it takes effect.

        Raises ``CommandRefusedError`` or ``ConfigError`` with the reason if the run refuses the command.
        """
        pending = self._pending(command)
        pending.settled.wait(timeout)
        if pending.refusal is not None:
            raise pending.refusal
        return pending.result or CommandResult(None, f"{command} waits for the next meta-step")

    def _pending(self, command: Command) -> _PendingCommand:
        with self._changed:
            if (known := self._remembered.get(command.id)) is not None:
                return _same(known, command)
            if (entry := self._log.obeyed(command.id)) is not None:
                result = CommandResult(entry.meta_step, f"{command} took effect before already")
                return _same(_PendingCommand(entry.command, result=result), command)
        self._check(command)
        with self._changed:
            if (known := self._remembered.get(command.id)) is not None:  # sent twice simultaneously
                return _same(known, command)
            if self._phase == "finishing":
                raise CommandRefusedError(ENDED)
            if len(self._waiting) >= MAX_WAITING:
                raise CommandRefusedError(
                    f"{MAX_WAITING} commands wait for the next meta-step already; try again later"
                )
            pending = self._remembered[command.id] = _PendingCommand(command)
            self._waiting.append(pending)
            while len(self._remembered) > MAX_REMEMBERED:
                self._remembered.popitem(last=False)
            self._changed.notify()
        return pending

    def status(self) -> Status:
        """Return the current state of the run."""
        newest = self._feed.newest
        meta_step = max(self._meta_step, newest.meta_step if newest else 0)
        with self._changed:
            waiting = [str(pending.command) for pending in self._waiting]
        return Status(
            self._info.run_id,
            self._info.run_dir,
            self._phase,
            meta_step,
            self._learner.outer.meta_steps,
            self._current.outer.meta_batch_size,
            self._checkpoint,
            dict(self._asked),
            self._there,
            self._feed.tasks_per_second,
            {k: v for k, v in (newest.values if newest else {}).items() if k != "tasks_per_second"},
            self._feed.validation,
            [e.as_dict() for e in self._log.entries[-20:]],
            waiting,
            os.getpid(),
            platform.node(),
            self._started,
        )

    def watch(self) -> AbstractContextManager[Subscription]:
        """Subscribe to the snapshots of the run for the duration of the block."""
        return self._feed.watch()

    # Called by the loop -----------------------------------------------------------------------------------------------

    def boundary(self, meta_step: int, workers: Scheduler, save: Callable[[], bool]) -> tuple[Learner, str | None]:
        """Obey the waiting commands; block while the run is paused.

        Returns the learner for the next meta-step, and the reason to stop (None to continue). ``save`` writes a
        checkpoint and returns whether that succeeded.
        """
        self._executor, self._meta_step = workers.executor, meta_step
        obeyed = 0
        while True:
            for pending in self._taken():
                obeyed += self._obey(pending, save)
            if self._apply_log():  # a command to an earlier attempt of the run
                obeyed += 1
                size = self._current.outer.meta_batch_size
                self._feed.note(f"meta-step {meta_step}: meta_batch_size is {size} from now on, by the command log")
            self._count()
            interrupted = self._stop() or self._stopping
            if interrupted or not self._paused:
                break
            self._phase = "paused"
            workers.idle()
            with self._changed:
                if not self._waiting:
                    self._changed.wait(PAUSE_SECONDS)
        self._phase = "training"
        if obeyed:
            self._record(meta_step)
        return self._current, "interrupted" if interrupted else None

    def saved(self, meta_step: int) -> None:
        """Take note of a checkpoint."""
        self._checkpoint = self._meta_step = meta_step

    def history(self, before: int) -> list[dict[str, Any]]:
        """Return the commands that entered the parameters after ``before`` meta-steps."""
        return self._log.history(before)

    def over(self) -> None:
        """Refuse the waiting commands and every later one: the loop has ended."""
        with self._changed:
            self._phase = "finishing"
        for pending in self._taken():
            pending.settle(refusal=CommandRefusedError(ENDED))

    def _taken(self) -> list[_PendingCommand]:
        with self._changed:
            taken, self._waiting = self._waiting, []
            return taken

    def _check(self, command: Command) -> None:
        """Raise the reason if the run cannot obey ``command``. The answer does not depend on the meta-step."""
        if command.name == "set_meta_batch_size":
            assert command.value is not None
            resize_meta_batch(self._learner, command.value)
        if command.name == "set_workers" and self._executor is not None:
            assert command.value is not None
            if reason := self._executor.cannot_resize(command.role, command.value):
                raise CommandRefusedError(f"workers: {reason}")

    def _obey(self, pending: _PendingCommand, save: Callable[[], bool]) -> bool:
        """Return whether the command took effect. A command that fails never stops the run."""
        command = pending.command
        try:
            self._check(command)
            if done := self._done_already(command):
                pending.settle(CommandResult(self._meta_step, done))
                return False
            self._log.append(command, self._meta_step)
            message = self._apply(command, save)
        except MetadistError as error:
            log.warning("command %s refused: %s", command, error)
            pending.settle(refusal=error)
            return False
        except Exception as error:  # for example a cluster that fails at this moment; the loop handles that
            log.exception("command %s failed", command)
            refusal = CommandRefusedError(f"{command} failed: {type(error).__name__}; the driver's log has the details")
            pending.settle(refusal=refusal)
            return False
        self._feed.note(f"meta-step {self._meta_step}: {message}")
        pending.settle(CommandResult(self._meta_step, message))
        return True

    def _done_already(self, command: Command) -> str:
        if command.name == "pause" and self._paused:
            return "paused already"
        if command.name == "resume" and not self._paused:
            return "the run is not paused"
        return ""

    def _apply(self, command: Command, save: Callable[[], bool]) -> str:
        value = command.value or 0
        if command.name == "pause":
            self._paused, self._phase = True, "paused"
            return f"paused; resume it with 'metadist control {self._info.run_dir} resume'; Ctrl-C saves and stops it"
        if command.name == "resume":
            self._paused, self._phase = False, "training"
            return "resumed"
        if command.name == "checkpoint":
            if not save():
                raise CommandRefusedError(
                    "the checkpoint could not be written; the driver's log says why, older checkpoints remain"
                )
            return "checkpoint written"
        if command.name == "set_meta_batch_size":
            self._apply_log()
            return f"meta_batch_size is {value} from now on"
        if command.name == "set_workers":
            before = self._asked.get(command.role, 0)
            assert self._executor is not None
            self._executor.resize(command.role, value)
            self._asked[command.role] = value
            return f"{command.role}s {before} → {value}" + (
                "; the new workers join when they are ready" if value > before else ""
            )
        self._stopping = True
        return "saves a checkpoint and stops, by command"

    def _apply_log(self) -> bool:
        """Apply the meta-batch size that the log has for this meta-step; return whether it changed.

        The log's entry may come from this attempt of the run or from an earlier one.
        """
        size = self._log.value_at("set_meta_batch_size", self._meta_step) or self._learner.outer.meta_batch_size
        if size != self._current.outer.meta_batch_size:
            self._current = resize_meta_batch(self._learner, size)
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
        """Record the values from this meta-step on as metrics, and the command log as an artifact."""
        self._recorder.metrics(0, {"steering/meta_batch_size": float(self._learner.outer.meta_batch_size)})
        values = {"steering/meta_batch_size": float(self._current.outer.meta_batch_size)}
        values |= {f"steering/{role}s": float(count) for role, count in self._asked.items()}
        self._recorder.metrics(meta_step, values)
        if self._log.path is not None:
            with suppress(OSError):
                self._recorder.artifact(self._log.path)
