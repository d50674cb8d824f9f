import errno
import logging
import multiprocessing
import os
import time

import numpy as np
import pytest

from metadist.tasks import images
from metadist.tasks.images import ImageSet, cached


def small(seed=0):
    pixels = np.random.default_rng(seed).integers(0, 256, (12, 1, 5, 5), dtype=np.uint8)
    return ImageSet.grouped(pixels, [("", f"c{i % 3}") for i in range(12)])


def never():
    raise AssertionError("built again")


def test_grouping_keeps_the_order_within_a_class():
    pixels = np.arange(6, dtype=np.uint8).reshape(6, 1, 1, 1)
    grouped = ImageSet.grouped(pixels, [("b", "x"), ("a", "y"), ("b", "x"), ("a", "x"), ("a", "y"), ("a", "x")])
    assert (grouped.parts, grouped.names, grouped.counts) == (("a", "a", "b"), ("x", "y", "x"), (2, 2, 2))
    assert grouped.pixels.flatten().tolist() == [3, 5, 1, 4, 0, 2]


def test_built_once_then_mapped(cache):
    first = cached("set", "source", small)
    second = cached("set", "source", never)
    assert second.sha256 == first.sha256 == small().sha256
    assert (second.names, second.counts, second.parts) == (first.names, first.counts, first.parts)
    (array,) = cache.glob("*.npy")
    assert first.sha256[:16] in array.name
    with open("/proc/self/maps") as maps:
        assert str(array) in maps.read(), "the pixels are the file's own pages"
    assert cached("set", "another source", lambda: small(1)).sha256 != first.sha256


def _race(marks, barrier, results):
    def build():
        (marks / str(os.getpid())).touch()
        time.sleep(0.3)
        return small()

    barrier.wait()
    results.put(cached("set", "source", build).sha256)


@pytest.mark.lane("services")
def test_processes_that_start_together_build_once(tmp_path):
    marks = tmp_path / "marks"
    marks.mkdir()
    context = multiprocessing.get_context("spawn")
    barrier, results = context.Barrier(3), context.Queue()
    processes = [context.Process(target=_race, args=(marks, barrier, results)) for _ in range(3)]
    for process in processes:
        process.start()
    assert {results.get(timeout=300) for _ in processes} == {small().sha256}
    for process in processes:
        process.join()
    assert len(list(marks.iterdir())) == 1


@pytest.mark.parametrize("damage", ["bit", "cut", "gone", "entry"])
def test_a_damaged_copy_is_built_anew(cache, damage, caplog):
    cached("set", "source", small)
    (array,), (entry,) = cache.glob("*.npy"), cache.glob("*.json")
    if damage == "bit":
        data = bytearray(array.read_bytes())
        data[-3] ^= 4
        array.write_bytes(data)
    elif damage == "cut":
        array.write_bytes(array.read_bytes()[:-7])
    elif damage == "gone":
        array.unlink()
    else:
        entry.write_text("{")
    assert cached("set", "source", small).sha256 == small().sha256
    assert damage == "gone" or "building it again" in caplog.text
    assert cached("set", "source", never).sha256 == small().sha256


def test_a_cache_that_cannot_be_made_costs_a_warning(tmp_path, monkeypatch, caplog):
    (tmp_path / "file").touch()
    monkeypatch.setenv("METADIST_CACHE", str(tmp_path / "file" / "below"))
    with caplog.at_level(logging.WARNING):
        assert cached("set", "source", small).sha256 == small().sha256
    assert "METADIST_CACHE" in caplog.text


def test_a_full_disk_costs_a_warning(cache, monkeypatch, caplog):
    def full(file, *_, **__):
        file.write(b"some")
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(images.np, "save", full)
    assert cached("set", "source", small).sha256 == small().sha256
    assert "No space left" in caplog.text and not list(cache.glob("*.npy*")) and not list(cache.glob("*.json"))


def test_a_filled_cache_is_read_without_a_lock(monkeypatch):
    cached("set", "source", small)
    monkeypatch.setattr("filelock.FileLock", lambda *_: never())
    assert cached("set", "source", never).sha256 == small().sha256
