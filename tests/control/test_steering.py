"""Commands take effect between meta-steps and are recorded first; a resumed run ends with the same bits."""

from __future__ import annotations

import dataclasses
import os
import shutil
import threading
import time

import pytest
import tiny
from commander import Commander, lines, run, size
from faults import everywhere
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tiny import train

from metadist.config.build import build
from metadist.control.commands import Command, CommandRefusedError
from metadist.control.feed import QUEUE_LENGTH, Feed
from metadist.control.steering import resize_meta_batch
from metadist.core.errors import ConfigError, MetadistError
from metadist.storage.store import Store
from metadist.training.observers import Observer

# The same bits --------------------------------------------------------------------------------------------------------


@pytest.mark.lane("numerics")
def test_a_steered_run_resumed_from_any_checkpoint_ends_with_the_same_bits(tmp_path, monkeypatch):
    """Without interruption; stopped before, at and after the command; and with the command log from the start."""
    commander = Commander(monkeypatch, {3: [size(4)]})
    whole = run(tmp_path / "whole")
    assert commander.sizes == [10, 10, 10, 4, 4, 4]
    assert whole.params_sha256 != run(tmp_path / "plain").params_sha256, (
        "the command must change the bits, or the test proves nothing"
    )
    for stop in (2, 3, 5):
        Commander(monkeypatch, {3: [size(4)]}, stop_at=stop)
        assert run(tmp_path / f"run{stop}").outcome.stopped == "interrupted"
        commander = Commander(monkeypatch, {3: [size(4)]} if stop < 3 else {})
        done = run(tmp_path / f"run{stop}", resume=True)
        assert done.params_sha256 == whole.params_sha256, stop
        assert done.evaluations == whole.evaluations
    Commander(monkeypatch)
    (tmp_path / "given").mkdir()
    shutil.copy(tmp_path / "whole/commands.jsonl", tmp_path / "given")
    assert run(tmp_path / "given").params_sha256 == whole.params_sha256


def test_killed_between_checkpoints(tmp_path, monkeypatch):
    """The command is newer than the checkpoint that the run resumes, so the run obeys it again."""

    class Killed(BaseException):
        pass

    def killed(_, shard):
        if shard.meta_step == 5:
            raise Killed

    Commander(monkeypatch, {3: [size(4), size(6)]})
    whole = run(tmp_path / "whole", "checkpoint.every=100", "evaluate.every=100")
    for every, orders in ((2, {3: [size(4), size(6)]}), (100, {3: [size(4), size(6)]})):
        Commander(monkeypatch, orders)
        with pytest.raises(Killed):
            run(tmp_path / f"run{every}", f"checkpoint.every={every}", "evaluate.every=100", wrap=everywhere(killed))
        commander = Commander(monkeypatch)
        done = run(tmp_path / f"run{every}", f"checkpoint.every={every}", "evaluate.every=100", resume=True)
        assert done.params_sha256 == whole.params_sha256
        assert commander.sizes[-1] == 6


@pytest.mark.long
@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    commands=st.lists(st.tuples(st.integers(0, 5), st.sampled_from([2, 3, 4, 7, 12])), max_size=4),
    stops=st.sets(st.integers(1, 5), max_size=3),
)
def test_any_commands_and_any_stops(tmp_path_factory, commands, stops):
    folder = tmp_path_factory.mktemp("steered")
    orders = {}
    for at, value in sorted(commands, key=lambda c: c[0]):
        orders.setdefault(at, []).append(size(value))
    short = ("evaluate.every=100", "evaluate.test_tasks=2", "checkpoint.every=3")
    with pytest.MonkeyPatch.context() as monkeypatch:
        Commander(monkeypatch, orders)
        whole = run(folder / "whole", *short, test=False)
    orders = {at: [size(c.value) for c in given] for at, given in orders.items()}
    for stop in [*sorted(stops), None]:
        with pytest.MonkeyPatch.context() as monkeypatch:
            commander = Commander(monkeypatch, orders, stop_at=stop)
            done = run(folder / "run", *short, resume=True, test=False)
            orders = commander.orders
    assert done.params_sha256 == whole.params_sha256


