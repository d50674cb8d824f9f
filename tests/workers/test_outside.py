"""Remote workers over a real endpoint on loopback: the same bits with and without them, even when they misbehave."""

from __future__ import annotations

import json
import os
import signal
import threading
import time

import grpc
import pytest
import tiny
import tls
import torch
import yaml
from outsiders import HERE, OUTSIDE, Hand, document, experiment, hands, listening, train, wait_for
from ports import free_port

from metadist.config.document import override
from metadist.core.computation import Evaluate, FisherProduct, Gradient, Rollout, Surrogate, ValueGradient
from metadist.core.errors import ConfigError, WorkerError
from metadist.core.round import Shard
from metadist.experiment import remote
from metadist.rpc.endpoint import connect
from metadist.workers.joint import JointExecutor
from metadist.workers.local import LocalExecutor
from metadist.workers.remote import client, work_pb2_grpc
from metadist.workers.remote import work_pb2 as pb
from metadist.workers.remote.codec import Arriving, GarbledError, chunks, facts, shard_message, shard_of
from metadist.workers.remote.executor import RemoteExecutor
from metadist.workers.remote.messages import Computed, Failure
from metadist.workers.remote.runner import Runner

pytestmark = pytest.mark.lane("services")

ENVIRONMENTS = {**OUTSIDE, "role": "environment"}


@pytest.fixture(scope="module")
def expected():
    return {trials: train(experiment(document(HERE, trials=trials)))[0] for trials in (False, True)}


@pytest.mark.parametrize(
    ("trials", "groups", "roles"),
    [
        (False, (HERE, OUTSIDE), ("learner", "learner")),
        (False, (OUTSIDE,), ("learner",)),
        (True, (HERE, OUTSIDE), ("learner", "learner")),
        (True, (HERE, ENVIRONMENTS), ("environment", "environment")),
        (True, (OUTSIDE, ENVIRONMENTS), ("learner", "environment")),
    ],
)
def test_the_bits_of_this_process(expected, trials, groups, roles):
    groups = [{**g, "min": roles.count(g.get("role", "learner"))} if g is not HERE else g for g in groups]
    run = experiment(document(*groups, trials=trials))
    with hands(run, *roles) as working:
        sha256, scheduler = train(run)
        for hand in working:
            hand.join()
    assert sha256 == expected[trials]
    assert [hand.ended for hand in working] == ["the run is over"] * len(roles)
    assert sum("computed" in line for hand in working for line in hand.said), "somebody outside computed something"
    assert not scheduler.retried


def test_outputs_pass_through_the_driver_both_ways_and_are_rolled_out_anew_where_lost(expected, monkeypatch):
    """Trials rolled out in this process serve gradients outside, and the other way round; some are lost in between."""
    adopted = {LocalExecutor: 0, RemoteExecutor: 0}
    for kind in adopted:

        def adopt(self, shard, content, kind=kind, original=kind.adopt):
            adopted[kind] += 1
            original(self, shard, content)

        monkeypatch.setattr(kind, "adopt", adopt)
    run, lost = experiment(document(HERE, OUTSIDE, trials=True)), []

    def lose(executor, shard):
        if shard.needs and shard.round > 1 and len(lost) < 3:
            lost.append(shard.needs[0])
            for side in (executor._own, executor._remote):
                side._kept.outputs.pop(shard.needs[0], None)

    with hands(run, "learner"):
        sha256, scheduler = train(run, fault=lose)
    assert sha256 == expected[True]
    assert all(adopted.values()), adopted
    assert isinstance(scheduler.executor.inner, JointExecutor)
    assert scheduler.retried["missing"] >= 1


# What misbehaves ------------------------------------------------------------------------------------------------------


