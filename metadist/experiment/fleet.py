"""The workers of an experiment and their scheduler."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch

from metadist.config.engine import EngineSettings
from metadist.config.experiment import Experiment
from metadist.config.groups import ROLES, WorkerGroup
from metadist.core.errors import ConfigError
from metadist.core.round import Executor
from metadist.engine.plan import Plan
from metadist.experiment.attempt import planner_for
from metadist.storage.run_directory import RunDirectory
from metadist.training.scheduler import Scheduler
from metadist.workers.local import LocalExecutor
from metadist.workers.numerics import Numerics
from metadist.workers.plan import Planner, device_facts
from metadist.workers.remote.messages import Dismissal
from metadist.workers.worker import numerics_fingerprint, resolve_device


def local_plan(experiment: Experiment) -> Plan:
    """The plan that a new run would get from workers on this machine."""
    device = resolve_device(experiment.engine.device, 1.0 if torch.cuda.is_available() else 0.0)
    experiment.learner.prepare(torch.device("cpu"))
    return planner_for(experiment)(
        device_facts(device, numerics_fingerprint(device, 1, experiment.learner.model.dtype)["device"])
    )


@contextmanager
def fleet(
    experiment: Experiment,
    run_id: str,
    planner: Planner | None = None,
    *,
    expected: dict[str, Any] | None = None,
    wrap: Callable[[Executor], Executor] | None = None,
    folder: RunDirectory | None = None,
    note: Callable[[str], None] = lambda message: None,
    mark: Callable[[str], None] = lambda text: None,
) -> Iterator[Scheduler]:
    """Workers and their scheduler, closed at the end. Zero workers compute in this process, without Ray. ``mark`` hears of every
    worker that computes other bits than the run, where it may.

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
        scheduler: Scheduler | None = None
        if any(g.outside and g.max for g in groups):
            executor = _with_outside(
                experiment, run_id, expected, planner, note, mark, lambda: _farewell(scheduler), stack
            )
        elif sum(g.max for g in groups) == 0:
            executor = _local(experiment, groups, expected, ROLES, planner, note, mark)
            stack.callback(executor.close)
        else:
            executor = _ray_executor(experiment, run_id, Numerics(groups, expected, engine.exact, mark), planner, note)
            stack.callback(executor.close)
        scheduler = Scheduler(
            wrap(executor) if wrap is not None else executor,
            experiment.learner,
            timeout=engine.shard_timeout,
            patience=engine.worker_patience,
            on_failure=failure,
        )
        yield scheduler
        scheduler.ended = scheduler.ended or "the run is over"


def _with_outside(
    experiment: Experiment,
    run_id: str,
    expected: dict[str, Any] | None,
    planner: Planner,
    note: Callable[[str], None],
    mark: Callable[[str], None],
    farewell: Callable[[], Dismissal],
    stack: ExitStack,
) -> Executor:
    """Workers from outside, beside those of the config's other groups: Ray's, or this process where they have a ``max`` of 0.
    Without other groups the driver computes nothing itself."""
    from metadist.experiment.remote import desk
    from metadist.workers.joint import JointExecutor

    engine = experiment.engine
    mine = [g for g in experiment.workers if not g.outside]
    outside = [g for g in experiment.workers if g.outside and g.max]
    here = bool(mine) and sum(g.max for g in mine) == 0
    # This process leaves alone what others are there for: it may lack their simulators.
    roles = (
        [r for r in ROLES if r == "learner" or all(g.role != r for g in outside)]
        if here
        else [g.role for g in mine if g.max]
    )
    # A process that computes has the fingerprint of a learner, whatever its ``max``.
    numerics = Numerics([*([WorkerGroup()] if here else mine), *outside], expected, engine.exact, mark)
    needed = {g.role: max(g.min, 0 if g.role in roles else 1) for g in outside}
    theirs = stack.enter_context(desk(experiment, run_id, numerics, note, farewell))
    if "learner" not in roles:  # the first of theirs decides on the plan
        theirs.planner = planner
        theirs.await_minimum(engine.worker_patience, {"learner": needed["learner"]})
    executor: Any
    if here:
        obeyed = planner if theirs.plan is None else (lambda device, plan=theirs.plan: plan)
        executor = _local(experiment, mine, expected, roles, obeyed, note, mark)
        refusal = numerics.refusal(
            "local", "this machine", "learner", next(iter(executor.workers().values()))["fingerprint"]
        )
        assert refusal is None, "it was compared with what the run expects already"
    elif roles:
        executor = _ray_executor(experiment, run_id, numerics, planner, note, mine, theirs.plan)
    else:
        theirs.await_minimum(engine.worker_patience, needed)
        return theirs
    stack.callback(executor.close)
    theirs.obey(executor.plan)
    theirs.await_minimum(engine.worker_patience, needed)
    return JointExecutor(executor, theirs, roles, numerics)


def _farewell(scheduler: Scheduler | None) -> Dismissal:
    """What workers from outside are told at the end: they are needed again where the run was not finished."""
    if scheduler is None or not scheduler.ended:
        return Dismissal("the driver ended before the run was over", "again")
    if scheduler.ended == "interrupted":
        return Dismissal("the run was interrupted, and may be resumed", "again")
    return Dismissal(scheduler.ended, "over")


def _local(
    experiment: Experiment,
    groups: Sequence[WorkerGroup],
    expected: dict[str, Any] | None,
    roles: Sequence[str],
    planner: Planner,
    note: Callable[[str], None],
    mark: Callable[[str], None],
) -> LocalExecutor:
    executor = LocalExecutor(
        experiment.learner,
        device=experiment.engine.device,
        threads=groups[0].threads,
        planner=planner,
        seed=experiment.seed,
        note=note,
    )
    _compare_numerics(experiment.engine, expected, executor, roles, mark)
    return executor


def _ray_executor(
    experiment: Experiment,
    run_id: str,
    numerics: Numerics,
    planner: Planner,
    note: Callable[[str], None],
    groups: Sequence[WorkerGroup] | None = None,
    plan: Plan | None = None,
) -> Executor:
    try:
        from metadist.workers.ray.executor import RayExecutor
    except ModuleNotFoundError as error:
        raise ConfigError(
            f"workers: {error.name} is not installed; pip install 'ray[default]', or use --workers 0"
        ) from error
    engine = experiment.engine
    return RayExecutor(
        experiment.learner,
        experiment.workers if groups is None else groups,
        run=run_id,
        device=engine.device,
        exact=engine.exact,
        patience=engine.worker_patience,
        wire=engine.wire,
        planner=planner,
        seed=experiment.seed,
        note=note,
        numerics=numerics,
        plan=plan,
    )


def _compare_numerics(
    engine: EngineSettings,
    expected: dict[str, Any] | None,
    executor: Executor,
    roles: Sequence[str],
    mark: Callable[[str], None],
) -> None:
    mine = next(iter(executor.workers().values()))["fingerprint"]
    if expected is None:
        return
    for role, before in (("learner", expected), ("environment", expected.get("environment", expected))):
        if mine["id"] == before["id"] or role not in roles:
            continue
        differing = {k: f"{before.get(k)} → {v}" for k, v in mine.items() if k != "id" and before.get(k) != v}
        if not engine.exact:
            mark(f"{role} in the driver: " + "; ".join(f"{k} {v}" for k, v in differing.items()))
            continue
        raise ConfigError(
            f"this process computes other bits than the run's {role}s began with ({differing}); resume on a like machine, or with engine.exact=false"
        )