def test_pause_and_checkpoint_change_no_bits(tmp_path, monkeypatch):
    plain = run(tmp_path / "plain", "checkpoint.every=100", "evaluate.every=100")
    commander = Commander(monkeypatch, {2: [Command("checkpoint")], 3: [Command("pause")]})
    phases = []

    def later():
        while commander.steering is None or commander.steering.status().phase != "paused":
            time.sleep(0.01)
        phases.append(commander.steering.status())
        time.sleep(0.3)
        phases.append(commander.steering.status())
        commander.steering.submit(Command("checkpoint"), 5.0)
        commander.steering.submit(Command("resume"), 5.0)

    thread = threading.Thread(target=later)
    thread.start()
    done = run(tmp_path / "run", "checkpoint.every=100", "evaluate.every=100")
    thread.join()
    assert done.params_sha256 == plain.params_sha256
    assert [p.meta_step for p in phases] == [3, 3], "a paused run does not train"
    assert phases[0].checkpoint == 2
    assert {p.name for p in (tmp_path / "run/checkpoints").iterdir()} >= {"step-00000003", "step-00000006"}
    assert [(line["command"], line["meta_step"]) for line in lines(tmp_path / "run")] == [
        ("checkpoint", 2),
        ("pause", 3),
        ("checkpoint", 3),
        ("resume", 3),
    ]


def test_reinforcement_learning_too(tmp_path, monkeypatch):
    """RL²'s minibatches consist of whole shards: a size that leaves one empty is refused, others are obeyed."""
    document = {
        "name": "rl",
        "environment": {"name": "bandit", "arms": 2, "episodes": 3},
        "model": {"name": "gru", "hidden": 4},
        "algorithm": {"name": "rl2", "minibatches": 2, "epochs": 1},
        "outer": {"meta_batch_size": 8, "shard_size": 2, "meta_steps": 4},
        "evaluate": {"every": 100, "tasks": 4, "test_tasks": 4},
        "workers": [{"min": 0, "max": 0}],
        "tracking": {"uri": "none"},
        "checkpoint": {"every": 3},
        "control": {"enabled": False},
    }

    def go(where, **more):
        return train(build(document), run_dir=str(where), test=False, plots=False, **more)

    commander = Commander(monkeypatch, {1: [size(2), size(12)], 2: [size(4)]})
    whole = go(tmp_path / "whole")
    assert commander.sizes == [8, 12, 4, 4]
    assert len(commander.refusals) == 1
    assert "algorithm.minibatches: 2 of 1 shards" in commander.refusals[0]
    Commander(monkeypatch, {1: [size(12)], 2: [size(4)]}, stop_at=3)
    go(tmp_path / "run")
    Commander(monkeypatch)
    assert go(tmp_path / "run", resume=True).params_sha256 == whole.params_sha256


# Refusals: training continues -----------------------------------------------------------------------------------------


IMPOSSIBLE = {
    "meta_batch_size: 0 is not between 1": lambda: size(0),
    "meta_batch_size: 1099511627776 is not between 1": lambda: size(1 << 40),
    "in its own process; stop it, and continue with --resume --workers N": lambda: Command("set_workers", 2),
    "set_meta_batch_size: a value is missing": lambda: Command("set_meta_batch_size"),
    "pause: the command takes no value, got 3": lambda: Command("pause", 3),
    "'explode' is not one of": lambda: Command("explode"),
}


def test_impossible_commands_are_refused_with_the_reason(tmp_path, monkeypatch):
    plain = run(tmp_path / "plain")
    commander = Commander(monkeypatch)

    class Now(dict):
        def pop(self, meta_step, default):
            for make in IMPOSSIBLE.values() if meta_step == 2 else ():
                try:
                    commander.steering.submit(make(), 0.0)
                except MetadistError as error:
                    commander.refusals.append(str(error))
            return default

    commander.orders = Now()
    assert run(tmp_path / "run").params_sha256 == plain.params_sha256
    assert not (tmp_path / "run/commands.jsonl").exists(), "a refused command is not recorded"
    assert len(commander.refusals) == len(IMPOSSIBLE)
    for message, refusal in zip(IMPOSSIBLE, commander.refusals):
        assert message in refusal


def test_shards_above_the_planned_memory_are_refused():
    learner = tiny.learner("outer.meta_batch_size=4", "outer.shard_size=8")
    assert resize_meta_batch(learner, 3).outer.meta_batch_size == 3
    with pytest.raises(
        CommandRefusedError, match="would make shards of 8 tasks, and the workers' memory was planned for 4"
    ):
        resize_meta_batch(learner, 9)
    assert (
        resize_meta_batch(tiny.learner("outer.meta_batch_size=4", "outer.shard_size=2"), 9).outer.meta_batch_size == 9
    )


