"""Machines that lack a home, a user's name, a writable place, a wide terminal, a locale or a stdout."""

from __future__ import annotations

import getpass
import json
import os
import shutil
import stat
import subprocess
import sys
from pathlib import Path

import pytest
import tiny

from metadist.storage import places

ROOT = Path(__file__).parents[2]


@pytest.fixture
def homeless(monkeypatch, tmp_path):
    """No HOME, and a user's id without an entry in the table of users."""
    for name in ("HOME", "LOGNAME", "USER", "LNAME", "USERNAME", "METADIST_CACHE"):
        monkeypatch.delenv(name, raising=False)

    def missing(*_):
        raise KeyError("uid not found")

    monkeypatch.setattr("pwd.getpwuid", missing)
    monkeypatch.setattr(places.tempfile, "gettempdir", lambda: str(tmp_path))
    places.private_folder.cache_clear()
    yield tmp_path / f"metadist-{os.getuid()}"
    places.private_folder.cache_clear()


def test_without_a_home_there_is_a_private_folder(homeless, monkeypatch):
    assert places.home_folder() is None
    assert places.cache_root() == homeless / "cache"
    assert stat.S_IMODE(homeless.stat().st_mode) == 0o700
    monkeypatch.setenv("HOME", "")  # restored by monkeypatch, as LOGNAME below
    monkeypatch.delenv("HOME")
    monkeypatch.setenv("LOGNAME", "")
    places.provide_home()
    assert Path.home() == homeless
    assert getpass.getuser() == f"uid-{os.getuid()}"


@pytest.mark.parametrize("kind", ["open", "link", "file"])
def test_a_folder_that_others_could_have_made_is_not_used(homeless, tmp_path, kind):
    if kind == "open":
        homeless.mkdir(mode=0o777)
        homeless.chmod(0o777)
    elif kind == "link":
        (tmp_path / "elsewhere").mkdir(mode=0o700)
        homeless.symlink_to(tmp_path / "elsewhere")
    else:
        homeless.write_text("")
    found = places.private_folder()
    assert found != homeless
    assert stat.S_IMODE(found.stat().st_mode) == 0o700


def test_a_home_stays_and_a_read_only_one_is_not_written_to(monkeypatch, tmp_path):
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.delenv("METADIST_CACHE", raising=False)
    monkeypatch.setenv("MPLCONFIGDIR", "")
    monkeypatch.delenv("MPLCONFIGDIR")
    assert places.cache_root() == tmp_path / ".cache/metadist"
    places.provide_home()
    assert os.environ["HOME"] == str(tmp_path)
    assert "MPLCONFIGDIR" not in os.environ
    monkeypatch.setattr(places.os, "access", lambda path, mode: False)
    places.provide_home()
    assert os.environ["HOME"] == str(tmp_path), "credentials may lie there"
    assert os.environ["MPLCONFIGDIR"] == str(places.private_folder() / "matplotlib")
    assert places.cache_root() == places.private_folder() / "cache"
    assert list(tmp_path.iterdir()) == []


# The two commands of the README, in an environment like a container's ------------------------------------------------

#: a user's id that has no entry; it may read what root may read (the interpreter of this test), and write nowhere else
NOBODY = 54321
SHORT = ["outer.meta_steps=4", "evaluate.every=2", "evaluate.tasks=8", "evaluate.test_tasks=8", "engine.compile=never"]


def stranger(folder: Path, *command: str, home: Path | None = None, out: str = "-") -> subprocess.CompletedProcess[str]:
    """Run a command with ``env -i``, 80 columns and LANG=C, as a user without an entry; ``-`` closes stdout."""
    if os.getuid() != 0 or shutil.which("setpriv") is None:
        pytest.skip("needs root and setpriv, to become another user")
    folder.chmod(0o755)
    os.chown(folder, NOBODY, NOBODY)
    path = f"PATH={Path(sys.executable).parent}:/usr/bin:/bin"
    settings = [path, f"PYTHONPATH={ROOT}:{ROOT / 'tests'}", "LANG=C", "COLUMNS=80", f"TMPDIR={folder}"]
    settings += [f"HOME={home}"] if home else []
    user = ["setpriv", f"--reuid={NOBODY}", f"--regid={NOBODY}", "--clear-groups"]
    reads = ["--inh-caps=+dac_read_search", "--ambient-caps=+dac_read_search"]
    line = f'exec "$@" >&{out}' if out == "-" else f'exec "$@" >{out}'
    return subprocess.run(
        [*user, *reads, "env", "-i", *settings, "PYTHONDONTWRITEBYTECODE=1", "sh", "-c", line, "sh", *command],
        cwd=folder,
        stdin=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
        timeout=500,
    )


