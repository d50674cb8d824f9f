"""Real actors that roll out and learn: killed, without their outputs, with damaged trials; same parameters."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import time
from collections import Counter
from dataclasses import replace
from pathlib import Path

import psutil
import pulls
import pytest
from test_ray import executor

from metadist.config.groups import WorkerGroup
from metadist.core.errors import ConfigError, WorkerError
from metadist.core.round import EvaluationRequest, MetaStepKey, run_rounds
from metadist.training.scheduler import Scheduler
from metadist.workers.faulty import Act, FaultyExecutor, Kill
from metadist.workers.local import LocalExecutor
from metadist.workers.numerics import expected_by_role

# Its fixtures are asked for by name, which the lanes do not see.
pytestmark = pytest.mark.lane("ray")

SEED, STEPS = pulls.SEED, 6
LEARNERS = WorkerGroup(min=2, max=2, gpus=0)
ENVIRONMENTS = WorkerGroup(role="environment", min=2, max=2)


def train(executor, learner, **options):
    fleet = Scheduler(executor, learner, **{"patience": 300.0, **options})
    state = learner.initial(SEED)
    for step in range(STEPS):
        state, _ = run_rounds(learner.meta_step(MetaStepKey("run", step, SEED), state), fleet.sum)
    return state.sha256(), fleet


def many(learner):
    """Four shards of 500 trials: too many for the way through the driver."""
    return replace(learner, outer=replace(learner.outer, meta_batch_size=2000, shard_size=500))


def settle(executor, count):
    deadline = time.monotonic() + 180
    while len(executor.workers()) < count and time.monotonic() < deadline:
        executor.wait(0.2)
    assert len(executor.workers()) == count


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("deeds")


@pytest.fixture
def told(folder):
    yield lambda deed: (folder / "deed").write_text(deed)
    (folder / "deed").unlink(missing_ok=True)


@pytest.fixture(scope="module")
def expected(folder):
    local = LocalExecutor(pulls.learner(folder))
    yield train(local, pulls.learner(folder))[0]
    local.close()


@pytest.fixture(scope="module")
def both(cluster, folder):
    """Learners that roll out themselves."""
    learner = pulls.learner(folder)
    actors = executor(learner, LEARNERS)
    yield actors, learner
    actors.close()


@pytest.fixture(scope="module")
def apart(cluster, folder):
    """One learner, and two workers that roll out; the environments' group stands first."""
    learner = pulls.learner(folder, role="environment")
    actors = executor(learner, ENVIRONMENTS, WorkerGroup(gpus=0))
    yield actors, learner
    actors.close()


@pytest.fixture(params=["both", "apart"])
def fleet(request):
    actors, learner = request.getfixturevalue(request.param)
    settle(actors, 2 if request.param == "both" else 3)
    return actors, learner


def test_the_bits_of_this_process_and_the_driver_decodes_no_trial(fleet, expected, monkeypatch):
    from metadist.wire import codec

    kinds, original = Counter(), codec.decode

    def counting(*arguments, **options):
        header, columns = original(*arguments, **options)
        kinds[header["kind"]] += 1
        return header, columns

    monkeypatch.setattr(codec, "decode", counting)
    sha256, scheduler = train(*fleet)
    assert sha256 == expected
    assert scheduler.retried == Counter()
    assert scheduler.tasks_done == 12 * STEPS
    assert kinds == {"contribution": STEPS * (6 + 4 * 3)}


def test_one_actor_gives_the_same_bits(cluster, folder, expected):
    one = executor(pulls.learner(folder), WorkerGroup(gpus=0))
    try:
        assert train(one, pulls.learner(folder))[0] == expected
    finally:
        one.close()


def either(*functions):
    """(fleet, function) for both fleets; learners that roll out themselves run in the long tests."""
    return pytest.mark.parametrize(
        ("fleet", "given"),
        [("apart", f) for f in functions] + [pytest.param("both", f, marks=pytest.mark.long) for f in functions],
        indirect=["fleet"],
    )


@either("rollout", "gradient")
def test_killing_busy_actors_changes_nothing(fleet, expected, given):
    (actors, learner), kill = fleet, Kill()
    faulty = FaultyExecutor(actors)
    for step in (1, 3):
        faulty.fail_at(lambda s, step=step: s.meta_step == step and s.function == given, kill)
    sha256, scheduler = train(faulty, learner)
    assert sha256 == expected
    assert len(set(kill.killed)) == 2
    assert scheduler.retried["lost"] >= 2
    assert scheduler.retried["missing"] == 0, "what a worker kept outlives it"
    assert scheduler.tasks_done == 12 * STEPS


