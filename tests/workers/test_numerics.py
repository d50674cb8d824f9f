"""The one decision about workers whose numerics differ: refused where the run is exact, else marked."""

from __future__ import annotations

import pytest
import tiny

from metadist.config.groups import WorkerGroup
from metadist.core.errors import ConfigError, WorkerError
from metadist.experiment.fleet import WorkerReports, start_workers
from metadist.workers.numerics import Numerics

LEARNER, ENVIRONMENT = WorkerGroup(), WorkerGroup(role="environment")
MINE = {"torch": "2", "threads": 1, "id": "a"}
OTHER = {"torch": "2", "threads": 2, "id": "b"}


def test_the_first_worker_of_a_role_decides_and_roles_may_differ():
    numerics = Numerics([LEARNER, ENVIRONMENT])
    assert numerics.refusal("learner-0", "here", "learner", MINE) is None
    assert numerics.refusal("environment-0", "here", "environment", OTHER) is None
    assert numerics.refusal("learner-1", "there", "learner", MINE) is None
    refusal = numerics.refusal("learner-2", "there", "learner", OTHER)
    assert refusal == (
        "worker learner-2 on there has other numerics than this run's learners (expected, found: {'threads': (1, 2)}); "
        "use machines of the same kind, or give exactness up with engine.exact: false"
    )


def test_where_exactness_is_given_up_a_difference_is_marked():
    marks = []
    numerics = Numerics([LEARNER], MINE, exact=False, mark=marks.append)
    assert numerics.refusal("learner-0", "there", "learner", OTHER) is None
    assert numerics.refusal("learner-1", "there", "learner", MINE) is None
    assert marks == ["learner on there: threads 2, not 1"]


def test_the_drivers_own_process_is_judged_for_every_role_that_it_serves():
    both = {**MINE, "environment": OTHER}
    marks = []
    assert Numerics([LEARNER]).refusal_of_process("here", ("learner", "environment"), MINE) is None
    assert Numerics([LEARNER], MINE).refusal_of_process("here", ("learner", "environment"), MINE) is None
    assert "this run's learners" in Numerics([LEARNER], MINE).refusal_of_process("here", ("learner",), OTHER)
    apart = Numerics([LEARNER, ENVIRONMENT], both)
    assert apart.refusal_of_process("here", ("learner",), MINE) is None
    assert "this run's environments" in apart.refusal_of_process("here", ("learner", "environment"), MINE)
    inexact = Numerics([LEARNER], both, exact=False, mark=marks.append)
    assert inexact.refusal_of_process("here", ("learner", "environment"), {**MINE, "torch": "3", "id": "c"}) is None
    assert marks == ["learner on here: torch 3, not 2", "environment on here: torch 3, not 2; threads 1, not 2"]


def test_a_new_run_in_this_process_names_no_environments():
    numerics = Numerics([LEARNER])
    numerics.refusal_of_process("here", ("learner", "environment"), MINE)
    assert numerics.expected == {"learner": MINE}


def test_the_runs_fingerprint_is_the_learners_and_names_other_environments():
    numerics = Numerics([LEARNER, ENVIRONMENT], {**MINE, "environment": OTHER})
    workers = {
        "environment-0": {"role": "environment", "fingerprint": OTHER},
        "learner-0": {"role": "learner", "fingerprint": MINE},
    }
    found = numerics.of_run(workers)
    assert list(found) == ["learner-0", "environment-0"]
    assert found["learner-0"]["fingerprint"] == {**MINE, "environment": OTHER}
    assert found["environment-0"]["fingerprint"] == OTHER


def test_impossible_groups():
    with pytest.raises(ConfigError, match="workers: there is no learner"):
        Numerics([ENVIRONMENT])
    with pytest.raises(WorkerError, match="continue with environment workers, or with engine.exact: false"):
        Numerics([LEARNER], {**MINE, "device": "A", "environment": {**OTHER, "device": "B"}})


def test_a_run_in_this_process_obeys_the_same_decision():
    run = tiny.experiment()
    with start_workers(run, "run") as scheduler:
        mine = scheduler.executor.workers()["local"]["fingerprint"]
    other = {**mine, "torch": "1.0.0", "id": "0123"}
    with start_workers(run, "run", expected=mine):
        pass
    match = r"worker local on .* has other numerics .*'torch': \('1.0.0'"
    with pytest.raises(WorkerError, match=match), start_workers(run, "run", expected=other):
        pass
    marks = []
    reports = WorkerReports(mark=marks.append)
    with start_workers(tiny.experiment("engine.exact=false"), "run", expected=other, reports=reports):
        pass
    assert all("not 1.0.0" in mark for mark in marks)
    assert [mark.partition(" on ")[0] for mark in marks] == ["learner", "environment"]
