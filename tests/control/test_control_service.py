"""The control service of a real run: a client steers it over loopback, and no client delays training."""

from __future__ import annotations

import stat
import threading
import time
from pathlib import Path

import grpc
import pytest
import tiny
import tls
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection_pb2, reflection_pb2_grpc
from outsiders import wait_for
from steerable import Live

from metadist.control import control_pb2 as pb
from metadist.control import control_pb2_grpc as rpc
from metadist.control.client import RemoteRun
from metadist.control.command_log import CommandLog
from metadist.control.commands import Command
from metadist.control.feed import QUEUE_LENGTH, Feed
from metadist.control.service import MAX_WATCHERS, services
from metadist.control.steering import RunControl, RunInfo
from metadist.rpc.endpoint import Endpoint, ServiceError, connect, serve
from metadist.training.observers import Observer

pytestmark = pytest.mark.lane("services")


@pytest.fixture(scope="module")
def live(tmp_path_factory):
    with Live(tmp_path_factory.mktemp("live") / "run") as run:
        yield run


@pytest.fixture
def remote(live):
    with RemoteRun(live.record["address"], live.record["token_file"]) as run:
        yield run


def obey(remote, name, value=None, **more):
    return remote.obey(Command(name, value, **more), 30.0)


def refused(remote, name, value=None, **more):
    with pytest.raises(ServiceError) as caught:
        obey(remote, name, value, **more)
    assert len(str(caught.value).splitlines()) == 1
    return caught.value


def test_status_and_every_command(live, remote):
    first = remote.status()
    assert (first.phase, first.meta_steps, first.meta_batch_size, first.run_dir) == (
        "training",
        1000000,
        8,
        str(live.folder),
    )
    assert first.values["loss"] > 0
    assert first.pid == live.record["pid"]
    paused = obey(remote, "pause")
    assert remote.status().phase == "paused"
    time.sleep(0.3)
    assert remote.status().meta_step == paused.meta_step, "a paused run does not train"
    assert any(f"metadist control {live.folder} resume" in note for note in live.notes), (
        "the driver's display shows how to resume"
    )
    assert obey(remote, "pause").message == "paused already"
    assert obey(remote, "checkpoint").meta_step == paused.meta_step
    assert (live.folder / "checkpoints" / f"step-{paused.meta_step:08d}" / "manifest.json").exists()
    assert remote.status().checkpoint == paused.meta_step
    obey(remote, "resume")
    changed = obey(remote, "set_meta_batch_size", 4)
    after = remote.status()
    assert (after.phase, after.meta_batch_size) == ("training", 4)
    assert [c["command"] for c in after.commands] == ["pause", "checkpoint", "resume", "set_meta_batch_size"]
    assert after.commands[-1]["meta_step"] == changed.meta_step > paused.meta_step


def test_refusals_have_the_reason_and_training_continues(live, remote):
    assert refused(remote, "set_workers", 3).code == grpc.StatusCode.FAILED_PRECONDITION
    assert "--resume --workers N" in str(refused(remote, "set_workers", 3))
    stub = rpc.ControlPlaneStub(connect(live.record["address"], live.record["token_file"]))
    for size in (0, -1, 1 << 60):
        with pytest.raises(grpc.RpcError, match="is not between 1 and") as caught:
            stub.SetMetaBatchSize(pb.SetMetaBatchSizeRequest(meta_batch_size=size))
        assert caught.value.code() == grpc.StatusCode.INVALID_ARGUMENT
    with pytest.raises(grpc.RpcError, match="1 to 64 printable"):
        stub.Pause(pb.CommandRequest(order=pb.Order(id="x" * 65)))
    before = remote.status().meta_step
    wait_for(lambda: remote.status().meta_step > before)


def test_a_command_waits_for_its_meta_step_and_is_obeyed_once(tmp_path):
    """While a run is starting, a call ends but its command waits; the same command sent again is not a second one."""
    info = RunInfo("r", "d", {"learner": 0})
    steering = RunControl(CommandLog(str(tmp_path)), Feed(Observer()), tiny.learner(), None, info)
    with serve(Endpoint(), services(steering)) as served, RemoteRun(served.address) as remote:
        command = Command("set_meta_batch_size", 4)
        for _ in range(2):
            answer = remote.obey(command, 0.2)
            assert (answer.meta_step, answer.message) == (None, "meta_batch_size = 4 waits for the next meta-step")
        assert remote.status().waiting == ["meta_batch_size = 4"]
        assert remote.status().phase == "starting"
        steering.over()
        assert "training is over" in str(refused(remote, "pause"))


def test_watching(live, remote):
    snapshots = []
    for snapshot in remote.watch():
        snapshots.append(snapshot)
        if len(snapshots) == 20:
            break
    steps = [s.meta_step for s in snapshots if s.kind == "step"]
    assert steps == sorted(set(steps))
    assert all(s.values["loss"] > 0 and s.values["tasks_per_second"] > 0 for s in snapshots if s.kind == "step")
    began = time.monotonic()
    list(remote.watch(0.5))
    assert 0.5 <= time.monotonic() - began < 60, "watching ends after the given time"


