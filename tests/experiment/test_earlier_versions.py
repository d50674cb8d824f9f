"""Runs, exports and registered models of version 0.1 (commit 0b57b0b, tests/data/version_0_1): resumed, evaluated,
served alike.

Where this machine's numerics are those of the runs, their parameters are equal bit for bit; elsewhere closely, in
float64.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from tiny import train

from metadist.config.build import build
from metadist.config.document import override
from metadist.config.schema import parse_document
from metadist.experiment.evaluate import evaluate_run
from metadist.experiment.judging import EvaluationOptions
from metadist.experiment.load import load_run
from metadist.serving.load import open_model
from metadist.storage.checkpoints import load_parameters
from metadist.workers.fingerprint import numerics_fingerprint

FOLDER = Path(__file__).parents[1] / "data" / "version_0_1"
EXPECTED = json.loads((FOLDER / "expected.json").read_text())
X = torch.linspace(-2, 2, 10, dtype=torch.float64).unsqueeze(1)
QUERY = torch.linspace(-3, 3, 5, dtype=torch.float64).unsqueeze(1)


@pytest.fixture
def run(tmp_path):
    """``run(name)``: a copy of a run directory that the earlier version made."""
    return lambda name: str(shutil.copytree(FOLDER / name, tmp_path / name))


@pytest.fixture
def registered(tmp_path):
    """The weights of the MLflow model that the earlier version registered; the copy of its code is left out."""
    return FOLDER / "registered" / "data" / "data"


def same_numerics(run_dir):
    manifest = json.loads(next(Path(run_dir).glob("checkpoints/*/manifest.json")).read_text())
    here = numerics_fingerprint(torch.device("cpu"), torch.get_num_threads(), torch.float64)
    return manifest["run"]["fingerprint"]["id"] == here["id"]


@pytest.mark.parametrize(("name", "meta_steps"), [("sinusoid", 8), ("bandit", 4)])
def test_a_run_is_resumed_to_the_same_parameters(run, name, meta_steps):
    run_dir, same = run(name), same_numerics(FOLDER / name)
    document = parse_document((Path(run_dir) / "config.yaml").read_text(), "config.yaml")
    exact = [] if same else ["engine.exact=false"]
    changed = override(document, [f"outer.meta_steps={meta_steps}", "control.enabled=false", *exact])
    result = train(build(changed), run_dir=run_dir, resume=True, plots=False)
    assert result.outcome.progress.meta_step == meta_steps
    expected = EXPECTED[f"{name}_resumed"]
    assert result.evaluations[0].mean == pytest.approx(expected["mean"], rel=1e-9)
    if same:
        assert result.params_sha256 == expected["params_sha256"]


def test_a_run_is_evaluated_alike(run):
    judged = evaluate_run(run("sinusoid"), EvaluationOptions(tasks=32, workers="0")).evaluations[0]
    assert judged.protocol["task_list_sha256"] == EXPECTED["sinusoid_evaluated"]["task_list_sha256"]
    assert judged.mean == pytest.approx(EXPECTED["sinusoid_evaluated"]["mean"], rel=1e-9)


def test_a_run_adapts_and_predicts_alike(run):
    result = load_run(run("sinusoid"))
    assert result.params_sha256 == EXPECTED["sinusoid"]["params_sha256"]
    result.experiment.learner.prepare(torch.device("cpu"))
    predicted = result.predict(result.adapt(X, torch.sin(X)), QUERY)
    assert predicted[:, 0].tolist() == pytest.approx(EXPECTED["query"], rel=1e-9)


def test_an_export_holds_the_parameters_of_the_run_and_is_served(run):
    best = load_run(run("sinusoid"))
    exported = load_parameters(FOLDER / "export.safetensors")
    assert {n: t.tolist() for n, t in exported.items()} == {
        n: t.tolist() for n, t in best.experiment.learner.parameters(best.state).items()
    }
    model = open_model(str(FOLDER / "export.safetensors"))
    phi = model.learner.adapt(model.state, support(), None)
    predicted = model.learner.predict(model.state, phi, QUERY, support())
    assert predicted[:, 0].tolist() == pytest.approx(EXPECTED["query"], rel=1e-9)


def support():
    from metadist.core.task import Examples

    return Examples(X, torch.sin(X))


def test_a_registered_model_loads_under_the_name_that_stands_in_it(registered):
    from importlib import import_module

    import yaml

    described = yaml.safe_load((FOLDER / "registered" / "MLmodel").read_text())
    loader = import_module(described["flavors"]["python_function"]["loader_module"])
    predict = loader._load_pyfunc(str(registered)).predict
    inputs = {"support_x": X.numpy(), "support_y": np.sin(X.numpy()), "query_x": QUERY.numpy()}
    assert predict(inputs, {"inner_steps": 10})[:, 0].tolist() == pytest.approx(EXPECTED["registered"], rel=1e-9)


@pytest.mark.lane("services")  # importing MLflow opens a socket
def test_mlflow_itself_loads_the_registered_model():
    import mlflow.pyfunc

    inputs = {"support_x": X.numpy(), "support_y": np.sin(X.numpy()), "query_x": QUERY.numpy()}
    predicted = mlflow.pyfunc.load_model(str(FOLDER / "registered")).predict(inputs, params={"inner_steps": 10})
    assert predicted[:, 0].tolist() == pytest.approx(EXPECTED["registered"], rel=1e-9)
