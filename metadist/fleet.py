"""The workers of an experiment and their scheduler."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import TYPE_CHECKING, Any

import torch

from metadist.core.errors import ConfigError
from metadist.core.executor import Executor
from metadist.run_folder import RunFolder
from metadist.runtime.local_executor import LocalExecutor
from metadist.runtime.plan import Device, EngineSettings, Plan, Planner, make_plan
from metadist.runtime.scheduler import Scheduler
from metadist.runtime.worker import numerics_fingerprint, resolve_device

if TYPE_CHECKING:
    from metadist.experiment import Experiment


def planner_for(experiment: Experiment) -> Planner:
    """How a new run resolves what its configuration leaves open."""
    return lambda device: make_plan(experiment.learner, experiment.engine, device, experiment.workers)


def local_plan(experiment: Experiment) -> Plan:
    """The plan that a new run would get from workers on this machine."""
    device = resolve_device(experiment.engine.device, 1.0 if torch.cuda.is_available() else 0.0)
    experiment.learner.prepare(torch.device("cpu"))
    return planner_for(experiment)(Device.of(device, numerics_fingerprint(device, 1, experiment.learner.model.dtype)["device"]))


@contextmanager
def fleet(
    experiment: Experiment, run_id: str, planner: Planner | None = None, *, expected: dict[str, Any] | None = None, watch: Any = None,
    folder: RunFolder | None = None, note: Callable[[str], None] = lambda message: None,
) -> Iterator[Scheduler]:  # fmt: skip
    """Workers and their scheduler, closed at the end. Zero workers compute in this process, without Ray.

    Meanwhile PyTorch has one thread in this process: two that spin at barriers take a core from the workers.
    """
    engine, groups = experiment.engine, experiment.workers
    planner = planner or planner_for(experiment)

    def failure(detail: str) -> str:
        if folder is None:
            return ""
        folder.write("failure.txt", detail)
        return f" (traceback in {folder.url}/failure.txt)"

    with ExitStack() as stack:
        stack.callback(torch.set_num_threads, torch.get_num_threads())
        torch.set_num_threads(1)
        executor: Executor
        if sum(g.max for g in groups) == 0:
            executor = LocalExecutor(
                experiment.learner, device=engine.device, threads=groups[0].threads, planner=planner, seed=experiment.seed, note=note
            )
            _refuse_other_numerics(engine, expected, executor)
        else:
            executor = _ray_executor(experiment, run_id, expected, planner, note)
        stack.callback(executor.close)
        yield Scheduler(
            executor, experiment.learner, timeout=engine.shard_timeout, patience=engine.worker_patience, watch=watch, on_failure=failure
        )


def _ray_executor(
    experiment: Experiment, run_id: str, expected: dict[str, Any] | None, planner: Planner, note: Callable[[str], None]
) -> Executor:
    try:
        from metadist.runtime.ray_executor import RayExecutor
    except ModuleNotFoundError as error:
        raise ConfigError(f"workers: {error.name} is not installed; pip install 'ray[default]', or use --workers 0") from error
    engine = experiment.engine
    return RayExecutor(
        experiment.learner, experiment.workers, run=run_id, device=engine.device, expected=expected, exact=engine.exact,
        patience=engine.worker_patience, wire=engine.wire, planner=planner, seed=experiment.seed, note=note,
    )  # fmt: skip


def _refuse_other_numerics(engine: EngineSettings, expected: dict[str, Any] | None, executor: Executor) -> None:
    mine = next(iter(executor.workers().values()))["fingerprint"]
    if not engine.exact or expected is None:
        return
    for role, before in (("learner", expected), ("environment", expected.get("environment", expected))):
        if mine["id"] == before["id"]:
            continue
        differing = {k: f"{before.get(k)} → {v}" for k, v in mine.items() if k != "id" and before.get(k) != v}
        raise ConfigError(
            f"this process computes other bits than the run's {role}s began with ({differing}); resume on a like machine, or with engine.exact=false"
        )