class Rogue(Runner):
    """Does ``deed`` to its third answer."""

    deed = ""
    asked = 0
    over = threading.Event()

    def compute(self, lease):
        type(self).asked += 1
        answer = super().compute(lease)
        if type(self).asked != 3:
            return answer
        frame = bytearray(b"".join(memoryview(p).tobytes() for p in answer.result))
        if self.deed == "flip":
            frame[len(frame) // 2] ^= 4
        if self.deed == "garbage":
            frame = bytearray(b"\x00\xff" * 500)
        if self.deed == "cut":
            return Computed([bytes(frame), _Breaks()])
        if self.deed == "oversized":
            return Computed([bytes(frame)] + [bytes(1 << 20)] * 80)
        if self.deed == "nan":
            from metadist.wire.codec import ResultHeader, decode_result, result_parts

            slots = self._built[1].slots
            result, _ = decode_result(bytes(frame), lease.call.shard, slots)
            for vector in result.slots.values():
                vector[0] = float("nan")
            return Computed(result_parts(result, slots, ResultHeader(lease.call.shard, lease.call.attempt, "rogue")))
        if self.deed == "hang":
            self.over.wait(120)
        if self.deed == "unable":
            return Failure("unable", "the simulator is not installed here")
        if self.deed == "error":
            return Failure("error", "ValueError: this box is broken", detail="Traceback …")
        return Computed([bytes(frame)])


class _Breaks:
    """A buffer that can't be read to its end: the connection breaks in mid-stream."""

    def __buffer__(self, flags):
        raise MemoryError


@pytest.mark.parametrize(
    ("deed", "said"),
    [
        ("flip", "hash mismatch"),
        ("garbage", "damaged frame"),
        ("oversized", "RESOURCE_EXHAUSTED"),
        ("nan", "NaN or Inf"),
        ("hang", None),
        ("unable", "the simulator is not installed here"),
        ("error", None),
    ],
)
def test_what_misbehaves_changes_nothing(expected, deed, said, monkeypatch):
    class Mine(Rogue):
        pass

    Mine.deed, Mine.asked, Mine.over = deed, 0, threading.Event()
    monkeypatch.setattr("metadist.workers.remote.runner.Runner", Mine)
    run = experiment(document(HERE, OUTSIDE), f"engine.shard_timeout={4.0 if deed == 'hang' else 60.0}")
    with hands(run, "learner") as [hand]:
        sha256, scheduler = train(run)
        Mine.over.set()
        assert sha256 == expected[False]
        assert Mine.asked >= 3
        if deed == "hang":
            assert scheduler.retried["lost"] or scheduler.measured.counts["backups"]
        else:
            assert sum(scheduler.retried.values()) in (1, 2), "and what waited behind it"
            assert scheduler.retried["rejected"] == (deed in ("flip", "garbage", "nan"))
        if said and said != "RESOURCE_EXHAUSTED":
            hand.join()
            assert said in str(hand.error), hand.said
            assert "refused this worker" in str(hand.error)
        elif said:
            hand.join()
            assert "a limit is exceeded: a frame of" in str(hand.error)


class Raw:
    """A worker's call by hand, message by message."""

    def __init__(self, run, token_file=None, **hello):
        self._messages, self._more = [], threading.Condition()
        self.channel = connect(run.outside.listen, token_file)
        self.send(
            pb.FromWorker(hello=pb.Hello(**{"name": "raw", "role": "learner", "versions": remote.versions(), **hello}))
        )
        self.answers = work_pb2_grpc.WorkStub(self.channel).Join(self._stream(), wait_for_ready=True)

    def send(self, message):
        with self._more:
            self._messages.append(message)
            self._more.notify()

    def _stream(self):
        while True:
            with self._more:
                self._more.wait_for(lambda: self._messages)
                message = self._messages.pop(0)
            if message is None:
                return
            yield message

    def become_ready(self, run):
        """Until the first lease."""
        from metadist.workers.remote.codec import engine_of, terms_of

        runner = Runner(remote.build)
        device, about = runner.start(terms_of(next(self.answers).terms))
        self.send(pb.FromWorker(described=pb.Described(device=json.dumps(device), about=json.dumps(about))))
        about = runner.configure(engine_of(next(self.answers).engine))
        self.send(pb.FromWorker(configured=pb.Configured(about=json.dumps(about))))
        return next(self.answers).lease

    def close(self):
        self.answers.cancel()
        self.channel.close()


def behind(run, deed):
    """``deed(raw, run)`` in a thread while the run trains: the run's hash, its scheduler and what the deed gave."""
    given = []

    def act():
        listening(run.outside.listen)
        raw = Raw(run)
        try:
            given.append(deed(raw, run))
        except (Exception, pytest.fail.Exception) as error:
            given.append(error)
        raw.close()

    thread = threading.Thread(target=act, daemon=True)
    thread.start()
    sha256, scheduler = train(
        run, each=lambda step, scheduler: wait_for(lambda: given, scheduler) if step == 3 else None
    )
    thread.join(60)
    return sha256, scheduler, given[0]


def vanish(raw, run):
    raw.become_ready(run)
    raw.close()


def cut_in_mid_stream(raw, run):
    lease = raw.become_ready(run)
    raw.send(pb.FromWorker(result=pb.Result(token=lease.token, result_bytes=5000)))
    raw.send(pb.FromWorker(chunk=pb.Chunk(data=bytes(1000))))
    time.sleep(0.2)
    raw.close()


def fall_silent(raw, run):
    raw.become_ready(run)
    return next(m.dismissed for m in raw.answers if m.WhichOneof("message") == "dismissed")


def out_of_place(raw, run):
    lease = raw.become_ready(run)
    raw.send(pb.FromWorker(result=pb.Result(token=lease.token, result_bytes=5000)))
    raw.send(pb.FromWorker(beat=pb.Beat()))
    with pytest.raises(grpc.RpcError) as caught:
        list(raw.answers)
    return caught.value.code()


def too_much(raw, run):
    lease = raw.become_ready(run)
    raw.send(pb.FromWorker(result=pb.Result(token=lease.token, result_bytes=1 << 40)))
    with pytest.raises(grpc.RpcError) as caught:
        list(raw.answers)
    return caught.value.code()


def nonsense_about_itself(raw, run):
    next(raw.answers)
    raw.send(pb.FromWorker(described=pb.Described(device="[" * 9000, about="{}")))
    with pytest.raises(grpc.RpcError) as caught:
        list(raw.answers)
    return caught.value.code()


@pytest.mark.parametrize(
    "deed", [vanish, cut_in_mid_stream, fall_silent, out_of_place, too_much, nonsense_about_itself]
)
def test_a_client_that_breaks_the_conversation(expected, deed):
    # Long enough for one that is well to be heard of on a busy machine.
    lease = {"lease": 4.0} if deed is fall_silent else {}
    run = experiment(document(HERE, {**OUTSIDE, "min": 0 if deed is nonsense_about_itself else 1}, **lease))
    sha256, scheduler, given = behind(run, deed)
    assert sha256 == expected[False]
    if deed is fall_silent:
        assert given.then == "again"
        assert "nothing was heard of it for 4 s" in given.reason
    elif deed is too_much:
        assert given == grpc.StatusCode.RESOURCE_EXHAUSTED
    elif deed in (out_of_place, nonsense_about_itself):
        assert given == grpc.StatusCode.INVALID_ARGUMENT
    else:
        assert given is None, given
    if deed is not nonsense_about_itself:
        # Who else was idle may have had it as well before that one was given up.
        assert scheduler.retried["lost"] or scheduler.measured.counts["backups"]


def test_results_of_expired_leases_are_ignored(expected):
    """Nor does it matter what is in them."""

    def late(raw, run):
        lease = raw.become_ready(run)
        for _ in range(200):  # its own leases end one by one as the run goes on; here they never existed
            raw.send(pb.FromWorker(result=pb.Result(token=10_000 + lease.token, result_bytes=3)))
            raw.send(pb.FromWorker(chunk=pb.Chunk(data=b"???")))
        raw.send(pb.FromWorker(goodbye=pb.Goodbye(reason="enough")))

    sha256, scheduler, _ = behind(experiment(document(HERE, OUTSIDE)), late)
    assert sha256 == expected[False]
    assert scheduler.retried["rejected"] == 0


# Who may join ---------------------------------------------------------------------------------------------------------


@pytest.fixture
def patient(monkeypatch):
    """A driver's patience begins when it has refused somebody, however long that one took to come."""
    original = RemoteExecutor.await_minimum

    def await_minimum(self, patience, minimum):
        wait_for(lambda: self._poll(0.05) or self.server.last_refusal)
        original(self, patience, minimum)

    monkeypatch.setattr(RemoteExecutor, "await_minimum", await_minimum)


def refused(run, hand, match):
    """The hand is refused while the run waits for it."""
    with pytest.raises(WorkerError, match=match):
        train(run)
    hand.join()
    assert "refused this worker" in str(hand.error)
    return str(hand.error)


def test_another_version_is_refused(monkeypatch, patient):
    run = experiment(document(OUTSIDE), "engine.worker_patience=1")
    real = remote.versions()
    monkeypatch.setattr(
        remote,
        "versions",
        lambda: {**real, "metadist": "0.0.1" if threading.current_thread().daemon else real["metadist"]},
    )
    hand = Hand(run)
    assert "install the same version" in refused(
        run, hand, r"0 of 1 learners from outside had joined after 1 s.*this worker has 0.0.1"
    )


def test_other_data_are_refused(monkeypatch, patient):
    class Elsewhere(Runner):
        def start(self, terms):
            device, about = super().start(terms)
            return device, {**about, "data_sha256": "f" * 64}

    monkeypatch.setattr("metadist.workers.remote.runner.Runner", Elsewhere)
    run = experiment(document(OUTSIDE), "engine.worker_patience=1")
    assert "set METADIST_DATA to the same data" in refused(run, Hand(run), "it has other data")


def test_an_older_copy_of_the_users_module_is_refused(tmp_path, monkeypatch, patient):
    """A worker in a process and folder of its own, with a copy of the module whose sines are another."""
    (tmp_path / "driver").mkdir()
    (tmp_path / "node").mkdir()
    (tmp_path / "driver/copied_sines.py").write_text(COPIED)
    (tmp_path / "node/copied_sines.py").write_text(COPIED.replace("3.0", "2.0"))
    monkeypatch.syspath_prepend(str(tmp_path / "driver"))
    made = document(OUTSIDE)
    made["tasks"]["name"] = "copied_sines:Copied"
    run = experiment(made, "engine.worker_patience=1")
    command = ("worker", "--connect", run.outside.listen, "--trust", "copied_sines")
    process = tiny.start(*command, folder=tmp_path / "node", OMP_NUM_THREADS="1")
    with pytest.raises(WorkerError, match="another copy of module 'copied_sines' on .* than the driver on "):
        train(run)
    out, err = process.communicate(timeout=150)
    assert process.returncode == 2 and "Traceback" not in err
    assert "copy the driver's file there" in " ".join(err.split())


COPIED = """
from dataclasses import dataclass
from metadist import Sinusoid

@dataclass(frozen=True, kw_only=True)
class Copied(Sinusoid):
    phase: tuple[float, float] = (0.0, 3.0)
"""


def test_an_older_copy_of_metadist_is_refused(monkeypatch, patient):
    """The version is the same, and the code is not."""

    class Older(Runner):
        def start(self, terms):
            device, about = super().start(terms)
            return device, {**about, "modules": {**about["modules"], "metadist": "0" * 64}}

    monkeypatch.setattr("metadist.workers.remote.runner.Runner", Older)
    run = experiment(document(OUTSIDE), "engine.worker_patience=1")
    message = refused(run, Hand(run), "another copy of module 'metadist'")
    assert "install the driver's version on every machine" in message


def test_a_role_that_is_not_wanted_and_one_that_does_not_exist(patient):
    run = experiment(document(OUTSIDE), "engine.worker_patience=1")
    assert "it takes --role learner" in refused(run, Hand(run, role="environment"), "takes no environment")
    with pytest.raises(
        ConfigError, match="--role: 'learners' is not one of learner, environment; did you mean 'learner'"
    ):
        options = remote.WorkerOptions(role="learners", patience=0)
        remote.work("127.0.0.1:1", options, client.Shell(print, lambda: False))


class Other(Runner):
    """Computes what is right, and calls itself another processor."""

    def configure(self, order):
        from metadist.workers.fingerprint import fingerprint_id

        about = super().configure(order)
        facts = {**about["fingerprint"], "device": "a processor of yore"}
        return {**about, "fingerprint": {**facts, "id": fingerprint_id(facts)}}


def test_other_numerics_are_refused(expected, monkeypatch):
    monkeypatch.setattr("metadist.workers.remote.runner.Runner", Other)
    run = experiment(document(HERE, {**OUTSIDE, "min": 0}))
    hand = Hand(run)
    assert (
        train(run, each=lambda step, scheduler: wait_for(lambda: hand.error, scheduler) if step == 2 else None)[0]
        == expected[False]
    )
    assert "a processor of yore" in str(hand.error)
    assert "has other numerics than this run's learners" in str(hand.error)


def test_other_numerics_mark_a_run_that_may_be_inexact(tmp_path, monkeypatch):
    from metadist.storage.checkpoints import Checkpoints

    monkeypatch.setattr("metadist.workers.remote.runner.Runner", Other)
    run = experiment(document(HERE, OUTSIDE), "engine.exact=false")
    with hands(run, "learner"):
        result = tiny.train(run, run_dir=str(tmp_path / "run"), test=False, plots=False)
    [mark] = result.inexact
    assert "device a processor of yore, not" in mark
    assert result.as_dict()["inexact"] == [mark]
    assert Checkpoints(str(tmp_path / "run")).latest(run.learner.slots).manifest["inexact"] == [mark]


SLOW = """
import os, time
from dataclasses import dataclass
from metadist.tasks.sinusoid import Sinusoid

@dataclass(frozen=True)
class Slow(Sinusoid):
    def sample(self, keys, split):
        time.sleep(float(os.environ.get("SLOW", "0")))
        return super().sample(keys, split)
"""


# Coming, going and coming back ----------------------------------------------------------------------------------------


@pytest.mark.long
def test_an_inexact_run_is_tagged_in_mlflow(tmp_path, monkeypatch):
    from mlflow import MlflowClient

    monkeypatch.setattr("metadist.workers.remote.runner.Runner", Other)
    uri = f"sqlite:///{tmp_path}/mlflow.db"
    run = experiment(document(HERE, OUTSIDE), "engine.exact=false", f"tracking.uri={uri}")
    with hands(run, "learner"):
        result = tiny.train(run, run_dir=str(tmp_path / "run"), test=False, plots=False)
    assert result.undelivered == 0
    client = MlflowClient(uri)
    [found] = client.search_runs([client.get_experiment_by_name("metadist").experiment_id])
    assert found.data.tags["metadist.inexact"] == result.inexact[0]


@pytest.mark.long
@pytest.mark.parametrize("twice", [False, True])
def test_ctrl_c_finishes_the_shard_or_gives_it_back(tmp_path, expected, monkeypatch, twice):
    """The command in a process of its own, interrupted in a shard that takes seconds; the run continues without it."""
    (tmp_path / "slow_sines.py").write_text(SLOW)
    monkeypatch.syspath_prepend(tmp_path)
    made = document(HERE, OUTSIDE)
    made["tasks"]["name"] = "slow_sines:Slow"
    run, sent = experiment(made), []
    process = tiny.start(
        "worker",
        "--connect",
        run.outside.listen,
        "--trust",
        "slow_sines",
        folder=tmp_path,
        OMP_NUM_THREADS="1",
        SLOW="2",
    )

    def interrupt():
        process.send_signal(signal.SIGINT)
        if twice:
            time.sleep(0.5)
            process.send_signal(signal.SIGINT)

    def interrupt_once(executor, shard):
        if shard.meta_step == 2 and not sent and executor._remote.busy:
            sent.append(threading.Timer(0.5, interrupt))
            sent[0].start()

    sha256, scheduler = train(
        run,
        fault=interrupt_once,
        each=lambda step, scheduler: step < 3 or wait_for(lambda: len(scheduler.executor.workers()) == 1, scheduler),
    )
    out, err = process.communicate(timeout=150)
    assert sha256 == expected[False]
    assert process.returncode == 130
    assert "Traceback" not in err
    assert out == ""
    assert ("interrupted" if twice else "done: stopped by its user") in err
    assert not scheduler.retried["error"] and not scheduler.retried["rejected"]


def test_the_command_tells_a_mistake_in_one_line(tmp_path):
    done = tiny.run("worker", "--connect", f"127.0.0.1:{free_port()}", "--patience", 0, folder=tmp_path)
    assert done.returncode == 2
    assert done.stdout == ""
    assert "Traceback" not in done.stderr
    assert "error: 127.0.0.1" in done.stderr.splitlines()[-1]
    assert "gave up after 0 s (--patience)" in done.stderr.splitlines()[-1]


def test_workers_join_and_leave_in_the_middle(expected):
    run = experiment(document(HERE, {**OUTSIDE, "min": 0}))
    working = []

    def each(step, scheduler):
        if step == 1:
            working.append(Hand(run, name="early"))
            wait_for(lambda: "outside-early" in scheduler.executor.workers(), scheduler)
        if step == 2:
            working.append(Hand(run, name="late"))
            wait_for(lambda: "outside-late" in scheduler.executor.workers(), scheduler)
            working[0].stop()

    sha256, scheduler = train(run, each=each)
    for hand in working:
        hand.join()
    assert sha256 == expected[False]
    assert working[0].ended == "stopped by its user"
    assert scheduler.retried["error"] == scheduler.retried["rejected"] == 0


def test_a_worker_waits_for_a_driver_that_goes_on(tmp_path, expected):
    run = experiment(document(HERE, OUTSIDE))
    plain = tiny.train(experiment(document(HERE)), run_dir=str(tmp_path / "plain"), test=False, plots=False)
    steps = iter(range(3))
    with hands(run, "learner") as [hand]:
        first = tiny.train(run, run_dir=str(tmp_path / "run"), stop=lambda: next(steps) == 2, test=False, plots=False)
        assert first.outcome.stopped == "interrupted"
        wait_for(lambda: any("can be resumed; waiting up to 60 s" in line for line in hand.said))
        again = experiment(document(HERE, OUTSIDE, port=run.outside.port))
        second = tiny.train(again, run_dir=str(tmp_path / "run"), resume=True, test=False, plots=False)
        hand.join()
    assert second.params_sha256 == plain.params_sha256 == expected[False]
    assert hand.ended == "the run is over"
    assert sum("ready" in line for line in hand.said) == 2


@pytest.mark.long
def test_a_worker_outlives_a_driver_that_was_killed(tmp_path):
    """SIGKILL: the driver sends no dismissal. The worker joins the driver that resumes the run, with the same bits."""
    steps = (
        "outer.meta_steps=120",
        "checkpoint.every=2",
        "engine.compile=never",
    )  # or the first may have ended before it is killed
    plain = tiny.train(experiment(document(HERE), *steps), run_dir=str(tmp_path / "plain"), test=False, plots=False)
    made = override(document(HERE, OUTSIDE), steps)
    (tmp_path / "outside.yaml").write_text(yaml.safe_dump(made))
    command = ("train", "outside.yaml", "--run-dir", "run", "--json")
    first = tiny.start(*command, folder=tmp_path, OMP_NUM_THREADS="1")
    with hands(experiment(made), "learner") as [hand]:
        wait_for(lambda: list((tmp_path / "run" / "checkpoints").glob("*/manifest.json")))
        os.killpg(first.pid, signal.SIGKILL)
        first.communicate()
        second = tiny.run(*command, "--resume", folder=tmp_path, OMP_NUM_THREADS="1")
        hand.join()
    assert second.returncode == 0, second.stderr
    assert "resumed at meta-step" in second.stderr
    assert tiny.last_json(second.stdout)["params_sha256"] == plain.params_sha256
    assert sum("ready" in line for line in hand.said) == 2


def test_a_token_and_tls_are_asked_for_where_they_are_set(tmp_path, expected):
    own = tls.make(tmp_path)
    run = experiment(document(HERE, OUTSIDE, token_file=own.token, tls_cert=own.certificate, tls_key=own.key))
    (tmp_path / "wrong").write_text("x" * 32)
    (tmp_path / "wrong").chmod(0o600)
    working = {
        "right": Hand(run, token_file=own.token, tls_ca=own.authority),
        "wrong token": Hand(run, token_file=str(tmp_path / "wrong"), tls_ca=own.authority),
        "no token": Hand(run, tls_ca=own.authority),
        "another authority": Hand(run, token_file=own.token, tls_ca=tls.make(tmp_path / "other").authority),
    }
    wrong = [hand for name, hand in working.items() if name != "right"]
    sha256, _ = train(run, each=lambda step, scheduler: wait_for(lambda: all(hand.error for hand in wrong), scheduler))
    assert sha256 == expected[False]
    working["right"].join()
    assert working["right"].ended == "the run is over"
    for name in ("wrong token", "no token"):
        assert "the server refused the token" in str(working[name].error)
    assert "TLS handshake failed" in str(working["another authority"].error)


def test_a_driver_that_nobody_can_reach_is_not_waited_for_longer_than_asked():
    hand = Hand(experiment(document(OUTSIDE)), patience=1.0)
    hand.join()
    assert "no server answers there" in str(hand.error)
    assert "gave up after 1 s (--patience)" in str(hand.error)


# Configuration and messages -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("change", "match"),
    [
        ({"outside": {}}, r"workers.0.outside: true, but there is no address to connect to"),
        ({"outside": {"listen": "here"}}, r"outside.listen: 'here'; expected HOST:PORT"),
        ({"outside": {"listen": "127.0.0.1:0", "lease": 0.1}}, "outside.lease: 0.1; expected 1 to 3600 seconds"),
        ({"workers": [ENVIRONMENTS]}, "supervised tasks have no environments"),
        ({"workers": [OUTSIDE, OUTSIDE]}, "two groups of learners from outside"),
        ({"engine": {"exact": False, "wire": "bfloat16"}}, "engine.wire: bfloat16 is for workers of the Ray cluster"),
    ],
)
def test_impossible_configurations(change, match):
    with pytest.raises(ConfigError, match=match):
        experiment({**document(OUTSIDE), **change})


