"""Checkpoints: loading returns the saved bits, and no failure destroys an older checkpoint."""

from __future__ import annotations

import json
import logging
import os
import random
import resource
import shutil
import subprocess
import uuid
from pathlib import Path

import fsspec
import pytest
import torch

from metadist.core.errors import CheckpointError
from metadist.core.parameters import Layout
from metadist.core.state import Slot, State
from metadist.storage import checkpoints as checkpoint
from metadist.storage.checkpoints import Checkpoints
from metadist.storage.store import Store

SLOTS = {
    "theta": Slot(Layout(("w", "b"), ((40, 5), (5,)))),
    "rates": Slot(Layout(("w",), ((3,),), torch.float64)),
    "table": Slot(Layout(("i",), ((4,),), torch.int64), "constant"),
    "none": Slot(Layout((), ()), "average"),
}


def state(step: int = 0) -> State:
    generator = torch.Generator().manual_seed(step)
    return State(
        {
            "theta": torch.randn(205, generator=generator),
            "rates": torch.tensor([0.1, float("nan"), -0.0], dtype=torch.float64),
            "table": torch.arange(4) + 2**62 + step,
            "none": torch.empty(0),
        },
        {
            "theta/step": torch.tensor(step),
            "theta/seen": torch.tensor([True, False]),
            "m": torch.ones(2, dtype=torch.bfloat16),
        },
    )


def same(a: State, b: State) -> bool:
    def raw(x: State) -> list[tuple]:
        named = [(k, n, t) for k in ("slots", "outer") for n, t in sorted(getattr(x, k).items())]
        return [
            (k, n, t.dtype, t.shape, t.contiguous().view(-1).view(torch.uint8).numpy().tobytes()) for k, n, t in named
        ]

    return raw(a) == raw(b)


def save(checkpoints: Checkpoints, *steps: int, score: float | None = None) -> None:
    for step in steps:
        assert checkpoints.save(step, state(step), {"seed": step}, slots=SLOTS, score=score)


def good(checkpoints: Checkpoints) -> list[int]:
    return [e.meta_step for e in checkpoints.list() if e.status == "good"]


@pytest.fixture(params=["local", "file", "memory"])
def run_dir(request, tmp_path):
    return {
        "local": str(tmp_path / "run"),
        "file": f"file://{tmp_path}/run",
        "memory": f"memory://{uuid.uuid4().hex}/run",
    }[request.param]


def files(run_dir: str) -> dict[str, bytes]:
    """Return all files below a run directory: relative path → bytes."""
    fs, root = fsspec.core.url_to_fs(run_dir)
    return {p[len(root) :]: fs.cat_file(p) for p in fs.find(root)}


# ---- round trips


def test_a_state_comes_back_bit_for_bit(run_dir):
    checkpoints, manifest = Checkpoints(run_dir), {"seed": 1, "config": {"lr": 0.1 + 0.2}, "mlflow_run_id": None}
    assert checkpoints.latest() is None
    assert checkpoints.best() is None
    assert list(checkpoints.list()) == []
    assert checkpoints.save(500, state(500), manifest, slots=SLOTS, score=0.5)
    loaded = Checkpoints(run_dir).latest(SLOTS)
    assert loaded.meta_step == 500
    assert loaded.manifest == manifest
    assert loaded.score == 0.5
    assert same(loaded.state, state(500))
    assert all(t.data_ptr() % 64 == 0 for t in loaded.state.slots.values())
    assert sorted(files(run_dir)) == [f"/checkpoints/step-00000500/{n}" for n in ("manifest.json", "state.safetensors")]


def test_empty_outer_state_shared_views_and_no_slots(tmp_path):
    base = torch.arange(8.0)
    slots = {n: Slot(Layout(("v",), ((4,),))) for n in "abc"}
    tied = State({"a": base[:4], "b": base[::2], "c": base[:4]})
    assert Checkpoints(tmp_path / "x").save(1, tied, {}, slots=slots)
    assert same(Checkpoints(tmp_path / "x").latest(slots).state, tied)
    assert Checkpoints(tmp_path / "y").save(1, State({}), {}, slots={})
    assert Checkpoints(tmp_path / "y").latest({}).state == State({})


