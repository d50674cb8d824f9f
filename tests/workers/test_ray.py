"""Real actors: killed, stopped, failing, and the driver's reaction. Two actors serve most tests."""

from __future__ import annotations

import contextlib
import dataclasses
import os
import signal
import time
from collections import Counter

import families
import psutil
import pytest
import tiny

from metadist.config.groups import WorkerGroup
from metadist.config.modules import code_hashes
from metadist.core.errors import ConfigError, WorkerError
from metadist.core.round import EvaluationRequest, MetaStepKey, run_rounds
from metadist.learners.few_shot import FewShotLearner
from metadist.training.evaluation import evaluate
from metadist.training.scheduler import Scheduler
from metadist.workers.faulty import Act, FaultyExecutor, Kill
from metadist.workers.local import LocalExecutor
from metadist.workers.numerics import Numerics
from metadist.workers.settings import RunSettings

SEED = 11


@pytest.fixture(scope="module")
def mischief(tmp_path_factory):
    """A learner, and the function that tells its tasks what to do."""
    folder = tmp_path_factory.mktemp("mischief")
    toy = tiny.learner()
    learner = FewShotLearner(
        toy.algorithm, toy.model, families.Mischief(k_shot=4, query_shots=4, folder=str(folder)), toy.outer
    )

    def tell(deed):
        (folder / "deed").write_text(deed) if deed else (folder / "deed").unlink(missing_ok=True)

    return learner, tell


def executor(learner, *groups, expected=None, exact=True, **options):
    from metadist.workers.ray.executor import RayExecutor

    settings = RunSettings("run", **{"patience": 300.0, **options})
    return RayExecutor(learner, groups, settings, Numerics(groups, expected, exact))


@pytest.fixture(scope="module")
def actors(cluster, mischief):
    two = executor(mischief[0], WorkerGroup(min=2, max=2, gpus=0))
    yield two
    two.close()


@pytest.fixture
def told(mischief):
    yield mischief[1]
    mischief[1](None)


def train(executor, learner, steps, first=0, state=None, **options):
    """``steps`` meta-steps; returns the final state and the scheduler."""
    fleet = Scheduler(executor, learner, **{"patience": 300.0, **options})
    state = learner.initial(SEED) if state is None else state
    for step in range(first, first + steps):
        state, _ = run_rounds(learner.meta_step(MetaStepKey("run", step, SEED), state), fleet.sum)
    return state, fleet


@pytest.fixture(scope="module")
def expected(mischief):
    """SHA-256 after so many meta-steps, computed in this process."""
    learner, _ = mischief
    known: dict[int, str] = {}

    def compute(steps):
        if steps not in known:
            local = LocalExecutor(learner)
            known[steps] = train(local, learner, steps)[0].sha256()
            local.close()
        return known[steps]

    return compute


def settle(executor, count, seconds=180.0):
    """Wait until ``count`` workers are there."""
    deadline = time.monotonic() + seconds
    while len(executor.workers()) < count and time.monotonic() < deadline:
        executor.wait(0.2)
    assert len(executor.workers()) == count


def test_two_actors_give_the_bits_of_this_process(actors, mischief, expected):
    state, fleet = train(actors, mischief[0], 20)
    assert state.sha256() == expected(20)
    assert fleet.retried == Counter()
    assert fleet.tasks_done == 200
    taken = fleet.measured.read()
    assert taken.counts["bytes_published"] > 20 * 4 * mischief[0].slots["model"].layout.numel
    assert set(taken.workers) <= set(actors.workers())
    assert len(taken.workers) == 2, "both work"


def test_one_actor_gives_the_same_bits(cluster, mischief, expected):
    one = executor(mischief[0], WorkerGroup(gpus=0))
    try:
        assert train(one, mischief[0], 20)[0].sha256() == expected(20)
    finally:
        one.close()


def test_killing_busy_actors_changes_nothing(actors, mischief, expected):
    settle(actors, 2)
    kill, faulty = Kill(), FaultyExecutor(actors)
    for step in (3, 7, 12):
        faulty.fail_at(lambda s, step=step: s.meta_step == step and s.index + s.leaves > 2, kill)
    state, fleet = train(faulty, mischief[0], 20)
    assert state.sha256() == expected(20)
    assert len(set(kill.killed)) == 3
    assert fleet.retried["lost"] >= 3
    assert fleet.tasks_done == 200


