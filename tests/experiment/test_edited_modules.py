"""A user's module that is edited between two attempts of a run: refused, or allowed and marked."""

from __future__ import annotations

import json
import logging
import sys

import pytest
import tiny

from metadist.config.build import build
from metadist.core.errors import CheckpointError
from metadist.experiment.load import load_run

pytestmark = pytest.mark.lane("services")  # a family of the user's own is sampled in another process too

SOURCE = """
from dataclasses import dataclass
from edited_scale import SCALE
from metadist import Sinusoid
from metadist.core.task import Examples, Task

@dataclass(frozen=True, kw_only=True)
class Scaled(Sinusoid):
    def sample(self, keys, split):
        task = super().sample(keys, split)
        return Task(*(Examples(e.x, SCALE * e.y) for e in (task.support, task.query)))
"""


@pytest.fixture
def run(tmp_path, monkeypatch):
    """``run(scale, steps)`` trains with a module of that content, as a new process would import it."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.setattr(sys, "dont_write_bytecode", True)  # a cached module of the same second would be taken
    (tmp_path / "edited_tasks.py").write_text(SOURCE)

    def forget():
        for name in ("edited_tasks", "edited_scale"):
            sys.modules.pop(name, None)

    def train(scale, steps, *overrides):
        forget()
        (tmp_path / "edited_scale.py").write_text(f"SCALE = {scale}\n")
        document = tiny.document("tasks.name=edited_tasks:Scaled", f"outer.meta_steps={steps}", *overrides)
        return tiny.train(build(document), run_dir=str(tmp_path / "run"), resume=True, plots=False)

    yield train
    forget()


def manifest(folder):
    newest = max(folder.glob("run/checkpoints/*/manifest.json"))
    return json.loads(newest.read_text())["run"]


def test_the_hashes_stand_in_the_manifest_and_an_edited_module_is_refused(run, tmp_path):
    run(1.0, 2)
    assert list(manifest(tmp_path)["modules"]) == ["edited_scale", "edited_tasks"]
    assert run(1.0, 4).inexact == []
    with pytest.raises(CheckpointError) as error:
        run(2.0, 6)
    assert str(error.value).startswith(
        "--resume: module 'edited_scale' was edited since the checkpoint of meta-step 4 (sha256 "
    )
    assert "engine.same_code=false" in str(error.value) and "\n" not in str(error.value)
    result = run(1.0, 6)
    assert result.outcome.progress.meta_step == 6 and result.inexact == []


@pytest.mark.long
def test_an_edit_that_the_user_allows_marks_the_run(run, tmp_path):
    run(1.0, 2)
    result = run(2.0, 4, "engine.same_code=false")
    assert result.inexact == ["module edited_scale was edited before meta-step 2"]
    assert manifest(tmp_path)["inexact"] == result.inexact
    assert run(2.0, 6).inexact == result.inexact, "from now on the new code is that of the run"


def test_loading_with_an_edited_module_warns(run, tmp_path, caplog):
    run(1.0, 2)
    (tmp_path / "edited_scale.py").write_text("SCALE = 3.0\n")
    with caplog.at_level(logging.WARNING):
        load_run(str(tmp_path / "run"), trust=["edited_tasks"])
    assert "was trained with other code of edited_scale, which was edited since" in caplog.text


def test_a_checkpoint_without_hashes_is_resumed(run, tmp_path, monkeypatch):
    """Version 0.1 wrote none."""
    from metadist.experiment.attempt import Attempt

    facts = Attempt.facts
    without = lambda self, workers: {n: v for n, v in facts(self, workers).items() if n != "modules"}  # noqa: E731
    monkeypatch.setattr(Attempt, "facts", without)
    run(1.0, 2)
    assert "modules" not in manifest(tmp_path)
    monkeypatch.setattr(Attempt, "facts", facts)
    run(2.0, 4)
    assert list(manifest(tmp_path)["modules"]) == ["edited_scale", "edited_tasks"]
