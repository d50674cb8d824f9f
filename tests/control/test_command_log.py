"""The command log: torn, damaged, lost and contradicting logs, and stores that cannot append."""

from __future__ import annotations

import random
import shutil

import fsspec
import pytest
from commander import Commander, run, size
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from metadist.control.command_log import CommandLog
from metadist.control.commands import Command
from metadist.core.errors import CheckpointError, MetadistError


@pytest.fixture
def steered(tmp_path, monkeypatch):
    """A run with commands at 1 and 4, interrupted at 5 with a checkpoint; and the hash that it must end with."""
    orders = {1: [size(4)], 4: [size(6), Command("checkpoint")]}
    Commander(monkeypatch, orders)
    whole = run(tmp_path / "whole")
    Commander(monkeypatch, orders, stop_at=5)
    run(tmp_path / "run")
    Commander(monkeypatch)
    return tmp_path / "run", whole.params_sha256


@pytest.mark.parametrize("recorded", [0, 1])
def test_a_folder_that_cannot_be_synced_leaves_no_line_of_a_command_without_effect(tmp_path, monkeypatch, recorded):
    """The write fails after the rename: the line stands in the file already."""
    if recorded:
        CommandLog(str(tmp_path)).append(size(2), 4)

    def fail(path):
        raise OSError(5, "Input/output error")

    monkeypatch.setattr("metadist.storage.store.sync_directory", fail)
    with pytest.raises(MetadistError, match="can't be recorded in .*Input/output error; it has no effect"):
        CommandLog(str(tmp_path)).append(size(3), 5)
    monkeypatch.undo()
    assert [e.command.value for e in CommandLog(str(tmp_path)).entries] == [2][:recorded]
    assert CommandLog(str(tmp_path)).append(size(4), 5).seq == 1 + recorded


def test_a_write_that_fails_leaves_the_old_log(tmp_path, monkeypatch):
    log = CommandLog(str(tmp_path))
    log.append(size(2), 4)
    before = (tmp_path / "commands.jsonl").read_bytes()

    def fail(source, target):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("metadist.storage.store.os.replace", fail)
    with pytest.raises(MetadistError, match="No space left"):
        log.append(size(3), 5)
    assert (tmp_path / "commands.jsonl").read_bytes() == before
    assert [path.name for path in tmp_path.iterdir()] == ["commands.jsonl"]


def test_a_torn_last_line_never_took_effect(steered, caplog, tmp_path):
    """Versions that appended lines could leave one; it is ignored, and dropped by the next write."""
    where, expected = steered
    log = where / "commands.jsonl"
    whole = log.read_bytes()
    CommandLog(str(where)).append(size(3), 5)
    longer = log.read_bytes()
    for cut in range(len(whole) + 1, len(longer) - 1):
        log.write_bytes(longer[:cut])
        assert [e.seq for e in CommandLog(str(where)).entries] == [1, 2, 3]
        assert log.read_bytes() == longer[:cut], "reading changes no file"
    log.write_bytes(whole + bytes(100))  # as a power cut may leave it
    assert run(where, resume=True).params_sha256 == expected
    assert "torn last line" in caplog.text
    again = CommandLog(str(where)).append(size(3), 5)
    assert again.seq == 4 and log.read_bytes().startswith(whole) and bytes(1) not in log.read_bytes()
    log.write_bytes(longer[:-1])  # complete but for its line end: the checksum decides
    assert len(CommandLog(str(where)).append(size(2), 6).by) > 0
    assert [e.seq for e in CommandLog(str(where)).entries] == [1, 2, 3, 4, 5]


def test_a_torn_line_that_a_checkpoint_knows_comes_back(steered):
    """This code syncs first; some disks report a sync that did not happen."""
    where, expected = steered
    log = where / "commands.jsonl"
    log.write_bytes(b"".join(log.read_bytes().splitlines(keepends=True)[:1]))
    assert run(where, resume=True).params_sha256 == expected
    assert [c["value"] for c in CommandLog(str(where)).history()] == [4, 6]


def test_a_lost_log_comes_back_from_the_checkpoint(steered):
    where, expected = steered
    (where / "commands.jsonl").unlink()
    assert run(where, resume=True).params_sha256 == expected
    assert [c["value"] for c in CommandLog(str(where)).history()] == [4, 6]


def test_a_damaged_line_in_the_middle_is_an_error(steered):
    where, _ = steered
    log = where / "commands.jsonl"
    first, *rest = log.read_bytes().splitlines(keepends=True)
    log.write_bytes(first.replace(b'"value": 4', b'"value": 5') + b"".join(rest))
    with pytest.raises(CheckpointError, match="line 1 is damaged"):
        run(where, resume=True)


def test_a_log_that_contradicts_the_checkpoint_is_an_error(steered):
    where, _ = steered
    log = CommandLog(str(where))
    log.append(size(8), 2)
    with pytest.raises(
        CheckpointError,
        match="set_meta_batch_size 8 at meta-step 2, the checkpoint was trained under .* 6 at meta-step 4",
    ):
        run(where, resume=True)


def test_the_newest_command_wins(tmp_path):
    log = CommandLog(str(tmp_path))
    for value, at in ((64, 15), (16, 12), (8, 14), (4, 14)):
        log.append(size(value), at)
    assert [log.value_at("set_meta_batch_size", at) for at in (11, 12, 13, 14, 20)] == [None, 16, 16, 4, 4]
    assert [(c["meta_step"], c["value"]) for c in CommandLog(str(tmp_path)).history(before=14)] == [(12, 16)]


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(at=st.integers(0, 10**6), flip=st.integers(1, 255))
def test_no_flipped_byte_goes_unseen(tmp_path, at, flip):
    (tmp_path / "commands.jsonl").unlink(missing_ok=True)
    log = CommandLog(str(tmp_path))
    for value in (3, 4, 5):
        log.append(size(value), value)
    data = bytearray((tmp_path / "commands.jsonl").read_bytes())
    data[at % len(data)] ^= flip
    (tmp_path / "commands.jsonl").write_bytes(data)
    try:
        found = CommandLog(str(tmp_path))
    except CheckpointError:
        return
    assert found.entries == log.entries


@pytest.mark.lane("numerics")
def test_on_a_store_that_can_not_append(tmp_path, monkeypatch):
    monkeypatch.setenv("METADIST_CACHE", str(tmp_path / "cache"))
    url = f"memory://steered-{random.random()}/a"
    Commander(monkeypatch, {3: [size(4)]})
    whole = run(tmp_path / "whole")
    Commander(monkeypatch, {3: [size(4)]}, stop_at=4)
    run(url)
    assert fsspec.filesystem("memory").cat_file(f"{url}/commands.jsonl").count(b"\n") == 1
    shutil.rmtree(tmp_path / "cache")  # another machine resumes
    Commander(monkeypatch)
    assert run(url, resume=True).params_sha256 == whole.params_sha256