@pytest.mark.long
def test_killing_all_actors_at_once_changes_nothing(actors, mischief, expected):
    settle(actors, 2)

    def kill_all(executor, shard):
        for about in executor.workers().values():
            os.kill(about["pid"], signal.SIGKILL)

    faulty = FaultyExecutor(actors).fail_at(lambda s: s.meta_step == 5 and s.index > 0, Act(kill_all))
    state, fleet = train(faulty, mischief[0], 10)
    assert state.sha256() == expected(10)
    assert fleet.retried["lost"] >= 2


@pytest.mark.long
def test_a_stopped_actor_is_backed_up_then_recycled(actors, mischief, expected):
    settle(actors, 2)
    stopped = []

    def stop(executor, shard):
        busy = next(m for m in executor._pool.members.values() if m.about and m.calls)
        stopped.append((busy.name, busy.about["pid"]))
        os.kill(busy.about["pid"], signal.SIGSTOP)

    faulty = FaultyExecutor(actors).fail_at(lambda s: s.meta_step == 4 and s.index > 1, Act(stop))
    state, fleet = train(faulty, mischief[0], 10, timeout=8)
    assert state.sha256() == expected(10)
    [(name, pid)] = stopped
    more = fleet
    deadline = time.monotonic() + 180
    step = 10
    while name in actors.workers() and time.monotonic() < deadline:
        state, _ = run_rounds(mischief[0].meta_step(MetaStepKey("run", step, SEED), state), more.sum)
        step += 1
        time.sleep(0.1)
    assert name not in actors.workers()
    deadline = time.monotonic() + 120  # a process that was killed takes its time to go
    with contextlib.suppress(psutil.NoSuchProcess):
        while psutil.Process(pid).status() != psutil.STATUS_ZOMBIE:
            assert time.monotonic() < deadline, "the stopped actor lives"
            time.sleep(0.1)
    assert state.sha256() == expected(step)
    settle(actors, 2)


def test_an_error_in_task_code_is_named_with_its_task_and_seed(actors, mischief, told):
    settle(actors, 2)
    told("raise 5")
    details = []
    with pytest.raises(WorkerError) as caught:
        train(actors, mischief[0], 2, on_failure=lambda d: details.append(d) or "")
    message = str(caught.value)
    assert "failed alike twice: task 5: ValueError: the sine of task 5 is gone" in message
    assert "tasks 4…5" in message
    assert f"seed {SEED}" in message
    assert "families.py" in details[0], "the traceback is kept"


def test_work_goes_on_after_a_failed_round(actors, mischief, expected):
    """Calls of the failed round may still be under way: their results must not count."""
    settle(actors, 2)
    assert train(actors, mischief[0], 10)[0].sha256() == expected(10)


def test_a_nan_is_attributed_to_its_task(actors, mischief, told):
    settle(actors, 2)
    told("nan 7")
    with pytest.raises(WorkerError, match=rf"tasks 6…7, seed {SEED}.*task 7: tasks \[7\] gave NaN or Inf"):
        train(actors, mischief[0], 1)


def test_a_task_that_kills_its_worker_ends_the_run_after_three(actors, mischief, told):
    settle(actors, 2)
    told("exit 3")
    with pytest.raises(WorkerError) as caught:
        train(actors, mischief[0], 1)
    message = str(caught.value)
    assert "killed 3 workers" in message
    assert "tasks 2…3" in message
    assert f"seed {SEED}" in message
    assert message.count("learner-") >= 3


@pytest.mark.long
def test_a_task_that_kills_once_is_forgiven(actors, mischief, told, expected):
    settle(actors, 2)
    told("once 1")
    state, fleet = train(actors, mischief[0], 10)
    assert state.sha256() == expected(10)
    assert fleet.retried["lost"] >= 1


def test_theta_is_decoded_once_per_actor_and_version(actors, mischief, cluster):
    settle(actors, 2)

    def count_decodings(self):
        import metadist.workers.actor as module

        original = module.decode_theta
        module.decodings = 0

        def counting(*arguments, **options):
            module.decodings += 1
            return original(*arguments, **options)

        module.decode_theta = counting

    def decodings(self):
        import metadist.workers.actor as module

        return module.decodings

    handles = [m.handle for m in actors._pool.members.values()]
    cluster.get([h.__ray_call__.remote(count_decodings) for h in handles])
    train(actors, mischief[0], 12)
    counts = cluster.get([h.__ray_call__.remote(decodings) for h in handles])
    assert 12 <= sum(counts) <= 24
    assert max(counts) <= 12, "5 shards a step, one decoding"


