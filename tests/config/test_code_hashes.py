"""The code of the user's own modules: which files count, and what changes their hashes."""

from __future__ import annotations

import hashlib
import sys

import pytest
from own_modules import own_modules

from metadist.config.modules import code_hashes, code_modules, main_hashes, own_hash

FILES = {
    "own_mine/__init__.py": "",
    "own_mine/lines.py": "import os, torch\nfrom own_mine.deeper import slope\nfrom . import beside\n",
    "own_mine/beside.py": "def late():\n    from ..own_mine import lazily\n",
    "own_mine/lazily.py": "",
    "own_mine/deeper/__init__.py": "from .constants import slope\n",
    "own_mine/deeper/constants.py": "slope = 1\n",
    "own_mine/unused.py": "",
    "own_network.py": "import own_sibling as s\nimport json\nif TYPE_CHECKING:\n    import own_other\n",
    "own_sibling.py": "from own_space.first import name\n",
    "own_space/first.py": "name = 1\n",
    "own_other.py": "",
    "own_broken.py": "def (:\n",
}
LINES = ["own_mine", "own_mine.beside", "own_mine.deeper", "own_mine.deeper.constants", "own_mine.lazily"]
LINES += ["own_mine.lines"]


@pytest.fixture
def home(tmp_path, monkeypatch):
    with own_modules(tmp_path, FILES, monkeypatch) as folder:
        yield folder


def test_a_module_counts_with_its_packages_and_the_modules_that_it_imports(home):
    found = code_hashes(["own_mine.lines"])
    assert list(found) == LINES
    for name in LINES:
        path = home.joinpath(*name.split("."))
        path = path / "__init__.py" if path.is_dir() else path.with_suffix(".py")
        assert found[name] == hashlib.sha256(path.read_bytes()).hexdigest()
    assert list(code_hashes(["own_network"])) == ["own_network", "own_sibling", "own_space.first"]
    assert list(code_hashes(["own_broken"])) == ["own_broken"]


def test_the_files_are_those_that_this_process_imported(home, tmp_path_factory, monkeypatch):
    import own_other  # noqa: F401

    before = code_hashes(["own_other"])
    elsewhere = tmp_path_factory.mktemp("elsewhere")
    (elsewhere / "own_other.py").write_text("another copy\n")
    monkeypatch.syspath_prepend(str(elsewhere))
    assert code_hashes(["own_other"]) == before
    del sys.modules["own_other"]
    assert code_hashes(["own_other"]) != before


@pytest.mark.parametrize(
    ("edited", "counts"),
    [("own_mine/deeper/constants.py", True), ("own_mine/lazily.py", True), ("own_mine/unused.py", False)],
)
def test_what_is_edited_and_counts_changes_a_hash(home, edited, counts):
    before = code_hashes(["own_mine.lines"])
    (home / edited).write_text("slope = 2\n")
    assert (code_hashes(["own_mine.lines"]) != before) == counts


@pytest.mark.lane("numerics")
def test_installed_modules_stand_with_their_version_and_metadists_own_do_not(home):
    import hypothesis

    found = code_hashes(["hypothesis.strategies", "torch.nn.functional", "metadist.tasks.sinusoid", "json", "nowhere"])
    assert found == {"hypothesis": f"hypothesis {hypothesis.__version__}"}


def test_the_modules_of_a_config_are_those_that_can_change_the_parameters():
    class PlugIn:
        pass

    PlugIn.__module__ = "plugged.in"
    document = {
        "tasks": {"name": "own_mine.lines:Lines", "path": "s3://bucket/x"},
        "loss": "own_network:loss",
        "tracking": {"uri": "own_other:Tracker"},
    }
    assert code_modules(document, PlugIn()) == ("own_mine.lines", "own_network", "plugged.in")


def test_classes_of_a_script_are_hashed_by_their_source(home, monkeypatch):
    import own_other

    monkeypatch.setitem(sys.modules, "__main__", own_other)
    hashes = []
    for slope in (1, 1, 2):
        (home / "own_other.py").write_text(
            f"class Base:\n    slope = {slope}\nclass Lines(Base):\n    pass\n\n\nx = 1\n"
        )
        exec(compile((home / "own_other.py").read_text(), str(home / "own_other.py"), "exec"), vars(own_other))
        own_other.Base.__module__ = own_other.Lines.__module__ = "__main__"
        import linecache

        linecache.clearcache()
        hashes.append(main_hashes({"tasks": {"name": "__main__:Lines"}, "model": {"name": "__main__:nothing"}}))
    assert list(hashes[0]) == ["__main__:Lines"]
    assert hashes[0] == hashes[1] != hashes[2]


def test_our_own_code_has_a_hash():
    assert len(own_hash()) == 64