def on_second_epoch(actors, change, steps=(1, 4)):
    """``change(executor)`` once in each of those meta-steps, in a round whose θ is another than the rollouts'."""

    def forget_and_change(executor, shard):
        # Nobody may know the content any more.
        for member in executor._pool.members.values():
            member.holds.clear()
        change(executor)

    faulty = FaultyExecutor(actors)
    for step in steps:
        faulty.fail_at(lambda s, step=step: s.meta_step == step and s.round == 3, Act(forget_and_change))
    return faulty


def damaged(executor):
    """One bit of every kept output flips on the way."""
    from metadist.workers.ray.executor import pa, ray

    for key, output in list(executor._kept.outputs.items()):
        content = bytearray(b"".join(p.to_pybytes() for p in ray.get(output.stored)))
        content[len(content) * 3 // 4] ^= 4
        executor._kept.outputs[key] = replace(output, stored=ray.put([pa.py_buffer(bytes(content))]))


def exchanged(executor):
    """Undamaged outputs, each under the name of another."""
    outputs = executor._kept.outputs
    references = [o.stored for o in outputs.values()]
    for key, reference in zip(list(outputs), references[1:] + references[:1]):
        outputs[key] = replace(outputs[key], stored=reference)


@either(damaged, exchanged)
def test_wrong_outputs_are_refused_and_rolled_out_anew(fleet, expected, given, caplog):
    actors, learner = fleet
    sha256, scheduler = train(on_second_epoch(actors, given), learner)
    assert sha256 == expected
    assert 4 <= scheduler.retried["missing"] <= 24
    reason = "hash mismatch" if given is damaged else "shard is"
    refusals = [r.getMessage() for r in caplog.records if "was refused: " in r.getMessage()]
    assert refusals
    assert all(reason in message for message in refusals)


@contextlib.contextmanager
def second_node(ray, cpus):
    """A raylet of its own on this machine, soon part of the cluster; yields a function that ends it."""
    command = [str(Path(sys.executable).with_name("ray")), "start", "--block", "--num-cpus", str(cpus)]
    command += ["--address", ray.get_runtime_context().gcs_address]
    importable = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[1])}
    quiet = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
    process = subprocess.Popen(command, start_new_session=True, env=importable, **quiet)

    def kill():
        children = psutil.Process(process.pid).children(recursive=True)
        [raylet] = [c for c in children if c.name() == "raylet"]
        raylet.terminate()  # of a killed one the cluster hears a quarter of a minute later only
        raylet.wait(30)

    try:
        yield kill
    finally:
        os.killpg(process.pid, signal.SIGTERM)
        process.wait(30)


@pytest.mark.long
def test_outputs_that_died_with_their_node_are_rolled_out_anew(cluster):
    """The node of the only environment worker dies at the first gradient, and with it the outputs that lie there."""
    learner = many(pulls.learner(role="environment"))
    local = LocalExecutor(learner)
    expected, _ = train(local, learner)
    local.close()
    here = int(cluster.available_resources()["CPU"]) - 1

    class Filler:
        """An actor that takes room; a local class, since actors can't import this file."""

    filler = cluster.remote(num_cpus=here)(Filler).remote()  # but for the learner this node is full
    cluster.get(filler.__ray_ready__.remote())
    killed = []
    with second_node(cluster, here) as kill:
        actors = executor(learner, WorkerGroup(gpus=0), WorkerGroup(role="environment", cpus=here), patience=90)
        try:

            def kill_node(executor, shard):
                killed.append(
                    [m.about["pid"] for m in executor._pool.members.values() if m.group.role == "environment"]
                )
                cluster.kill(filler)
                kill()

            faulty = FaultyExecutor(actors)
            faulty.fail_at(lambda s: s.meta_step == 2 and s.function == "gradient", Act(kill_node))
            found, scheduler = train(faulty, learner)
        finally:
            actors.close()
    assert killed
    assert found == expected
    assert scheduler.retried["missing"] >= 1


def test_theta_and_trials_are_decoded_once_per_actor(cluster, both, expected):
    actors, learner = both
    settle(actors, 2)

    def count(self):
        import metadist.workers.actor as module

        module.counted = {"decode_theta": 0, "decode_output": 0}

        def counting(name, original):
            def decode(*arguments, **options):
                module.counted[name] += 1
                return original(*arguments, **options)

            return decode

        for name in module.counted:
            setattr(module, name, counting(name, getattr(module, name)))

    def counted(self):
        import metadist.workers.actor as module

        return module.counted

    handles = [m.handle for m in actors._pool.members.values()]
    cluster.get([h.__ray_call__.remote(count) for h in handles])
    assert train(actors, learner)[0] == expected
    for each in cluster.get([h.__ray_call__.remote(counted) for h in handles]):
        assert each["decode_theta"] <= STEPS * 5
        assert each["decode_output"] <= STEPS * 6, "two epochs, but an output comes to an actor once"


