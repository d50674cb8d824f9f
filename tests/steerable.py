"""A real run that trains in a thread until it is stopped, for tests that steer it."""

from __future__ import annotations

import json
import threading
import time
from pathlib import Path

import tiny
from tiny import train

ENDLESS = (
    "outer.meta_steps=1000000",
    "evaluate.every=1000000",
    "checkpoint.every=1000000",
    "outer.meta_batch_size=8",
    "tracking.log_every=1000",
    "engine.compile=never",  # a command that changes the shards would wait for a compilation
)


class Live:
    """``with Live(folder) as run``: ``run.record`` is its ``control.json``, ``run.result`` its result after the end."""

    def __init__(self, folder: Path, *overrides: str) -> None:
        self.folder, self._experiment = Path(folder), tiny.experiment(*ENDLESS, *overrides)
        self._end, self.result, self.error, self.notes, self.meta_step = threading.Event(), None, None, [], None
        self._thread = threading.Thread(target=self._train)

    def _train(self) -> None:
        try:
            self.result = train(
                self._experiment,
                run_dir=str(self.folder),
                resume=True,
                stop=self._end.is_set,
                display=self,
                plots=False,
            )
        except BaseException as error:
            self.error = error

    def step(self, meta_step, report, tasks_per_second):
        self.meta_step = meta_step
        time.sleep(0.005)  # leaves the processor to the tests

    def evaluated(self, meta_step, evaluation): ...

    def note(self, message):
        self.notes.append(message)

    @property
    def record(self) -> dict:
        return json.loads((self.folder / "control.json").read_text())

    def __enter__(self) -> Live:
        self._thread.start()
        deadline = time.monotonic() + 240
        while self.meta_step is None:
            assert self._thread.is_alive(), self.error
            assert time.monotonic() < deadline
            time.sleep(0.01)
        return self

    def __exit__(self, *_: object) -> None:
        self._end.set()
        self._thread.join(240)
        assert not self._thread.is_alive()
        assert self.error is None, self.error

    def join(self) -> None:
        self._thread.join(240)
        assert not self._thread.is_alive()