def test_another_theta_of_the_same_meta_step_is_seen(actors, mischief):
    """The last validation and the test of the best parameters have one meta-step, but two θ."""
    settle(actors, 2)
    learner = mischief[0]
    fleet, local = Scheduler(actors, learner), Scheduler(LocalExecutor(learner), learner)
    for seed in (1, 2, 1):
        state = learner.initial(seed)
        request = EvaluationRequest(MetaStepKey("run", 6, SEED), "test", tasks=8, inner_steps=2)
        judged = [f.records(learner.evaluation(request, state)) for f in (fleet, local)]
        assert judged[0].columns["loss"].tolist() == judged[1].columns["loss"].tolist()


def memory(actors, learner, steps):
    """How much the driver grew while it took ``steps`` meta-steps, after a warm-up."""
    state, fleet = train(actors, learner, 50)
    before = psutil.Process().memory_info().rss
    state, fleet = train(actors, learner, steps, first=50, state=state)
    return psutil.Process().memory_info().rss - before, fleet


@pytest.mark.long
def test_the_drivers_memory_is_flat(actors, mischief):
    settle(actors, 2)
    grown, fleet = memory(actors, mischief[0], 150)
    assert grown < 12 << 20
    assert not fleet._outstanding
    assert all(not m.calls for m in actors._pool.members.values())


@pytest.mark.long
@pytest.mark.timeout(1200)
def test_the_drivers_memory_is_flat_over_2000_meta_steps(actors, mischief):
    settle(actors, 2)
    assert memory(actors, mischief[0], 2000)[0] < 20 << 20


# Starting -------------------------------------------------------------------------------------------------------------


def test_gpus_that_are_not_there_are_an_error_after_a_bounded_wait(cluster, mischief):
    began = time.monotonic()
    with pytest.raises(WorkerError) as caught:
        executor(mischief[0], WorkerGroup(gpus=0.5), patience=3)
    assert time.monotonic() - began < 120
    message = str(caught.value)
    assert "\n" not in message
    assert "0 of 1 learners were ready after 3 s" in message
    assert "gpus: 0.5" in message
    assert "0 GPUs" in message


def test_too_many_cpus_are_an_error_after_a_bounded_wait(cluster, mischief):
    with pytest.raises(
        WorkerError, match=r"0 of 1 learners .* asked for 1 × \{cpus: 99, gpus: 0.0\}.* the cluster has 8 CPUs"
    ):
        executor(mischief[0], WorkerGroup(cpus=99, gpus=0), patience=2)


def test_no_minimum_still_waits_for_one_worker(cluster, mischief):
    with pytest.raises(WorkerError, match="0 of 1 learners"):
        executor(mischief[0], WorkerGroup(min=0, max=1, cpus=99, gpus=0), patience=1)


def test_another_fingerprint_than_the_runs_is_refused(cluster, mischief, actors):
    settle(actors, 2)
    mine = next(iter(actors.workers().values()))["fingerprint"]
    other = {**mine, "torch": "1.0.0", "id": "0123"}
    with pytest.raises(
        WorkerError, match=r"has other numerics than this run's learners.*'torch': \('1.0.0'.*engine.exact: false"
    ):
        executor(mischief[0], WorkerGroup(gpus=0), expected=other)
    refused = executor(mischief[0], WorkerGroup(gpus=0), expected=mine)
    refused.close()


@pytest.mark.long
def test_another_copy_of_the_users_module_is_refused(cluster, mischief):
    code = code_hashes(["families"])
    assert list(code) == ["families"]
    match = (
        r"worker learner-\d+ has another copy of module 'families' on .* than the driver on .*; copy the driver's file"
    )
    with pytest.raises(WorkerError, match=match):
        executor(mischief[0], WorkerGroup(gpus=0), modules=("families",), code={"families": "0" * 64})
    executor(mischief[0], WorkerGroup(gpus=0), modules=("families",), code=code).close()


