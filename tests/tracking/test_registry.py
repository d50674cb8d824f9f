"""Registered models, with a real store: versions, aliases by a rule, and what a loaded model answers."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

pytest.importorskip("mlflow")

import mlflow
import mlflow.entities.model_registry
import shaped
from tiny import train

import metadist
from metadist.config.build import build
from metadist.config.document import override, read_document
from metadist.core.errors import ConfigError
from metadist.experiment.load import load_run
from metadist.experiment.registration import register_run
from metadist.tracking.model_registry import _beats


def trained(folder: Path, *overrides: str) -> metadist.experiment.result.Result:
    small = [
        "outer.meta_steps=4",
        "evaluate.every=2",
        "evaluate.tasks=20",
        "evaluate.test_tasks=10",
        "workers=[]",
        *overrides,
    ]
    document = override(read_document("sinusoid_maml"), small)
    return train(build(document), run_dir=str(folder), plots=False)


@pytest.fixture
def root(tmp_path, monkeypatch, empty_store):
    empty_store(tmp_path / "mlflow.db")
    monkeypatch.setenv("METADIST_RUNS", str(tmp_path))
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    before = mlflow.get_tracking_uri()
    mlflow.set_tracking_uri(f"sqlite:///{tmp_path}/mlflow.db")
    yield tmp_path
    mlflow.set_tracking_uri(before)


@pytest.mark.lane("services")
def test_the_best_run_is_champion_and_answers_as_it_does_in_process(root):
    trained(root / "a")
    assert register_run(str(root / "a"), "sinus") == "1"
    assert register_run(str(root / "a"), "sinus") == "1"  # again: no second version
    trained(root / "b", "outer.lr=0.0", "outer.ema=0.5")  # learns nothing
    assert register_run(str(root / "b"), "sinus") == "2"
    client = mlflow.MlflowClient()
    assert client.get_model_version_by_alias("sinus", "candidate").version == 2
    kinds = {v.version: v.tags["metadist.weights"] for v in client.search_model_versions("name='sinus'")}
    assert kinds == {1: "trained", 2: "averaged"}
    scores = {v.version: float(v.tags["metadist.validation"]) for v in client.search_model_versions("name='sinus'")}
    champion = client.get_model_version_by_alias("sinus", "champion").version
    assert scores[champion] == min(scores.values())

    loaded, ours = mlflow.pyfunc.load_model("models:/sinus/1"), load_run(str(root / "a"))
    x = np.linspace(-5, 5, 10, dtype=np.float32)[:, None]
    y, query = np.sin(x), np.linspace(-4, 4, 7, dtype=np.float32)[:, None]
    for steps in (0, 1, 3):
        answer = loaded.predict({"support_x": x, "support_y": y, "query_x": query}, params={"inner_steps": steps})
        adapted = ours.adapt(torch.from_numpy(x), torch.from_numpy(y), inner_steps=steps)
        np.testing.assert_allclose(answer, ours.predict(adapted, torch.from_numpy(query)).numpy(), rtol=0, atol=1e-6)

    from metadist.serving.load import open_model

    registered = open_model("models:/sinus@candidate")
    assert (registered.source, registered.weights) == (load_run(str(root / "b")).run_id, "averaged")
    with pytest.raises(ConfigError, match="models:/nothing@champion"):
        open_model("models:/nothing@champion")


@pytest.mark.lane("services")
@pytest.mark.long
def test_a_model_goes_to_the_store_of_its_run_whatever_was_opened_before(root, empty_store, monkeypatch):
    """MLflow keeps one registry for the whole process, and opening a model once set it."""
    from metadist.serving.load import open_model

    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)  # which MLflow's set_tracking_uri sets
    first = trained(root / "a")
    register_run(str(root / "a"), "sinus")
    assert open_model("models:/sinus@candidate").source == first.run_id
    (root / "other").mkdir()
    empty_store(root / "other/mlflow.db")
    monkeypatch.setenv("METADIST_RUNS", str(root / "other"))
    second = trained(root / "other/b")
    register_run(str(root / "other/b"), "waves")
    assert open_model("models:/waves@candidate").source == second.run_id
    with pytest.raises(ConfigError, match="models:/sinus@candidate"):
        open_model("models:/sinus@candidate")
    assert open_model("models:/waves/latest").source == open_model("models:/waves/1").source == second.run_id
    assert mlflow.get_registry_uri() == mlflow.get_tracking_uri(), "nothing is set for the rest of the process"


@pytest.mark.lane("services")
@pytest.mark.parametrize(
    ("tasks", "model", "y", "query", "shape"),
    [
        ("Flat", "flat_net", np.zeros(6, np.float32), np.zeros((4, 2), np.float32), (-1,)),
        ("Three", "three_net", np.zeros((6, 3), np.float32), np.zeros((4, 2), np.float32), (-1, 3)),
        ("Tokens", "Reader", np.arange(6) % 3, np.zeros((4, 5), np.int64), (-1, 3)),
    ],
)
def test_targets_and_inputs_of_every_kind_are_registered(root, tasks, model, y, query, shape, monkeypatch):
    """The MLflow signature is that of the tasks, and the loaded model answers as the run."""
    experiment = metadist.compose(
        tasks=getattr(shaped, tasks)(),
        model=getattr(shaped, model),
        algorithm=metadist.MAML(),
        outer=metadist.OuterLoop(meta_steps=1, meta_batch_size=2, shard_size=2),
        evaluate=metadist.EvaluateSettings(tasks=2, test_tasks=2, every=1),
        engine=metadist.EngineSettings(compile="never"),
        tracking=metadist.TrackingSettings(register=f"own_{tasks}"),
    )
    result = train(experiment, run_dir=str(root / "own"), plots=False)
    monkeypatch.setenv("METADIST_TRUST", shaped.__name__)  # the model names parts of that module
    loaded = mlflow.pyfunc.load_model(f"models:/own_{tasks}/1")
    assert [tuple(spec.shape) for spec in loaded.metadata.signature.outputs] == [shape]
    x = np.zeros((6, *query.shape[1:]), query.dtype)
    answer = loaded.predict({"support_x": x, "support_y": y, "query_x": query})
    reference = result.predict(result.adapt(torch.from_numpy(x), torch.from_numpy(y)), torch.from_numpy(query))
    np.testing.assert_allclose(answer, reference.numpy(), rtol=1e-6)
    assert answer.shape[1:] == shape[1:]


@pytest.mark.parametrize(
    ("score", "higher", "wins"), [(0.9, True, True), (0.7, True, False), (0.7, False, True), (0.8, True, False)]
)
def test_the_champion_falls_to_a_better_one_only(score, higher, wins):
    champion = mlflow.entities.model_registry.ModelVersion("m", "1", 0, tags=[])
    champion._tags = {"metadist.protocol": "p", "metadist.validation": "0.8"}
    assert _beats({"protocol": "p", "score": score, "higher_is_better": higher}, champion) is wins
    assert not _beats({"protocol": "other", "score": score, "higher_is_better": higher}, champion)


def test_a_name_that_cannot_be_registered_is_refused_at_once(root):
    with pytest.raises(ConfigError, match="tracking.register: 'a/b'"):
        trained(root / "a", "tracking.register=a/b")


@pytest.mark.lane("services")
@pytest.mark.long
@pytest.mark.timeout(1800)
def test_a_fresh_environment_loads_it(root):
    """Nothing but what the model's own requirements name; metadist itself comes with the model."""
    trained(root / "a", "tracking.register=sinus")
    python = root / "venv/bin/python"
    subprocess.run([sys.executable, "-m", "venv", str(root / "venv")], check=True)
    model = next(root.glob("mlartifacts/**/MLmodel")).parent
    subprocess.run([python, "-m", "pip", "install", "--quiet", "-r", str(model / "requirements.txt")], check=True)
    code = (
        "import mlflow, numpy as np; m = mlflow.pyfunc.load_model('models:/sinus@champion'); x = np.linspace(-5, 5, "
        "10, dtype=np.float32)[:, None]; "
        "print(m.predict({'support_x': x, 'support_y': np.sin(x), 'query_x': x}).shape)"
    )
    environment = {n: v for n, v in os.environ.items() if n not in ("PYTHONPATH", "METADIST_DATA")}
    done = subprocess.run(
        [python, "-c", code],
        cwd=root,
        env={**environment, "MLFLOW_TRACKING_URI": f"sqlite:///{root}/mlflow.db"},
        capture_output=True,
        text=True,
    )
    assert done.stdout.strip() == "(10, 1)", done.stderr[-2000:]