def test_the_manifest_is_plain_json_with_layouts_and_hashes(tmp_path):
    save(Checkpoints(tmp_path), 3)
    manifest = json.loads((tmp_path / "checkpoints/step-00000003/manifest.json").read_text())
    assert manifest["format"] == 1
    assert manifest["meta_step"] == 3
    assert manifest["run"] == {"seed": 3}
    assert manifest["slots"]["theta"]["parameters"] == {"w": [40, 5], "b": [5]}
    assert manifest["slots"]["table"]["rule"] == "constant"
    assert manifest["slots"]["rates"]["dtype"] == "float64"
    assert manifest["files"].keys() == {"state.safetensors"}


@pytest.mark.parametrize("bad", [{"x": float("nan")}, {"x": object()}])
def test_what_is_no_json_is_the_callers_mistake(tmp_path, bad):
    with pytest.raises(ValueError):
        Checkpoints(tmp_path).save(1, state(), bad, slots=SLOTS)
    with pytest.raises(ValueError, match="theta is float32 \\[205\\]"):
        Checkpoints(tmp_path).save(1, state(), {}, slots={**SLOTS, "theta": Slot(Layout(("w",), ((204,),)))})


# ---- what is kept


@pytest.mark.parametrize("higher", [True, False])
def test_the_newest_and_the_best_are_kept(run_dir, higher):
    checkpoints = Checkpoints(run_dir, keep=2, higher_is_better=higher)
    scores = {1: 0.2, 2: 0.9, 3: 0.9, 4: 0.1, 5: float("nan"), 6: None, 7: 0.5}
    for step, score in scores.items():
        save(checkpoints, step, score=score)
    best = 2 if higher else 4
    assert good(checkpoints) == [best, 6, 7]
    assert checkpoints.best(SLOTS).meta_step == best
    assert checkpoints.latest(SLOTS).meta_step == 7
    assert same(checkpoints.load(6).state, state(6))
    assert {p.split("/")[2] for p in files(run_dir)} == {f"step-0000000{s}" for s in (best, 6, 7)}
    with pytest.raises(CheckpointError, match=f"step-00000003: manifest.json is missing; whole ones: {best}, 6, 7"):
        checkpoints.load(3)


def test_the_same_content_is_not_written_again_and_other_content_replaces(run_dir):
    checkpoints = Checkpoints(run_dir)
    save(checkpoints, 1, 2)
    before = files(run_dir)
    writes, write = [], Store.write
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Store, "write", lambda s, n, d: (writes.append(n), write(s, n, d)))
        save(checkpoints, 2)
        assert not writes
        assert files(run_dir) == before
        assert checkpoints.save(2, state(2), {"seed": "other"}, slots=SLOTS)
        assert len(writes) == 1
        assert checkpoints.load(2).manifest == {"seed": "other"}
    assert checkpoints.save(2, state(9), {"seed": 9}, slots=SLOTS)
    assert same(checkpoints.latest(SLOTS).state, state(9))
    assert len(files(run_dir)) == 4
    save(checkpoints, 2)
    assert same(checkpoints.latest(SLOTS).state, state(2))
    assert len(files(run_dir)) == 4


# ---- damage


def damage(run_dir: str, step: int, file: str, change) -> None:
    fs, root = fsspec.core.url_to_fs(run_dir)
    path = f"{root}/checkpoints/step-{step:08d}/{file}"
    data = change(fs.cat_file(path))
    fs.rm_file(path) if data is None else fs.pipe_file(path, data)


def flip(position: float):
    def change(data: bytes) -> bytes:
        copy = bytearray(data)
        copy[int(position * (len(copy) - 1))] ^= 4
        return bytes(copy)

    return change