@pytest.mark.long
def test_groups_with_other_threads_are_refused_unless_inexact(cluster, mischief):
    groups = (WorkerGroup(gpus=0), WorkerGroup(gpus=0, threads=2))
    with pytest.raises(WorkerError, match=r"'threads': \("):
        executor(mischief[0], *groups)
    loose = executor(mischief[0], *groups, exact=False)
    try:
        assert sorted(a["fingerprint"]["threads"] for a in loose.workers().values()) == [1, 2]
    finally:
        loose.close()


def test_a_family_that_fails_to_prepare_says_so(cluster, mischief):
    learner = dataclasses.replace(mischief[0], tasks=families.Unprepared())
    with pytest.raises(ConfigError, match="the sines are sold out"):
        executor(learner, WorkerGroup(gpus=0))


def test_gpus_are_shared_per_group(monkeypatch):
    from metadist.workers.ray import cluster as ray_cluster

    monkeypatch.setattr(ray_cluster.ray, "cluster_resources", lambda: {"GPU": 4.0})
    share = ray_cluster.shared_gpus
    pair, single, many = WorkerGroup(max=2), WorkerGroup(gpus=1.0), WorkerGroup(max=8)
    assert share([pair]) == {pair: 2.0}
    assert share([many]) == {many: 0.5}
    assert share([pair, single]) == {pair: 1.0, single: 1.0}
    assert share([WorkerGroup(max=3, gpus=0.25), single]) == {WorkerGroup(max=3, gpus=0.25): 0.25, single: 1.0}
    assert share([single, WorkerGroup(gpus=9)]) == {single: 1.0, WorkerGroup(gpus=9): 9.0}
    assert share([pair, WorkerGroup(gpus=9)])[pair] == 0.0


@pytest.mark.long
def test_scores_are_the_same_for_any_number_of_workers(cluster, tmp_path):
    """Validations, the choice of the best θ (not the last one here) and its test."""
    from metadist.experiment.evaluate import evaluate_run
    from metadist.experiment.judging import EvaluationOptions

    overrides = ["outer.lr=0.3", "evaluate.every=1", "outer.meta_steps=7"]
    alone, fleet = (
        tiny.train(
            tiny.experiment(*overrides, f"workers=[{{min: {n}, max: {n}, gpus: 0}}]"),
            run_dir=str(tmp_path / str(n)),
            plots=False,
        )
        for n in (0, 2)
    )
    assert alone.outcome.best_step < 7
    assert fleet.params_sha256 == alone.params_sha256
    assert fleet.outcome.best_step == alone.outcome.best_step
    assert fleet.outcome.progress.validation == alone.outcome.progress.validation
    assert fleet.evaluations == alone.evaluations
    assert evaluate_run(str(tmp_path / "0"), EvaluationOptions(workers="1")).evaluations == alone.evaluations


# ---- contributions in half precision


@pytest.mark.long
def test_rounded_contributions_train_about_as_well_and_survive_a_kill(cluster, mischief):
    learner = mischief[0]

    def trained(*faults, **options):
        workers = executor(learner, WorkerGroup(min=2, max=2, gpus=0), **options)
        faulty = FaultyExecutor(workers)
        for fault in faults:
            faulty.fail_at(lambda s: s.meta_step == 30 and s.index > 0, fault)
        try:
            state, fleet = train(faulty, learner, 60)
            request = EvaluationRequest(MetaStepKey("run", 60, SEED), "validation", tasks=100)
            losses = evaluate(fleet, learner, state, request).loss
            return losses[-1], fleet, state
        finally:
            workers.close()

    kill = Kill()
    exact, measured, state = trained()
    rounded, fleet, other = trained(kill, exact=False, wire="bfloat16")
    assert any(kill.killed)
    assert fleet.retried["lost"] >= 1
    assert fleet.tasks_done == 600
    assert other.sha256() != state.sha256()
    assert rounded == pytest.approx(exact, rel=0.02)
    assert fleet.measured.read().counts["bytes_received"] < measured.measured.read().counts["bytes_received"]


def test_rounded_contributions_go_with_exactness_given_up(mischief):
    with pytest.raises(ConfigError, match=r"engine.wire: bfloat16 .* engine.exact: false"):
        executor(mischief[0], WorkerGroup(gpus=0), wire="bfloat16")
    with pytest.raises(ConfigError, match=r"engine.wire: 'float8' is not one of exact, bfloat16"):
        executor(mischief[0], WorkerGroup(gpus=0), wire="float8")