def test_environment_workers_answer_with_references(apart, cluster):
    """Trials lie in the object store: what goes through the driver is statistics."""
    actors, learner = apart
    settle(actors, 3)
    big = many(learner)
    scheduler, state = Scheduler(actors, big), big.initial(SEED)
    scheduler.run(next(big.meta_step(MetaStepKey("run", 0, SEED), state)))
    outputs = [o.stored for o in actors._kept.outputs.values()]
    assert len(outputs) == 4
    places = cluster.experimental.get_object_locations(outputs)
    assert all(about["node_ids"] for about in places.values()), "inlined ones have none"
    assert scheduler.measured.read().counts["bytes_received"] < 4 * 16384


# ---- environments that break


def test_an_environment_that_raises_is_named_with_its_task(fleet, told):
    told("raise 5")
    with pytest.raises(
        WorkerError,
        match=rf"tasks 4…5, seed {SEED}\) failed alike twice: task 5: ValueError: the arm of task 5 is stuck",
    ):
        train(*fleet)


def test_a_nan_of_an_environment_is_attributed_to_its_task(fleet, told):
    told("nan 7")
    with pytest.raises(
        WorkerError, match=rf"tasks 6…7, seed {SEED}.*task 7: the environment gave a reward or observation of NaN"
    ):
        train(*fleet)


def test_an_environment_that_kills_its_worker_once_is_forgiven(fleet, told, expected):
    told("once 3")
    sha256, scheduler = train(*fleet)
    assert sha256 == expected
    assert scheduler.retried["lost"] >= 1


@pytest.mark.long
def test_an_environment_that_never_ends_loses_its_worker(apart, told, expected):
    actors, learner = apart
    settle(actors, 3)
    told("hang 3")
    before = set(actors.workers())
    sha256, scheduler = train(actors, learner, timeout=5)
    assert sha256 == expected, "another one has rolled it out"
    deadline = time.monotonic() + 180
    request = EvaluationRequest(MetaStepKey("run", STEPS, SEED), "validation", tasks=4)
    judging = learner.evaluation(request, learner.initial(SEED))
    while scheduler._outstanding and time.monotonic() < deadline:
        scheduler.run(judging)
    settle(actors, 3)
    assert len(before - set(actors.workers())) == 1


# ---- groups


def test_learners_come_first_and_environments_compute_on_the_cpu(apart):
    actors, _ = apart
    settle(actors, 3)
    assert [about["role"] for about in actors.workers().values()] == ["learner", "environment", "environment"]
    assert {about["device"] for about in actors.workers().values()} == {"cpu"}
    assert "environment" not in next(iter(actors.workers().values()))["fingerprint"], "where both compute alike"


def test_environments_alone_are_refused(cluster, folder):
    with pytest.raises(ConfigError, match="workers: there is no learner"):
        executor(pulls.learner(folder, role="environment"), ENVIRONMENTS)


OTHER = {"id": "other", "device": "GPU of yore", "threads": 2}


def test_the_fingerprint_names_the_environments_where_they_compute_otherwise(apart, monkeypatch):
    actors, _ = apart
    settle(actors, 3)
    monkeypatch.setitem(actors._numerics.expected, "environment", OTHER)
    learner, *environments = actors.workers().values()
    assert learner["fingerprint"]["environment"] == OTHER
    assert all("environment" not in about["fingerprint"] for about in environments)


def test_roles_may_compute_differently_but_each_as_the_run_began(apart):
    actors, learner = apart
    settle(actors, 3)
    mine = next(iter(actors.workers().values()))["fingerprint"]
    groups = (WorkerGroup(gpus=0), replace(ENVIRONMENTS, min=1, max=1))
    with pytest.raises(
        WorkerError, match=r"environment-. on .* has other numerics than this run's environments .*'threads': \(2, 1\)"
    ):
        executor(learner, *groups, expected={**mine, "environment": OTHER})
    with pytest.raises(
        WorkerError, match="trials were rolled out on 'GPU of yore', .* continue with environment workers"
    ):
        executor(learner, WorkerGroup(gpus=0), expected={**mine, "environment": OTHER})
    assert expected_by_role(mine, groups, True) == {"learner": mine, "environment": mine}, "learners rolled out before"