def test_another_address_than_loopback_needs_tls_and_a_token():
    with pytest.raises(ConfigError, match="could connect without TLS and a token"):
        train(experiment({**document(OUTSIDE), "outside": {"listen": "0.0.0.0:0"}}))


@pytest.mark.parametrize(
    "computation",
    [
        Gradient(),
        Gradient((("clip", 0.1), ("mean", -1.2345678901234567e-300))),
        Evaluate(),
        Evaluate(3),
        Rollout(),
        ValueGradient((("mean", 0.1),)),
        FisherProduct(),
        Surrogate(0.8, (("deviation", 0.1), ("mean", -0.0))),
    ],
    ids=lambda computation: computation.name,
)
def test_shards_are_the_same_after_the_way(computation):
    shard = Shard(
        "run",
        3,
        2,
        7,
        computation,
        14,
        2,
        11,
        "train",
        3,
        "environment",
        ((3, 0, 7), (3, 0, 8)),
        keeps=True,
        leaf=1,
    )
    assert shard_of(pb.Shard.FromString(shard_message(shard).SerializeToString())) == shard


@pytest.mark.parametrize(
    ("function", "arguments", "says"),
    [
        ("halt", "[]", "computation 'halt'; expected one of advance, evaluate"),
        ("fisher", '[["mean", 0.1]]', "computation 'fisher' has no argument mean"),
        ("surrogate", '[["mean", 0.1]]', "computation 'surrogate': .*fraction"),
        ("gradient", "[[", "shard 0: "),
        ("gradient", "[1]", "shard 0: "),
    ],
)
def test_a_shard_of_another_version_is_refused_by_name(function, arguments, says):
    with pytest.raises(GarbledError, match=says):
        shard_of(pb.Shard(function=function, settings=arguments))


