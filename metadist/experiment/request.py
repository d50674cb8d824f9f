"""The options of one process that runs an experiment."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from metadist.core.round import Executor


@dataclass(frozen=True)
class RunRequest:
    """The options of a run: its directory, its id, resumption, and the steps after training.

    ``run_dir`` is a folder or an fsspec URL (default: a new folder under ``METADIST_RUNS``, or the newest run on
    ``resume``). ``run_id`` is the id of a new run; ``parent`` the id of its group of seeds. ``test`` and ``plots``
    follow training. ``stop`` returns True once the run should stop with a checkpoint. ``trust``: the modules that the
    config of the run in ``init_from`` may name, besides those of this run's config. ``wrap`` replaces the executor, for
    example by one that injects faults.
    """

    run_dir: str | None = None
    resume: bool = False
    run_id: str | None = None
    parent: str | None = None
    test: bool = True
    plots: bool = True
    stop: Callable[[], bool] = lambda: False
    trust: Sequence[str] = ()
    wrap: Callable[[Executor], Executor] | None = None
