"""A run keeps the classes of its splits and what its data passed over: in its directory, its log and in MLflow."""

from __future__ import annotations

import json
import logging
from pathlib import Path

import mlflow
import numpy as np
import pytest
import torch
from PIL import Image

import metadist
from metadist.core.errors import ConfigError, DataError
from metadist.core.task import Examples, Task, TaskFamily
from metadist.tasks.image_folder import ImageFolder

SHORT = metadist.EvaluateSettings(every=1, tasks=2, test_tasks=2)


def folder(root: Path) -> Path:
    generator = np.random.default_rng(0)
    for name in ("Train/a", "Train/b", "Train/é", "Val/c", "Val/d", "Test/e", "Test/f", "Test/$g_1$"):
        (root / name).mkdir(parents=True)
        for j in range(3):
            Image.fromarray(generator.integers(0, 256, (8, 8), dtype=np.uint8)).save(root / name / f"{j}.png")
    (root / "Train" / "a" / ".ipynb_checkpoints").mkdir()
    (root / "Train" / "a" / "more.heic").touch()
    return root


def network() -> torch.nn.Module:
    return torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(64, 8))


@pytest.mark.renders
@pytest.mark.lane("services")
def test_splits_and_notes_of_a_run(tmp_path, empty_store, monkeypatch, caplog):
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("METADIST_RUNS", raising=False)
    monkeypatch.setenv("METADIST_CACHE", str(tmp_path / "cache"))
    empty_store(tmp_path / "runs/mlflow.db")
    tasks = ImageFolder(path=str(folder(tmp_path / "set")), image_size=8, n_way=2)
    with caplog.at_level(logging.WARNING):
        result = metadist.train(
            tasks=tasks,
            model=network,
            algorithm=metadist.ProtoNet(),
            outer=metadist.OuterLoop(meta_batch_size=2, meta_steps=1),
            evaluate=SHORT,
            workers=0,
        )
    splits = {"train": ["a", "b", "é"], "validation": ["c", "d"], "test": ["$g_1$", "e", "f"]}
    note = "passed over 1 file of other kinds (.heic 1), 1 hidden files and folders (.ipynb_checkpoints 1)"
    run = Path(result.run_dir)
    assert json.loads((run / "splits.json").read_text()) == splits
    assert json.loads((run / "run.json").read_text())["data_notes"] == [note]
    assert [r.getMessage() for r in caplog.records if "hidden" in r.getMessage()] == [f"data: {note}"]
    assert (run / "plots" / "episode.png").stat().st_size > 0, "a class name with dollar signs can be drawn"

    client = mlflow.MlflowClient(f"sqlite:///{tmp_path}/runs/mlflow.db")
    (found,) = client.search_runs([e.experiment_id for e in client.search_experiments()])
    assert found.data.tags["metadist.data_notes"] == note
    copy = client.download_artifacts(found.info.run_id, "splits.json", str(tmp_path))
    assert json.loads(Path(copy).read_text()) == splits

    again = ImageFolder(path=str(tmp_path / "set"), image_size=8, n_way=2, split_list=str(run / "splits.json"))
    assert {s: list(names) for s, names in again.splits().items()} == splits, "the file serves as a split list"


class Leaky(TaskFamily):
    """A family of one's own whose test classes include a training class."""

    input_shape = (1,)
    kind = "classification"
    outputs = 2

    def splits(self):
        return {"train": ["cat", "dog"], "validation": ["fox"], "test": ["dog", "hen"]}

    def sample_task(self, key, split):
        x = torch.randn(4, 1, generator=key.generator())
        y = torch.tensor([0, 1, 0, 1])
        return Task(Examples(x, y), Examples(x, y))


@pytest.mark.lane("services")  # a family of the user's own is sampled in another process too
def test_splits_that_share_a_class_are_refused():
    with pytest.raises(ConfigError, match="'dog' is in the train split and in the test split of 'Leaky'"):
        metadist.train(tasks=Leaky(), model=lambda: torch.nn.Linear(1, 2), algorithm=metadist.MAML(), workers=0)


def test_a_list_with_a_class_twice_is_refused(tmp_path, monkeypatch):
    monkeypatch.setenv("METADIST_CACHE", str(tmp_path / "cache"))
    (tmp_path / "list.json").write_text('{"train": ["a", "b"], "validation": ["c", "d"], "test": ["e", "f", "b"]}')
    family = ImageFolder(path=str(folder(tmp_path / "set")), image_size=8, split_list=str(tmp_path / "list.json"))
    with pytest.raises(DataError, match="class 'b' is in the train split and again in test"):
        family.prepare(torch.device("cpu"))


def test_names_of_the_classes_of_a_task(tmp_path, monkeypatch):
    monkeypatch.setenv("METADIST_CACHE", str(tmp_path / "cache"))
    family = ImageFolder(path=str(folder(tmp_path / "set")), image_size=8, n_way=3, k_shot=1, query_shots=2)
    key = metadist.TaskKey.of(3, "test", 0, [5])
    pixels = family.source().pixels.astype(np.float32) / 255
    start = {n: sum(family.source().counts[:i]) for i, n in enumerate(family.source().names)}
    names = family.task_classes(key.each()[0], "test")
    assert sorted(names) == ["$g_1$", "e", "f"]
    for label, name in enumerate(names):
        drawn = family.sample(key, "test").support.x[0, label].numpy()
        assert any(np.allclose(drawn, p) for p in pixels[start[name] : start[name] + 3])