def test_watchers_that_do_not_read_delay_nobody(live, remote):
    """The maximum of watchers, and none reads: training continues, and lost updates are counted."""
    channel = connect(live.record["address"], live.record["token_file"])
    stub = rpc.ControlPlaneStub(channel)
    watches, first = zip(*[watch_when_free(stub) for _ in range(MAX_WATCHERS)])
    assert all(update.dropped == 0 for update in first)
    with pytest.raises(grpc.RpcError) as caught:
        next(stub.Watch(pb.WatchRequest()))
    assert caught.value.code() == grpc.StatusCode.RESOURCE_EXHAUSTED
    before = live.meta_step
    wait_for(lambda: live.meta_step > before + 20)
    assert remote.status().phase == "training", "other calls are answered meanwhile"
    for watch in watches:
        watch.cancel()
    watch_when_free(stub)[0].cancel()  # the other watchers have left
    channel.close()


def watch_when_free(stub):
    """Return a watch and its first update. The server notices the end of another watch up to half a second late."""
    deadline = time.monotonic() + 60
    while True:
        watch = stub.Watch(pb.WatchRequest())
        try:
            return watch, next(watch)
        except grpc.RpcError as error:
            if error.code() != grpc.StatusCode.RESOURCE_EXHAUSTED or time.monotonic() > deadline:
                raise
            time.sleep(0.1)


def test_a_slow_reader_loses_the_oldest_updates():
    """End to end, with more updates than gRPC's own buffers hold."""
    feed = Feed(Observer())

    class Watched:
        watch = staticmethod(feed.watch)

    padding = {f"metric_{i}": 1.0 for i in range(500)}
    with serve(Endpoint(), services(Watched())) as served:
        channel = connect(served.address)
        watch = rpc.ControlPlaneStub(channel).Watch(pb.WatchRequest())
        while not feed._queues:
            time.sleep(0.01)
        began = time.monotonic()
        for step in range(1, 20 * QUEUE_LENGTH):
            feed.step(step, padding, 1.0)
        assert time.monotonic() - began < 60
        feed.close()
        seen = [(update.meta_step, update.dropped) for update in watch]
        channel.close()
    assert seen[-1][0] == 20 * QUEUE_LENGTH - 1, "the newest update arrives"
    assert seen[-1][1] > 0, "lost updates are counted"
    assert len(seen) + seen[-1][1] == 20 * QUEUE_LENGTH - 1


def test_access(live, tmp_path):
    """Only this user can read the token; without it a client learns only that the server is serving."""
    token = Path(live.record["token_file"])
    assert stat.S_IMODE(token.stat().st_mode) == 0o600
    (tmp_path / "wrong").write_text("0" * 64)
    for file in (None, str(tmp_path / "wrong")):
        with RemoteRun(live.record["address"], file) as stranger:
            for call in (stranger.status, lambda: obey(stranger, "stop"), lambda: list(stranger.watch(5.0))):
                with pytest.raises(ServiceError) as caught:
                    call()
                assert caught.value.code == grpc.StatusCode.UNAUTHENTICATED
    with connect(live.record["address"]) as channel:
        assert health_pb2_grpc.HealthStub(channel).Check(health_pb2.HealthCheckRequest()).status == 1
    with connect(live.record["address"], str(token)) as channel:
        stub = reflection_pb2_grpc.ServerReflectionStub(channel)
        [answer] = stub.ServerReflectionInfo(iter([reflection_pb2.ServerReflectionRequest(list_services="")]))
    assert "metadist.control.v1.ControlPlane" in [s.name for s in answer.list_services_response.service]


def test_stop_writes_a_checkpoint_and_the_record(tmp_path):
    with Live(tmp_path / "run") as live:
        with RemoteRun(live.record["address"], live.record["token_file"]) as remote:
            seen, ended = [], threading.Event()

            def watch():
                for snapshot in remote.watch():
                    seen.append(snapshot)
                ended.set()

            watcher = threading.Thread(target=watch)
            watcher.start()
            wait_for(lambda: seen)
            stopped = obey(remote, "stop")
            watcher.join(120)
            assert ended.is_set(), "watchers see the end of the run"
        live.join()
    assert live.result.outcome.stopped == "interrupted"
    assert live.result.outcome.progress.meta_step == stopped.meta_step
    assert (tmp_path / "run/checkpoints" / f"step-{stopped.meta_step:08d}" / "manifest.json").exists()
    assert live.record["ended"]["meta_step"] == stopped.meta_step


def test_with_tls(tmp_path):
    files = tls.make(tmp_path / "tls")
    with (
        Live(
            tmp_path / "run",
            f"control.tls_cert={files.certificate}",
            f"control.tls_key={files.key}",
            f"control.token_file={files.token}",
        ) as live,
        RemoteRun(live.record["address"], files.token, files.authority) as remote,
    ):
        assert remote.status().phase == "training"
        with RemoteRun(live.record["address"], files.token) as plaintext, pytest.raises(ServiceError, match="TLS"):
            plaintext.status()


def test_without_a_port_the_run_trains(live, tmp_path):
    port = live.record["address"].rpartition(":")[2]
    with Live(tmp_path / "run", f"control.port={port}") as other:
        assert other.record["address"] is None
        assert "can't listen on" in other.record["off"]
        assert any("can't be steered while it trains: can't listen on" in note for note in other.notes)