@pytest.fixture
def place(tmp_path):
    """A folder that every user can reach."""
    for folder in (tmp_path, *tmp_path.parents):
        if folder.stat().st_uid == os.getuid() and folder != Path("/tmp") and Path("/tmp") in folder.parents:
            folder.chmod(0o755)
    made = tmp_path / "the-temporary-folder-of-a-job-on-a-cluster"  # too long for the sockets of Ray
    made.mkdir()
    return made


@pytest.mark.lane("services")
@pytest.mark.parametrize("home", ["none", pytest.param("read-only", marks=pytest.mark.long)])
def test_the_train_command(place, tmp_path, home):
    (tmp_path / "home").mkdir(mode=0o755)
    train = [sys.executable, "-m", "metadist", "train", "sinusoid_maml", *SHORT, "--workers", "0", "--run-dir", "run"]
    done = stranger(place, *train, home=tmp_path / "home" if home == "read-only" else None)
    assert done.returncode == 0, done.stderr
    assert "Traceback" not in done.stderr
    assert "test on 8 tasks" in done.stderr
    assert json.loads((place / "run/result.json").read_text())["meta_step"] == 4
    assert (place / "runs/mlflow.db").exists()
    assert list((tmp_path / "home").iterdir()) == []


@pytest.mark.lane("services")
@pytest.mark.long
@pytest.mark.parametrize("home", ["none", "read-only"])
def test_the_train_command_with_ray(place, tmp_path, home):
    (tmp_path / "home").mkdir(mode=0o755)
    train = [sys.executable, "-m", "metadist", "train", "sinusoid_maml", *SHORT, "--workers", "2", "--run-dir", "run"]
    done = stranger(place, *train, home=tmp_path / "home" if home == "read-only" else None)
    assert done.returncode == 0, done.stderr
    assert json.loads((place / "run/result.json").read_text())["meta_step"] == 4
    tokens = [*place.glob("metadist-*/.ray/auth_token"), *place.glob("metadist-*/ray_auth_token")]
    assert len(tokens) == 1
    assert stat.S_IMODE(tokens[0].parents[home == "none"].stat().st_mode) == 0o700, "only its user reads the token"


@pytest.mark.lane("services")
@pytest.mark.long
def test_the_test_command(place):
    tests = [str(ROOT / "tests/core/test_tree_sum.py"), str(ROOT / "tests/config/test_config.py")]
    done = stranger(
        place, sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-m", "fast", *tests, out="report"
    )  # pytest needs a stdout
    assert done.returncode == 0, done.stderr


# Streams --------------------------------------------------------------------------------------------------------------


@pytest.mark.lane("services")
@pytest.mark.parametrize(
    "closed", [*(pytest.param(c, marks=pytest.mark.long) for c in (">&-", "2>&-")), "<&- >&- 2>&-"]
)
def test_closed_streams(tmp_path, closed):
    command = f"{sys.executable} -m metadist train {tiny.write(tmp_path)} --run-dir run --json {closed}"
    done = subprocess.run(
        ["sh", "-c", command], cwd=tmp_path, env=tiny.environment(tmp_path), capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr
    assert json.loads((tmp_path / "run/result.json").read_text())["meta_step"] == 6


@pytest.mark.lane("services")
@pytest.mark.long
def test_a_terminal_without_unicode(tmp_path):
    done = tiny.run(
        "train", tiny.write(tmp_path), "--run-dir", "run", folder=tmp_path, PYTHONIOENCODING="ascii", LC_ALL="C"
    )
    assert done.returncode == 0, done.stderr
    assert "adaptation steps" in done.stdout and "Traceback" not in done.stderr
    assert done.stdout.isascii()
