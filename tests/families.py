"""Task families for workers in other processes, and how a test tells them what to do."""

from __future__ import annotations

import os
import signal
import time
from dataclasses import dataclass
from pathlib import Path

import torch

from metadist.core.errors import ConfigError
from metadist.core.task import Examples, Task
from metadist.tasks.sinusoid import Sinusoid


@dataclass(frozen=True, kw_only=True)
class Mischief(Sinusoid):
    """Sinusoids; a training shard with task ``task`` of the file ``folder``/deed ("deed task") does that deed before,
    and ``lag`` is for all shards of the process of that number."""

    folder: str

    def sample(self, keys, split):
        task = super().sample(keys, split)
        file = Path(self.folder) / "deed"
        if split != "train" or not file.exists():
            return task
        deed, index = file.read_text().split()
        if deed == "lag" and int(index) == os.getpid():
            time.sleep(0.25)  # far more than a shard takes on a busy machine
        if int(index) not in keys.tasks.tolist():
            return task
        if deed == "raise":
            raise ValueError(f"the sine of task {index} is gone")
        if deed == "exit":
            os._exit(3)
        if deed == "segfault":
            os.kill(os.getpid(), signal.SIGSEGV)
        if deed == "once":
            file.unlink()
            os.kill(os.getpid(), signal.SIGKILL)
        if deed == "slow":
            time.sleep(0.2)
        if deed == "nan":
            bad = (keys.tasks == int(index)).reshape(-1, 1, 1)
            query = Examples(task.query.x, torch.where(bad, float("nan"), task.query.y))
            return Task(task.support, query)
        return task


@dataclass(frozen=True, kw_only=True)
class ByProcess(Sinusoid):
    """What no family may be: after the first meta-step, which the dry run looks at, its tasks depend on the process."""

    def sample(self, keys, split):
        task = super().sample(keys, split)
        if split != "train" or keys.meta_step == 0:
            return task
        return Task(task.support, Examples(task.query.x, task.query.y + os.getpid() % 1009))


@dataclass(frozen=True, kw_only=True)
class Unprepared(Sinusoid):
    """Its data can't be loaded."""

    def prepare(self, device):
        raise ConfigError("the sines are sold out")
