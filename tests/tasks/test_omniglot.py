import hashlib
import http.server
import io
import itertools
import json
import os
import pickle
import shutil
import threading
import zipfile
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from metadist.core.errors import ConfigError, DataError
from metadist.core.random import TaskKey
from metadist.tasks import omniglot
from metadist.tasks.omniglot import DECODE, Omniglot

CPU = torch.device("cpu")
CLASSES = {
    "images_background": ["Armenian/character01", "Armenian/character02", "Greek/character01", "Greek/character02"],
    "images_evaluation": ["Angelic/character01", "Gurmukhi/character41", "Gurmukhi/character42", "Tibetan/character01"],
}
DRAWERS = 3


def drawing(name, drawer):
    """Return a black stroke on white, 105 × 105 and 1 bit, like the originals."""
    page = np.full((105, 105), True)
    seed = int(hashlib.sha256(f"{name}{drawer}".encode()).hexdigest()[:6], 16)
    page[20 + seed % 50 :][:20, 10:90] = False
    page[:, seed // 50 % 80 :][:, :8] = False
    return page


def png(page):
    buffer = io.BytesIO()
    Image.fromarray(page).save(buffer, "png")
    return buffer.getvalue()


def decoded(page):
    return DECODE("a drawing", lambda: png(page))[0]


@pytest.fixture
def official(tmp_path, monkeypatch):
    """Make small versions of the official archives, and replace the real sizes and hashes."""
    archives, parts = {}, {}
    for part, names in CLASSES.items():
        buffer = io.BytesIO()
        with zipfile.ZipFile(buffer, "w", zipfile.ZIP_DEFLATED) as archive:
            archive.writestr(f"__MACOSX/{part}/{names[0]}/._0001_01.png", b"no image")
            for i, name in reversed(list(enumerate(names))):
                for drawer in range(DRAWERS):
                    archive.writestr(f"{part}/{name}/{i:04}_{drawer + 1:02}.png", png(drawing(name, drawer)))
        archives[part] = buffer.getvalue()
        md5 = hashlib.md5(archives[part]).hexdigest()
        parts[part] = (md5, len(names), len(names) * DRAWERS)
    monkeypatch.setattr(omniglot, "PARTS", parts)
    return archives


@pytest.fixture
def root(tmp_path, monkeypatch):
    folder = tmp_path / "data" / "omniglot"
    folder.mkdir(parents=True)
    monkeypatch.setenv("METADIST_DATA", str(folder.parent))
    return folder


@pytest.fixture
def server(official, tmp_path, monkeypatch, no_data):
    site = tmp_path / "site"
    site.mkdir()
    for part, data in official.items():
        (site / f"{part}.zip").write_bytes(data)
    requests = []

    class Handler(http.server.SimpleHTTPRequestHandler):
        def log_message(self, *args):
            requests.append(self.path)

    listener = http.server.ThreadingHTTPServer(("127.0.0.1", 0), partial(Handler, directory=str(site)))
    thread = threading.Thread(target=listener.serve_forever, kwargs={"poll_interval": 0.02})
    thread.start()
    monkeypatch.setattr(omniglot, "URL", f"http://127.0.0.1:{listener.server_port}")
    yield site, requests
    listener.shutdown()
    thread.join()
    listener.server_close()


def unpack(data, folder):
    with zipfile.ZipFile(io.BytesIO(data)) as archive:
        archive.extractall(folder)


def test_every_layout_gives_the_same_tasks(official, root):
    seen = set()
    for layout in ("zip", "folder", "mixed", "npz"):
        for old in root.iterdir():
            shutil.rmtree(old) if old.is_dir() else old.unlink()
        for part, data in official.items():
            if layout == "zip" or (layout == "mixed" and part == "images_background"):
                (root / f"{part}.zip").write_bytes(data)
            elif layout != "npz":
                unpack(data, root)
        if layout == "npz":
            names = [n for part in CLASSES.values() for n in part]
            images = np.stack([[decoded(drawing(n, d)) for d in range(DRAWERS)] for n in names])
            background = np.array([n in CLASSES["images_background"] for n in names])
            np.savez(root / "omniglot28.npz", images=images, class_names=names, class_is_background=background)
        family = Omniglot(n_way=2, query_shots=2)
        family.prepare(CPU)
        seen.add(family.data_sha256)
    assert len(seen) == 1
    task = family.sample(TaskKey.of(0, "test", 0, range(4)), "test")
    assert task.support.x.shape == (4, 2, 1, 28, 28) and task.query.y.tolist() == [[0, 1, 0, 1]] * 4
    assert 0.7 < task.support.x.max() <= 1 and task.support.x.median() == 0, "ink is 1 on 0"


def test_split_lists(official, root, tmp_path):
    for data in official.values():
        unpack(data, root)
    vinyals = Omniglot()
    train = ("Greek/character01", "Greek/character02", "Angelic/character01", "Gurmukhi/character41")
    assert vinyals.class_names("train") == train
    assert vinyals.class_names("validation") == ("Armenian/character01", "Armenian/character02")
    assert vinyals.class_names("test") == ("Gurmukhi/character42", "Tibetan/character01")
    lake = Omniglot(split_list="lake")
    assert lake.class_names("train") == ("Greek/character01", "Greek/character02")
    assert lake.class_names("test") == tuple(CLASSES["images_evaluation"])
    assert lake.data_sha256 != vinyals.data_sha256
    path = tmp_path / "mine.json"
    path.write_text(
        json.dumps({"train": ["Tibetan/character01", "Angelic/character01"], "test": ["Greek/character01"]})
    )
    mine = Omniglot(split_list=str(path))
    assert mine.class_names("train") == ("Tibetan/character01", "Angelic/character01") and not mine.class_names(
        "validation"
    )
    for lists, error, message in (
        (
            {"train": ["Greek/character01"], "test": ["Greek/character01"]},
            DataError,
            "in the train split and again in test",
        ),
        ({"train": ["Greek/character1"]}, ConfigError, "no class 'Greek/character1'; did you mean 'Greek/character01'"),
        ({"trian": []}, ConfigError, "'trian' is not one of train, validation, test; did you mean 'train'"),
        (["Greek"], ConfigError, "must be {split"),
    ):
        path.write_text(json.dumps(lists))
        with pytest.raises(error, match=message):
            Omniglot(split_list=str(path)).prepare(CPU)
    with pytest.raises(ConfigError, match="cannot be read as JSON"):
        Omniglot(split_list=str(tmp_path / "none.json")).prepare(CPU)


def test_wrong_words_are_named():
    with pytest.raises(ConfigError, match="tasks.split_list = vinyal: .* did you mean 'vinyals'"):
        Omniglot(split_list="vinyal")
    with pytest.raises(ConfigError, match="tasks.rotations = class: .* did you mean 'classes'"):
        Omniglot(rotations="class")


def test_missing_data_name_the_variable_and_the_download(root):
    with pytest.raises(DataError) as caught:
        Omniglot().prepare(CPU)
    for words in ("METADIST_DATA", str(root / "omniglot28.npz"), f"{omniglot.URL}/images_background.zip", "unset"):
        assert words in str(caught.value)
    assert "\n" not in str(caught.value)


def test_incomplete_or_damaged_data_are_refused(official, root):
    for data in official.values():
        unpack(data, root)
    extra = root / "images_evaluation" / "Tibetan" / "character01"
    one = next(extra.iterdir())
    content = one.read_bytes()
    one.unlink()
    with pytest.raises(
        DataError, match="images_evaluation is incomplete: 4 characters and 11 drawings instead of 4 and 12"
    ):
        Omniglot().prepare(CPU)
    one.write_bytes(content[:60])
    with pytest.raises(DataError, match=f"{one} is not a readable image"):
        Omniglot().prepare(CPU)
    shutil.rmtree(root / "images_evaluation")
    (root / "images_evaluation.zip").write_bytes(official["images_evaluation"][:500])
    with pytest.raises(DataError, match="images_evaluation.zip is not a zip archive"):
        Omniglot().prepare(CPU)
    (root / "omniglot28.npz").write_bytes(b"PK")
    with pytest.raises(DataError, match="omniglot28.npz is not readable"):
        Omniglot().prepare(CPU)


def test_download_into_the_cache(server, cache, official):
    site, requests = server
    family = Omniglot(n_way=2, query_shots=2)
    family.prepare(CPU)
    assert len(requests) == 2 and (cache / "images_background.zip").read_bytes() == official["images_background"]
    shutil.rmtree(site)
    Omniglot().prepare(CPU)
    for array in cache.glob("*.npy"):
        array.unlink()
    again = pickle.loads(pickle.dumps(family))
    assert again.data_sha256 == family.data_sha256 and len(requests) == 2, "the archives are in the cache"


def test_failed_downloads_are_one_clear_line(server, cache):
    site, _ = server
    whole = (site / "images_background.zip").read_bytes()
    (site / "images_background.zip").write_bytes(whole[:-1] + b"x")
    with pytest.raises(DataError, match=r"images_background.zip arrived with MD5 \w+, not \w+ .* set METADIST_DATA$"):
        Omniglot().prepare(CPU)
    assert not (cache / "images_background.zip").exists()
    (site / "images_background.zip").unlink()
    with pytest.raises(DataError, match="cannot download http://.*images_background.zip .*404"):
        Omniglot().prepare(CPU)


def test_no_network_is_one_clear_line(monkeypatch, no_data):
    monkeypatch.setattr(omniglot, "URL", "http://127.0.0.1:9")
    with pytest.raises(DataError, match="cannot download http://127.0.0.1:9/images_background.zip .*refused"):
        Omniglot().prepare(CPU)


@pytest.fixture(scope="module")
def real():
    path = Path(os.environ.get("METADIST_DATA", ""), "omniglot", "omniglot28.npz")
    if not os.environ.get("METADIST_DATA") or not path.is_file():
        pytest.skip("needs the real Omniglot: set METADIST_DATA to a folder with omniglot/omniglot28.npz")
    return path


@pytest.mark.lane("numerics")
def test_real_splits(real):
    arrays = np.load(real)
    names, published = arrays["class_names"], arrays["class_vinyals_split"]
    for lists, sizes in (("vinyals", (1028, 172, 423)), ("lake", (792, 172, 659))):
        family = Omniglot(split_list=lists)
        splits = [set(family.class_names(s)) for s in ("train", "validation", "test")]
        assert tuple(map(len, splits)) == sizes and len(set.union(*splits)) == 1623
        if lists == "vinyals":
            assert splits == [set(names[published == s].tolist()) for s in range(3)]
        else:
            assert splits[2] == set(names[~arrays["class_is_background"]].tolist())
    assert family.protocol("train")["classes"] == 4 * 792


def test_real_drawings_decode_to_the_prepared_file(real):
    bits, images = np.load(real.with_name("omniglot105_bits.npz"))["bits"], np.load(real)["images"]
    for c, d in itertools.product(range(0, 1623, 100), range(20)):
        page = np.unpackbits(bits[c, d], count=105 * 105).reshape(105, 105) == 0
        assert np.array_equal(decoded(page), images[c, d])


@pytest.mark.lane("numerics")
def test_real_nearest_mean(real):
    """The nearest class mean in pixels has a known accuracy: a numpy sampler gave 42.4 % (1 shot), 68.6 % (5)."""
    for k, expected in ((1, 0.424), (5, 0.686)):
        family = Omniglot(k_shot=k, query_shots=5)
        task = family.sample(TaskKey.of(0, "test", 0, range(400)), "test")
        means = task.support.x.view(400, k, 5, 784).mean(1)
        nearest = torch.cdist(task.query.x.flatten(2), means).argmin(-1)
        assert abs((nearest == task.query.y).float().mean() - expected) < 0.03
