"""Test METADIST_DATA as a URL: a node copies the required files once."""

from __future__ import annotations

import uuid

import fsspec
import numpy as np
import pytest
from PIL import Image

from metadist.core.errors import DataError
from metadist.tasks import TASKS
from metadist.tasks.sources import data_folder


@pytest.fixture
def store(monkeypatch, tmp_path):
    """Return an empty object store, and give the node an empty cache."""
    url = f"memory://{uuid.uuid4().hex}"
    monkeypatch.setenv("METADIST_DATA", url)
    monkeypatch.setenv("METADIST_CACHE", str(tmp_path / "cache"))
    return url


def put(url, data):
    with fsspec.open(url, "wb") as file:
        file.write(data)


def test_files_are_copied_once_for_each_state(store):
    put(f"{store}/omniglot/a.bin", b"first")
    folder = data_folder("omniglot", ("a.bin", "b.bin"))
    assert sorted(p.name for p in folder.iterdir()) == ["a.bin"]
    assert (folder / "a.bin").read_bytes() == b"first"
    assert data_folder("omniglot", ("a.bin", "b.bin")) == folder
    put(f"{store}/omniglot/a.bin", b"second, longer")
    assert (data_folder("omniglot", ("a.bin", "b.bin")) / "a.bin").read_bytes() == b"second, longer"


def test_an_unreachable_address_is_one_line(monkeypatch):
    monkeypatch.setenv("METADIST_DATA", "nosuchprotocol://bucket")
    with pytest.raises(
        DataError, match=r"METADIST_DATA = nosuchprotocol://bucket cannot be reached \(.*nosuchprotocol"
    ):
        data_folder("omniglot", ("a.bin",))


def test_an_image_folder_lies_in_the_store(store, tmp_path):
    for name in ("a", "b", "c"):
        for i in range(2):
            path = tmp_path / f"{name}{i}.png"
            Image.fromarray(np.full((4, 4), 100 + i, np.uint8)).save(path)
            put(f"{store}/mine/{name}/{i}.png", path.read_bytes())
    family = TASKS["image_folder"](path="mine", n_way=2, k_shot=1, query_shots=1)
    assert sorted(family.load().names) == ["a", "b", "c"]


def test_omniglot_names_the_url_that_lacks_it(store):
    put(f"{store}/omniglot/readme.txt", b"")
    with pytest.raises(DataError, match=f"METADIST_DATA = {store} has no Omniglot"):
        TASKS["omniglot"](n_way=2, k_shot=1, query_shots=1).load()


@pytest.mark.data
def test_omniglot_from_a_url_is_the_same_data(data, store, monkeypatch, tmp_path):
    monkeypatch.setenv("METADIST_DATA", f"file://{data}")
    by_url = TASKS["omniglot"](n_way=5, k_shot=1, query_shots=1).load()
    monkeypatch.setenv("METADIST_DATA", data)
    assert TASKS["omniglot"](n_way=5, k_shot=1, query_shots=1).load().sha256 == by_url.sha256
