"""A run as users of MLflow expect it: inputs, tags, a description, the best score, groups of charts."""

from __future__ import annotations

import json
import subprocess

import pytest
import tiny

pytestmark = pytest.mark.lane("services")


@pytest.fixture
def client(tmp_path, monkeypatch, empty_store):
    monkeypatch.setenv("METADIST_RUNS", str(tmp_path / "runs"))
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    empty_store(tmp_path / "runs/mlflow.db")
    from mlflow.tracking import MlflowClient

    return MlflowClient(tracking_uri=f"sqlite:///{tmp_path}/runs/mlflow.db")


def only_run(client):
    [experiment] = [e for e in client.search_experiments() if e.name == "metadist"]
    [run] = client.search_runs([experiment.experiment_id])
    return experiment, run


def test_the_page_of_a_run(tmp_path, monkeypatch, client):
    work = tmp_path / "work"
    work.mkdir()
    git = ["git", "-C", str(work), "-c", "user.name=a", "-c", "user.email=a@b"]
    subprocess.run([*git, "init", "-q"], check=True)
    (work / "mine.py").write_text("a = 1\n")
    subprocess.run([*git, "add", "."], check=True)
    subprocess.run([*git, "commit", "-qm", "mine"], check=True)
    commit = subprocess.run([*git, "rev-parse", "HEAD"], check=True, capture_output=True, text=True).stdout.strip()
    monkeypatch.chdir(work)
    # An experiment of an earlier version lacks the kind.
    client.create_experiment("metadist")
    result = tiny.train(tiny.experiment("tracking.uri=auto"), run_dir=str(tmp_path / "run"))
    experiment, run = only_run(client)
    assert experiment.tags["mlflow.experimentKind"] == "custom_model_development"
    tags = run.data.tags
    assert tags["mlflow.source.git.commit"] == tags["git.revision"] == commit, "the user's, not metadist's"
    assert tags["metadist.params_sha256"] == result.params_sha256
    note = tags["mlflow.note.content"]
    assert f"test mse {result.evaluations[0].score:.4f}" in note
    assert result.run_dir in note and result.params_sha256 in note
    scores = [v["mean"] for v in result.outcome.progress.validation]
    best = [m.value for m in client.get_metric_history(run.info.run_id, "eval/validation/mse/best")]
    assert best == [min(scores[: i + 1]) for i in range(len(scores))]
    [used] = run.inputs.dataset_inputs
    assert used.dataset.name == "sinusoid" and used.dataset.source_type == "code"
    assert json.loads(used.dataset.profile)["k_shot"] == "4"
    assert [t.value for t in used.tags if t.key == "mlflow.data.context"] == ["training"]
    groups = {key.partition("/")[0] for key in run.data.metrics}
    assert groups <= {"meta", "eval", "engine", "system"}


def test_data_is_an_input_with_its_hash(tmp_path, monkeypatch, client):
    import numpy as np
    from PIL import Image

    for label in range(10):
        (tmp_path / f"images/class{label}").mkdir(parents=True)
        for index in range(3):
            pixels = np.random.default_rng(label * 3 + index).integers(0, 255, (8, 8), dtype=np.uint8)
            Image.fromarray(pixels).save(tmp_path / f"images/class{label}/{index}.png")
    monkeypatch.setenv("METADIST_CACHE", str(tmp_path / "cache"))
    tasks = f"tasks={{name: image_folder, path: '{tmp_path}/images', n_way: 2, k_shot: 1, image_size: 8}}"
    document = tiny.experiment("tracking.uri=auto", tasks)
    result = tiny.train(document, run_dir=str(tmp_path / "run"), plots=False)
    _, run = only_run(client)
    sha = document.learner.data_sha256
    assert run.data.tags["metadist.data_sha256"] == sha
    [used] = run.inputs.dataset_inputs
    assert used.dataset.digest == sha[:36]
    assert json.loads(used.dataset.source)["uri"] == f"{tmp_path}/images"
    again = tiny.train(document, run_dir=str(tmp_path / "run"), plots=False, resume=True)
    assert again.run_id == result.run_id
    assert len(only_run(client)[1].inputs.dataset_inputs) == 1, "a resumed run has it once"
