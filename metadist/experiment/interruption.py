"""Stop a run at Ctrl-C and SIGTERM."""

from __future__ import annotations

import signal
import threading
from collections.abc import Callable
from types import FrameType
from typing import Any

from metadist.experiment.result import Result
from metadist.training.observers import Observer

SIGNALS = (signal.SIGINT, signal.SIGTERM)


class TrainingInterrupted(KeyboardInterrupt):
    """Ctrl-C or SIGTERM ended ``metadist.train`` after a meta-step, with a checkpoint. ``result`` has the state so far.

    A KeyboardInterrupt, so that a program ends unless it catches it.
    """

    def __init__(self, result: Result) -> None:
        super().__init__(
            f"stopped at meta-step {result.outcome.progress.meta_step}, with a checkpoint; continue with "
            f"metadist.train(…, run_dir={result.run_dir!r}, resume=True)"
        )
        self.result = result


class StopSignals(Observer):
    """Handle Ctrl-C and SIGTERM around ``train``; it is the ``stop`` of the request and one of its observers.

    While the loop runs, the first signal stops it after the present meta-step, and the second one interrupts. Before
    and after the loop, the first one interrupts (KeyboardInterrupt). A context, which restores the handlers. Handlers
    that the program has set itself stay; outside the main thread Python has no handlers, and nothing happens.
    """

    def __init__(self, say: Callable[[str], None]) -> None:
        self._say = say
        self._before: dict[int, Any] = {}
        self.asked = self._looping = False

    def __enter__(self) -> StopSignals:
        if threading.current_thread() is threading.main_thread():
            known = (signal.SIG_DFL, signal.SIG_IGN, signal.default_int_handler)
            self._before = {n: h for n in SIGNALS if (h := signal.getsignal(n)) in known}
        if signal.SIGTERM in self._before:
            signal.signal(signal.SIGTERM, signal.default_int_handler)
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def __call__(self) -> bool:
        """Return whether the loop should stop. The first call begins the loop."""
        if not self._looping:
            self._looping = True
            self._set(self._handle)
        return self.asked

    def testing(self, tasks: int) -> None:
        """End the loop."""
        self._looping = False
        self._set(signal.default_int_handler)

    def _set(self, handler: Callable[[int, FrameType | None], Any]) -> None:
        for number in self._before:
            signal.signal(number, handler)

    def _handle(self, number: int, frame: FrameType | None) -> None:
        self.asked = True
        self._set(signal.default_int_handler)
        self._say("\nstopping after this meta-step, with a checkpoint; press Ctrl-C again to stop immediately")
