"""The modules that a job ships: those that the config names and the user lists; errors and notes for all others."""

from __future__ import annotations

import sys

import pytest
import yaml
from own_modules import own_modules

from metadist.core.errors import ConfigError
from metadist.jobs import submit as jobs
from metadist.jobs.modules import own_names, shipment

CONFIG = {
    "name": "lines",
    "tasks": {"name": "mine.lines:Lines"},
    "model": {"name": "network:build"},
    "loss": "torch.nn.functional:l1_loss",
}
FILES = {
    "mine/__init__.py": "",
    "mine/lines.py": "import os, torch\nfrom mine.deeper import slope\nfrom . import deeper\n\n\nclass Lines: ...\n",
    "mine/deeper/__init__.py": "slope = 1\n",
    "mine/data/loaders.py": "",
    "mine/broken.py": "def (:\n",
    "mine/.hidden/x.py": "import other",
    "mine/notes.txt": "",
    "network.py": "import sibling\n\n\ndef build(): ...\n",
    "sibling.py": "from cousins.first import name\n",
    "cousins/first.py": "name = 1\n",
    "other.py": "",
    ".git/config": "",
    "runs/a/run.json": "{}",
}
PACKAGE = ["mine/__init__.py", "mine/broken.py", "mine/data/loaders.py", "mine/deeper/__init__.py", "mine/lines.py"]


@pytest.fixture
def home(tmp_path, monkeypatch):
    """A package and a module that the config names, modules that these import, and files that must stay."""
    with own_modules(tmp_path, FILES, monkeypatch) as folder:
        yield folder


def shipped(document, *listed):
    return sorted(shipment(document, listed).files.values())


def test_named_and_listed_modules_are_shipped_whole(home):
    with jobs.working_directory({**CONFIG, "init_from": None}, ["sibling", "cousins.first"]) as folder:
        found = sorted(str(p.relative_to(folder)) for p in folder.rglob("*") if p.is_file())
        assert found == ["config.yaml", "cousins/first.py", *PACKAGE, "network.py", "sibling.py"]
        assert (folder / "mine/lines.py").read_text() == FILES["mine/lines.py"]
        assert yaml.safe_load((folder / "config.yaml").read_text())["tasks"] == CONFIG["tasks"]
    assert not folder.exists()


def test_nothing_is_shipped_because_it_was_imported(home):
    import mine.lines
    import other  # noqa: F401

    assert shipped({"tasks": {"name": "mine.lines:Lines"}}) == PACKAGE
    assert mine.lines.slope == 1


def test_an_import_that_only_this_machine_has_is_an_error_that_names_all_of_them(home):
    with pytest.raises(ConfigError) as error:
        shipment(CONFIG)
    assert str(error.value) == (
        "sibling.py imports 'cousins', network.py imports 'sibling': the job would not have these modules of this "
        "machine; add --module cousins --module sibling"
    )
    with pytest.raises(ConfigError, match="sibling.py imports 'cousins'.* add --module cousins$"):
        shipment(CONFIG, ["sibling"])


@pytest.mark.parametrize(
    "text",
    [
        "def later():\n    import sibling\n",
        "try:\n    import sibling.deep as s\nexcept ImportError:\n    s = None\n",
        "if True:\n    from sibling import x\n",
    ],
)
def test_imports_anywhere_in_a_file_count(home, text):
    (home / "network.py").write_text(text)
    with pytest.raises(ConfigError, match="network.py imports 'sibling'"):
        shipment(CONFIG)


def test_imports_for_type_checkers_and_of_nothing_do_not_count(home):
    (home / "network.py").write_text(
        "import typing\nif typing.TYPE_CHECKING:\n    import sibling\n"
        "try:\n    import never_heard_of\nexcept ImportError: ...\n"
    )
    assert "sibling.py" not in shipped(CONFIG)


@pytest.mark.lane("numerics")
def test_installed_modules_are_noted_once(home, caplog):
    site = home / "site-packages"
    (site / "vendor").mkdir(parents=True)
    (site / "vendor/__init__.py").write_text("")
    (site / "known.py").write_text("")
    sys.path.insert(0, str(site))
    try:
        (home / "network.py").write_text("import vendor, torch, yaml, json, metadist\n")
        config = {**CONFIG, "metric": "known:metric"}
        assert shipment(config).notes == [
            "known is not shipped: the nodes must have it installed",
            "network.py imports vendor, which is not shipped: the nodes must have it installed",
        ]
        with jobs.working_directory(config):
            assert "known is not shipped" in caplog.text
        with pytest.raises(
            ConfigError, match="--module vendor: 'vendor' is installed; install it on the nodes instead"
        ):
            shipment(config, ["vendor"])
    finally:
        sys.path.remove(str(site))


def test_compiled_modules_are_noted(home):
    import importlib.machinery

    suffix = importlib.machinery.EXTENSION_SUFFIXES[0]
    (home / f"fast{suffix}").write_bytes(b"")
    (home / f"mine/inner{suffix}").write_bytes(b"")
    (home / "network.py").write_text("import fast\n")
    inner, fast = shipment(CONFIG).notes
    assert inner.endswith(f"mine/inner{suffix} is not shipped: it is compiled; install it on the nodes")
    assert fast == "network.py imports fast, which is not shipped: the nodes must have it installed"
    assert shipment({"loss": "fast:loss"}).notes == ["fast is not shipped: the nodes must have it installed"]
    with pytest.raises(ConfigError, match="--module fast: 'fast' is compiled"):
        shipment(CONFIG, ["fast"])


def test_a_package_without_init_is_shipped(home):
    assert shipped({"tasks": {"name": "cousins.first:Tasks"}}) == ["cousins/first.py"]


@pytest.mark.parametrize(
    ("listed", "says"),
    [
        (
            "nowhere",
            "--module nowhere: there is no module 'nowhere'; expected a file or package in the working directory",
        ),
        ("a b", "--module a b: expected the name of a module or package"),
        ("other.py", "--module other.py: expected the name of a module or package"),
        ("torch", "--module torch: 'torch' is installed"),
        ("json", "--module json: 'json' is installed"),
    ],
)
def test_listed_modules_that_cannot_be_shipped(home, listed, says):
    with pytest.raises(ConfigError) as error:
        shipment({}, [listed])
    assert says in str(error.value)


def test_names_that_are_no_modules(home):
    assert shipped({"tracking": {"uri": "file:runs"}, "init_from": "s3://b/a", "a": "http://x:1"}) == []
    assert own_names(CONFIG) == ["mine", "network"]
