"""A user's own family is sampled in another process too, before a run begins."""

from __future__ import annotations

import logging
import sys
import threading

import pytest
import tiny

import metadist
from metadist.config.build import build
from metadist.core.errors import ConfigError
from metadist.core.task import Examples, Task
from metadist.tasks import Sinusoid

pytestmark = pytest.mark.lane("services")

SOURCE = """
import os, random
from dataclasses import dataclass
from metadist import Sinusoid
from metadist.core.task import Examples, Task

AT_IMPORT = random.random()

class Shifted(Sinusoid):
    def shift(self):
        return 0.0
    def sample(self, keys, split):
        task = super().sample(keys, split)
        return Task(task.support, Examples(task.query.x, task.query.y + self.shift()))

class Sound(Shifted):
    pass
class Hashed(Shifted):
    def shift(self):
        return hash("salt") % 1000 / 1000
class ByPid(Shifted):
    def shift(self):
        return os.getpid() % 1009
class AtImport(Shifted):
    def shift(self):
        return AT_IMPORT
class Prepared(Shifted):
    def prepare(self, device):
        object.__setattr__(self, "drawn", random.random())
    def shift(self):
        return self.drawn
class Built(Shifted):
    def __post_init__(self):
        object.__setattr__(self, "drawn", random.random())
    def shift(self):
        return self.drawn
"""


@pytest.fixture(scope="module")
def module(tmp_path_factory):
    folder = tmp_path_factory.mktemp("own")
    (folder / "elsewhere_tasks.py").write_text(SOURCE)
    sys.path.insert(0, str(folder))
    yield "elsewhere_tasks"
    sys.path.remove(str(folder))
    sys.modules.pop("elsewhere_tasks", None)


def train(tmp_path, name):
    return tiny.train(
        build(tiny.document(f"tasks={{name: '{name}'}}", "outer.meta_steps=1")), run_dir=str(tmp_path / "r")
    )


@pytest.mark.parametrize("name", ["Hashed", "ByPid", "AtImport", "Prepared", "Built"])
def test_what_depends_on_the_process_is_refused(tmp_path, module, name):
    with pytest.raises(ConfigError) as error:
        train(tmp_path, f"{module}:{name}")
    assert str(error.value).startswith(
        f"tasks: '{name}' gives other train tasks (query.y) in another process: the SHA-"
    )
    assert "key.generator()" in str(error.value) and "\n" not in str(error.value)
    assert not (tmp_path / "r").exists()


def test_a_sound_family_passes(tmp_path, module, caplog):
    assert train(tmp_path, f"{module}:Sound").outcome.progress.meta_step == 1
    assert "another process" not in caplog.text


class Local(Sinusoid):
    def __init__(self, shift=0.0):
        super().__init__()
        object.__setattr__(self, "given", shift)

    def sample(self, keys, split):
        task = super().sample(keys, split)
        return Task(task.support, Examples(task.query.x, task.query.y + self.given))


def test_objects_made_in_python_are_sent_as_they_are(tmp_path, caplog):
    """Their config does not hold the constructor's arguments. What can't be sent is not compared, with a warning."""

    def trained(tasks, folder):
        made = {"model": metadist.MLP(hidden=(4,)), "algorithm": metadist.MAML(), "tracking": "none"}
        outer = metadist.OuterLoop(meta_steps=1, meta_batch_size=2)
        return metadist.train(tasks=tasks, outer=outer, run_dir=str(tmp_path / folder), **made)

    trained(Local(shift=2.0), "a")
    assert "another process" not in caplog.text
    locked = Local(shift=2.0)
    object.__setattr__(locked, "lock", threading.Lock())
    with caplog.at_level(logging.WARNING):
        trained(locked, "b")
    assert "not compared with those of another process: TypeError" in caplog.text


def test_own_simulators_are_rolled_out_in_another_process(tmp_path, monkeypatch):
    pytest.importorskip("gymnasium", reason="needs gymnasium: pip install 'metadist[rl]'")
    (tmp_path / "own_points.py").write_text(
        "import os\nfrom own_environments import Point\n\n\nclass Local(Point):\n"
        "    def step(self, action):\n        observation, reward, *rest = super().step(action)\n"
        "        return observation, reward + os.getpid(), *rest\n"
    )
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.syspath_prepend(str(__file__.replace("experiment/test_other_process.py", "environments")))
    document = {
        "environment": {"name": "gymnasium", "make": "own_points:Local", "episodes": 2, "horizon": 4},
        "model": {"name": "gru", "hidden": 4},
        "algorithm": {"name": "rl2", "minibatches": 1},
        "outer": {"meta_batch_size": 2, "shard_size": 1, "meta_steps": 1},
        "tracking": {"uri": "none"},
    }
    with pytest.raises(ConfigError, match=r"environment: 'own_points:Local' gives other trials \(reward\) in another"):
        tiny.train(build(document), run_dir=str(tmp_path / "r"))
