"""Start the workers of an experiment, and their scheduler."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch

from metadist.config.experiment import Experiment
from metadist.config.groups import ROLES, WorkerGroup
from metadist.core.errors import ConfigError
from metadist.core.round import Executor
from metadist.engine.plan import Plan
from metadist.experiment.attempt import planner_for
from metadist.storage.run_directory import RunDirectory
from metadist.training.scheduler import Scheduler
from metadist.workers.fingerprint import numerics_fingerprint
from metadist.workers.kept_outputs import KeepingExecutor
from metadist.workers.local import LocalExecutor
from metadist.workers.numerics import Numerics
from metadist.workers.plan import Planner, device_facts
from metadist.workers.remote.messages import Dismissal
from metadist.workers.settings import RunSettings
from metadist.workers.worker import resolve_device


def local_plan(experiment: Experiment) -> Plan:
    """Return the plan that a new run would get from workers on this machine."""
    device = resolve_device(experiment.engine.device, 1.0 if torch.cuda.is_available() else 0.0)
    experiment.learner.prepare(torch.device("cpu"))
    return planner_for(experiment)(
        device_facts(device, numerics_fingerprint(device, 1, experiment.learner.model.dtype)["device"])
    )


@dataclass(frozen=True)
class WorkerReports:
    """Receivers of reports about workers.

    ``note`` shows a message to the user. ``mark`` receives a description of every accepted worker whose numerics differ
    from the run's. ``directory`` receives the traceback of a task that fails.
    """

    note: Callable[[str], None] = lambda message: None
    mark: Callable[[str], None] = lambda text: None
    directory: RunDirectory | None = None

    def failure(self, detail: str) -> str:
        """Write a traceback to the run directory; return a hint at the file for an error message."""
        if self.directory is None:
            return ""
        self.directory.write("failure.txt", detail)
        return f" (traceback in {self.directory.url}/failure.txt)"


@contextmanager
def start_workers(
    experiment: Experiment,
    run_id: str,
    planner: Planner | None = None,
    *,
    expected: dict[str, Any] | None = None,
    wrap: Callable[[Executor], Executor] | None = None,
    reports: WorkerReports = WorkerReports(),
) -> Iterator[Scheduler]:
    """Start the workers of ``experiment`` and yield their scheduler; close them at the end.

    Without workers this process computes, and Ray is not needed. ``planner`` chooses the engine (default: by the
    config); ``expected`` is the numerics fingerprint at the begin of the run. ``wrap`` replaces the executor, for
    example by one that injects faults.

    Meanwhile PyTorch has one thread in this process: a second thread waits actively at barriers and takes a core from
    the workers.
    """
    engine, division = experiment.engine, _Division.of(experiment.workers)
    scheduler: Scheduler | None = None
    start = _Start(
        experiment,
        _settings(experiment, run_id, reports),
        Numerics(division.compared, expected, engine.exact, reports.mark),
        planner or planner_for(experiment),
        division,
    )
    with ExitStack() as stack:
        stack.callback(torch.set_num_threads, torch.get_num_threads())
        torch.set_num_threads(1)
        executor: Executor
        if division.remote:
            executor = start.with_remote(stack, lambda: _farewell(scheduler))
        else:
            executor = start.own()
            stack.callback(executor.close)
        scheduler = Scheduler(
            executor if wrap is None else wrap(executor),
            experiment.learner,
            timeout=engine.shard_timeout,
            patience=engine.worker_patience,
            on_failure=reports.failure,
        )
        yield scheduler
        scheduler.ended = scheduler.ended or "the run is over"


def _settings(experiment: Experiment, run_id: str, reports: WorkerReports) -> RunSettings:
    engine = experiment.engine
    return RunSettings(
        run_id,
        engine.device,
        experiment.seed,
        engine.wire,
        engine.worker_patience,
        reports.note,
        experiment.code_modules,
        experiment.code,
    )


@dataclass(frozen=True)
class _Division:
    """The worker groups of an experiment, divided by the place of their computation.

    The ``own`` groups are on Ray, or with a ``max`` of 0 in this process (``in_process``). ``remote`` workers connect
    to the driver. ``roles`` are the roles that the ``own`` groups serve.
    """

    own: Sequence[WorkerGroup]
    remote: Sequence[WorkerGroup]
    in_process: bool
    roles: Sequence[str]

    @classmethod
    def of(cls, groups: Sequence[WorkerGroup]) -> _Division:
        remote = [g for g in groups if g.outside and g.max]
        own = [g for g in groups if not g.outside] if remote else list(groups)
        in_process = bool(own) and sum(g.max for g in own) == 0
        if in_process:
            # This process leaves the roles of remote workers to them: it may lack the simulators.
            roles = [r for r in ROLES if r == "learner" or all(g.role != r for g in remote)]
        else:
            roles = [g.role for g in own if g.max]
        return cls(own, remote, in_process, roles)

    @property
    def compared(self) -> list[WorkerGroup]:
        """The groups whose numerics are compared. This process counts as a learner, although its ``max`` is 0."""
        return [*([WorkerGroup()] if self.in_process else self.own), *self.remote]

    @property
    def needed_remote(self) -> dict[str, int]:
        """The number of remote workers that the run needs to begin, by role.

        A role without own workers needs at least one.
        """
        return {g.role: max(g.min, 0 if g.role in self.roles else 1) for g in self.remote}


@dataclass(frozen=True)
class _Start:
    """The parts of a run from which its executors are made."""

    experiment: Experiment
    settings: RunSettings
    numerics: Numerics
    planner: Planner
    division: _Division

    def own(self, plan: Plan | None = None) -> KeepingExecutor[Any, Any]:
        """Start the run's own workers, or an executor in this process; ``plan`` is that of the remote workers."""
        return self._local(plan) if self.division.in_process else self._ray(plan)

    def _local(self, plan: Plan | None) -> LocalExecutor:
        return LocalExecutor(
            self.experiment.learner,
            self.settings,
            threads=self.division.own[0].threads,
            planner=self.planner if plan is None else lambda device: plan,
            numerics=self.numerics,
            roles=self.division.roles,
        )

    def _ray(self, plan: Plan | None) -> KeepingExecutor[Any, Any]:
        try:
            from metadist.workers.ray.executor import RayExecutor
        except ModuleNotFoundError as error:
            raise ConfigError(
                f"workers: {error.name} is not installed; pip install 'ray[default]', or use --workers 0"
            ) from error
        division, learner = self.division, self.experiment.learner
        return RayExecutor(learner, division.own, self.settings, self.numerics, self.planner, plan)

    def with_remote(self, stack: ExitStack, farewell: Callable[[], Dismissal]) -> Executor:
        """Accept remote workers, and start own workers where the config has some. ``stack`` closes both executors.

        Without own groups, the driver computes nothing.
        """
        from metadist.experiment.remote import remote_executor
        from metadist.workers.joint import JointExecutor

        division, patience = self.division, self.settings.patience
        needed = division.needed_remote
        remote = stack.enter_context(remote_executor(self.experiment, self.settings, self.numerics, farewell))
        if "learner" not in division.roles:  # the first remote learner decides on the plan
            remote.planner = self.planner
            remote.await_minimum(patience, {"learner": needed["learner"]})
        if not division.roles:
            remote.await_minimum(patience, needed)
            return remote
        own = self.own(remote.plan)
        stack.callback(own.close)
        remote.obey(own.plan)
        remote.await_minimum(patience, needed)
        return JointExecutor(own, remote, division.roles, self.numerics)


def _farewell(scheduler: Scheduler | None) -> Dismissal:
    """Return the dismissal of remote workers at the end: after an unfinished run they wait for the next driver."""
    if scheduler is None or not scheduler.ended:
        return Dismissal("the driver ended before the run was over", "again")
    if scheduler.ended == "interrupted":
        return Dismissal("the run was interrupted and can be resumed", "again")
    return Dismissal(scheduler.ended, "over")