def test_a_log_that_can_not_be_written_refuses_the_command(tmp_path, monkeypatch):
    plain = run(tmp_path / "plain")
    commander = Commander(monkeypatch, {2: [command := size(4)]})

    write = Store.write

    def full(store, name, data):
        if name == "commands.jsonl":
            raise OSError(28, "No space left on device")
        write(store, name, data)

    monkeypatch.setattr(Store, "write", full)
    done = run(tmp_path / "run")
    monkeypatch.setattr(Store, "write", write)
    assert done.params_sha256 == plain.params_sha256
    with pytest.raises(MetadistError, match="can't be recorded in .*No space left"):
        commander.steering.submit(command, 0.0)
    assert not (tmp_path / "run/commands.jsonl").exists()


def test_commands_after_the_last_meta_step_are_refused(tmp_path, monkeypatch):
    commander = Commander(monkeypatch)
    run(tmp_path / "run")
    with pytest.raises(CommandRefusedError, match="training is over"):
        commander.steering.submit(size(4), 1.0)
    assert commander.steering.status().phase == "finishing"


def test_one_id_is_obeyed_once(tmp_path, monkeypatch):
    command = size(4)
    commander = Commander(monkeypatch, {2: [command], 4: [command]})
    run(tmp_path / "run")
    assert [line["meta_step"] for line in lines(tmp_path / "run")] == [2]
    assert commander.steering.submit(command, 0.0).meta_step == 2
    with pytest.raises(CommandRefusedError, match="belongs to 'meta_batch_size = 4'"):
        commander.steering.submit(dataclasses.replace(command, value=6), 0.0)


def test_stopping_while_paused(tmp_path, monkeypatch):
    """By Ctrl-C and by command; each writes a checkpoint."""
    for name, orders, stop in (
        ("command", [Command("pause"), Command("stop")], lambda: False),
        ("key", [Command("pause")], None),
    ):
        commander = Commander(monkeypatch, {3: orders})
        pressed = stop or (
            lambda commander=commander: commander.steering is not None and commander.steering.status().phase == "paused"
        )
        half = run(tmp_path / name, "checkpoint.every=100", stop=pressed)
        assert (half.outcome.stopped, half.outcome.progress.meta_step) == ("interrupted", 3)
        Commander(monkeypatch)
        assert run(tmp_path / name, "checkpoint.every=100", resume=True).outcome.progress.meta_step == 6


@pytest.mark.lane("services")
@pytest.mark.long
def test_mlflow_has_the_commands(tmp_path, monkeypatch):
    Commander(monkeypatch, {3: [size(4)]})
    done = run(tmp_path / "run", "tracking.uri=" + f"sqlite:///{tmp_path}/mlflow.db")
    assert done.undelivered == 0
    client = pytest.importorskip("mlflow").MlflowClient(f"sqlite:///{tmp_path}/mlflow.db")
    [found] = client.search_runs(["1"])
    points = [(p.step, p.value) for p in client.get_metric_history(found.info.run_id, "steering/meta_batch_size")]
    assert points == [(0, 10.0), (3, 4.0)]
    assert "commands.jsonl" in [a.path for a in client.list_artifacts(found.info.run_id)]


@pytest.mark.lane("numerics")
def test_two_drivers_on_one_run(tmp_path, monkeypatch):
    refused = []

    def second(_, shard):
        if not refused:
            refused.append(None)
            with pytest.raises(ConfigError, match=rf"is being trained by process {os.getpid()} on"):
                run(tmp_path / "run", resume=True)

    first = run(tmp_path / "run", wrap=everywhere(second))
    assert refused
    assert first.params_sha256 == run(tmp_path / "plain").params_sha256
    with pytest.raises(ConfigError, match="holds a run already"):
        run(tmp_path / "run")


# Watching -------------------------------------------------------------------------------------------------------------


def test_a_slow_watcher_gets_the_newest():
    feed = Feed(Observer())
    with feed.watch() as subscription:
        for step in range(1, 2 * QUEUE_LENGTH + 1):
            feed.step(step, {"loss": 1.0 / step}, 10.0)
        assert [s.meta_step for s in subscription.next(0.0)] == list(range(QUEUE_LENGTH + 1, 2 * QUEUE_LENGTH + 1))
        assert subscription.dropped == QUEUE_LENGTH
        assert subscription.next(0.0) == []
        feed.close()
        with pytest.raises(EOFError):
            subscription.next(0.0)