def test_frames_arrive_in_chunks_of_a_megabyte():
    frames = [[b"a" * 10, torch.arange(300_000).numpy()], [], [b"c"]]
    pieces = list(chunks(frames))
    assert max(len(p.data) for p in pieces) == 1 << 20
    arriving = Arriving([sum(memoryview(p).nbytes for p in f) for f in frames])
    for piece in pieces:
        assert not arriving.complete
        arriving.take(piece.data)
    assert [b"".join(f) for f in arriving.frames] == [b"".join(memoryview(p).tobytes() for p in f) for f in frames]
    with pytest.raises(GarbledError, match="1 bytes; expected 0 at most"):
        arriving.take(b"x")
    with pytest.raises(GarbledError, match="4 bytes; expected 3 at most"):
        Arriving([3]).take(b"four")


@pytest.mark.parametrize("text", ["", "[]", "[" * 100_000, '{"a": [1]}', '{"a": {"b": {}}}', "{" + "1" * 20_000])
def test_facts_are_plain(text):
    with pytest.raises(GarbledError):
        facts(text)


def test_a_passing_fault_is_one_of_the_connection():
    error = client.ServiceError
    assert client.passing(error("gone", grpc.StatusCode.UNAVAILABLE))
    assert not client.passing(error("the TLS handshake failed", grpc.StatusCode.UNAVAILABLE))
    assert not client.passing(error("no", grpc.StatusCode.UNAUTHENTICATED))