DAMAGE = {
    "gone": lambda d: None,
    "empty": lambda d: b"",
    "half": lambda d: d[: len(d) // 2],
    "one byte short": lambda d: d[:-1],
    "one byte more": lambda d: d + b"\n",
    "first bit": flip(0.0),
    "middle bit": flip(0.5),
    "last bit": flip(1.0),
    "noise": lambda d: random.Random(0).randbytes(len(d)),
}


@pytest.mark.parametrize("how", DAMAGE)
@pytest.mark.parametrize("file", ["state.safetensors", "manifest.json"])
def test_a_damaged_checkpoint_is_skipped_named_and_replaced(run_dir, file, how, caplog):
    save(Checkpoints(run_dir), 1, 2)
    damage(run_dir, 2, file, DAMAGE[how])
    checkpoints = Checkpoints(run_dir)
    with caplog.at_level(logging.WARNING):
        assert checkpoints.latest(SLOTS).meta_step == 1
    assert "step-00000002 skipped: " in caplog.text
    assert file in caplog.text
    with pytest.raises(CheckpointError, match="whole ones: 1"):
        checkpoints.load(2)
    save(checkpoints, 2)
    assert same(Checkpoints(run_dir).latest(SLOTS).state, state(2))
    assert len(files(run_dir)) == 4


def test_every_flipped_bit_and_every_truncation_of_a_manifest_is_found(tmp_path):
    save(Checkpoints(tmp_path), 1)
    path = tmp_path / "checkpoints/step-00000001/manifest.json"
    data = path.read_bytes()
    found = 0
    for damaged in [
        bytes([*data[: b // 8], data[b // 8] ^ 1 << b % 8, *data[b // 8 + 1 :]]) for b in range(8 * len(data))
    ] + [data[:n] for n in range(len(data))]:
        with pytest.raises(checkpoint._Unusable):
            checkpoint._unseal(damaged)
        found += 1
    assert found == 9 * len(data)


def test_a_damaged_one_that_looks_well_does_not_push_out_a_good_one(tmp_path):
    save(Checkpoints(tmp_path), 10, 20)
    damage(str(tmp_path), 20, "state.safetensors", flip(0.9))
    checkpoints = Checkpoints(tmp_path)
    assert checkpoints.latest(SLOTS).meta_step == 10
    save(checkpoints, 15)
    assert good(checkpoints) == [10, 15]


def test_if_none_can_be_used_each_is_named(run_dir):
    save(Checkpoints(run_dir), 1, 2)
    damage(run_dir, 1, "manifest.json", flip(0.5))
    damage(run_dir, 2, "state.safetensors", flip(0.5))
    with pytest.raises(
        CheckpointError, match="meta-step 2: state.safetensors is damaged.*; meta-step 1: manifest.json"
    ):
        Checkpoints(run_dir).latest(SLOTS)


def test_a_single_interrupted_save_is_no_checkpoint(run_dir, caplog):
    save(Checkpoints(run_dir), 1)
    damage(run_dir, 1, "manifest.json", lambda d: None)
    assert Checkpoints(run_dir).latest(SLOTS) is None
    assert "step-00000001 skipped" in caplog.text


def test_the_best_falls_back_too(tmp_path):
    checkpoints = Checkpoints(tmp_path, keep=3)
    for step, score in ((1, 0.5), (2, 0.9), (3, 0.7)):
        save(checkpoints, step, score=score)
    damage(str(tmp_path), 2, "state.safetensors", flip(0.5))
    assert checkpoints.best(SLOTS).meta_step == 3


@pytest.mark.parametrize(
    ("slots", "what"),
    [
        (
            {**SLOTS, "theta": Slot(Layout(("w", "b"), ((40, 20), (20,))))},
            r"slot theta, parameter w is \[40, 5\], this model's is \[40, 20\]",
        ),
        (
            {**SLOTS, "theta": Slot(Layout(("w", "c"), ((40, 5), (5,))))},
            r"parameter c is missing, this model's is \[5\]",
        ),
        ({**SLOTS, "theta": Slot(Layout(("b", "w"), ((5,), (40, 5))))}, "slot theta are in another order"),
        ({**SLOTS, "rates": Slot(Layout(("w",), ((3,),)))}, "dtype of slot rates is float64, this model's is float32"),
        ({**SLOTS, "table": Slot(SLOTS["table"].layout)}, "rule of slot table is constant, this model's is gradient"),
        ({**SLOTS, "more": SLOTS["none"]}, "slot more is missing from it"),
        ({n: s for n, s in SLOTS.items() if n != "none"}, "slot none is not in this model"),
    ],
)
def test_a_checkpoint_of_another_model_is_an_error_in_one_line(tmp_path, slots, what):
    save(Checkpoints(tmp_path), 1, 2)
    for read in (Checkpoints.latest, lambda c, s: c.load(1, s)):
        with pytest.raises(CheckpointError, match=what) as error:
            read(Checkpoints(tmp_path), slots)
        assert "\n" not in str(error.value)


def test_another_format_is_an_error_and_never_deleted(tmp_path, monkeypatch):
    monkeypatch.setattr(checkpoint, "FORMAT", 2)
    save(Checkpoints(tmp_path), 5)
    monkeypatch.undo()
    checkpoints = Checkpoints(tmp_path, keep=1)
    with pytest.raises(CheckpointError, match="step-00000005 has format version 2, expected 1"):
        checkpoints.latest()
    save(checkpoints, 6, 7)
    assert [(e.meta_step, e.status) for e in checkpoints.list()] == [(5, "foreign"), (7, "good")]


def test_an_unknown_protocol_is_an_error():
    with pytest.raises(CheckpointError, match="nosuch"):
        Checkpoints("nosuch://bucket/run")


# ---- stores that fail


@pytest.fixture
def small_disk(tmp_path):
    """A real file system of 256 KB; None where mounting is not permitted."""
    disk, mounted = tmp_path / "disk", []
    disk.mkdir()
    if os.geteuid() == 0 and shutil.which("mount"):
        options = ["mount", "-t", "tmpfs", "-o", "size=256k", "tmpfs", str(disk)]
        mounted = [disk] if subprocess.run(options, capture_output=True).returncode == 0 else []
    yield disk if mounted else None
    for path in mounted:
        subprocess.run(["umount", str(path)], check=True)


BIG = {"theta": Slot(Layout(("w",), ((20_000,),)))}


def big(step: int) -> State:
    return State({"theta": torch.full((20_000,), float(step))})


def check_full_disk(path: Path, caplog, fill, empty) -> None:
    checkpoints = Checkpoints(path, keep=1)
    assert checkpoints.save(1, big(1), {}, slots=BIG)
    before = files(str(path))
    fill()
    with caplog.at_level(logging.WARNING):
        assert not checkpoints.save(2, big(2), {}, slots=BIG)
        assert not checkpoints.save(1, big(3), {}, slots=BIG)
    empty()
    assert "meta-step 2 not saved" in caplog.text
    assert "\nTraceback" not in caplog.text
    assert files(str(path)) == before
    assert sorted(p.name for p in (path / "checkpoints").iterdir()) == ["step-00000001"]
    assert checkpoints.latest(BIG).state.slots["theta"][0] == 1
    assert checkpoints.save(2, big(2), {}, slots=BIG)
    assert good(checkpoints) == [2]


def test_a_full_disk_costs_nothing_that_was_there(small_disk, tmp_path, caplog):
    """ENOSPC from a mounted file system; where mounting is not permitted, a limit on file sizes instead."""
    if small_disk is None:
        return check_file_size_limit(tmp_path / "run", caplog)
    ballast = small_disk / "ballast"

    def fill() -> None:
        room = os.statvfs(small_disk)
        ballast.write_bytes(bytes(room.f_bavail * room.f_bsize - 40_000))

    check_full_disk(small_disk / "run", caplog, fill, ballast.unlink)


def check_file_size_limit(path: Path, caplog) -> None:
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    check_full_disk(
        path,
        caplog,
        lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (40_000, hard)),
        lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard)),
    )


def test_a_file_size_limit_costs_nothing_that_was_there(tmp_path, caplog):
    check_file_size_limit(tmp_path / "run", caplog)


@pytest.mark.parametrize("fail_at", range(6))
@pytest.mark.parametrize("again", [False, True], ids=["new step", "same step"])
def test_a_store_without_rename_that_fails_at_any_call_costs_nothing(fail_at, again, monkeypatch, caplog):
    """The nth write, listing or deletion fails; a failing write leaves half of its bytes behind."""
    run_dir = f"memory://{uuid.uuid4().hex}"
    checkpoints = Checkpoints(run_dir, keep=1)
    save(checkpoints, 1)
    fs = checkpoints._store.fs
    calls = iter(range(100))

    def failing(method):
        original = getattr(fs, method)

        def call(path, *arguments, **options):
            if next(calls) == fail_at:
                if method == "pipe_file" and not path.endswith("manifest.json"):
                    original(path, arguments[0][: len(arguments[0]) // 2])
                raise RuntimeError("the network is down")
            return original(path, *arguments, **options)

        monkeypatch.setattr(fs, method, call, raising=True)

    for method in ("pipe_file", "ls", "rm_file"):
        failing(method)
    step = 1 if again else 2
    saved = checkpoints.save(step, state(7), {"seed": 7}, slots=SLOTS)
    monkeypatch.undo()
    loaded = Checkpoints(run_dir).latest(SLOTS)
    assert loaded.meta_step == (step if saved else 1)
    assert same(loaded.state, state(7) if saved else state(1))
    assert saved or sorted(files(run_dir)) == [
        f"/checkpoints/step-00000001/{n}" for n in ("manifest.json", "state.safetensors")
    ]
    save(checkpoints, 3)
    assert len(files(run_dir)) == 2
