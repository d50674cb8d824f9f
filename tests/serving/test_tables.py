"""Tables from training to prediction: by a run, by an exported file without the table, by a server."""

from __future__ import annotations

import csv
import json

import numpy as np
import pytest
import torch
from serving_toys import served
from tiny import train
from typer.testing import CliRunner

from metadist.cli.app import app
from metadist.config.build import build
from metadist.rpc.endpoint import Endpoint
from metadist.serving.load import Serving, build_service, serve

pytestmark = pytest.mark.lane("services")


def write(path, rows):
    with open(path, "w", newline="") as file:
        csv.writer(file).writerows(rows)


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    """A table of lines, a run on it, its export (the table is gone), and the rows of a new task."""
    folder, rng = tmp_path_factory.mktemp("tables"), np.random.default_rng(0)
    rows = [["unit", "x", "colour", "y", "high"]]
    for unit in range(40):
        slope, start = rng.normal(2), rng.normal(100, 10)
        for _ in range(9):
            x = rng.uniform(0, 5)
            y = start + slope * x
            rows.append([f"u{unit}", x, rng.choice(["red", "blue"]), y, "yes" if x > 2.5 else "no"])
    write(folder / "units.csv", rows)
    document = {
        "name": "units",
        "tasks": {"name": "table_regression", "path": str(folder / "units.csv"), "task": "unit", "target": "y"}
        | {"features": ["x", "colour"]},
        "model": {"name": "mlp", "hidden": [16], "init": "torch"},
        "algorithm": {"name": "maml", "inner_steps": 3, "inner_lr": 0.05},
        "outer": {"meta_batch_size": 4, "meta_steps": 3},
        "evaluate": {"every": 3, "tasks": 4, "test_tasks": 4},
        "workers": [{"max": 0, "min": 0}],
        "tracking": {"uri": "none"},
    }
    run = train(build(document), run_dir=str(folder / "run"), plots=False)
    run.export(folder / "model.safetensors")
    chosen = {"name": "table_classification", "target": "high", "features": ["x"]}
    other = {**document, "name": "high", "tasks": {**document["tasks"], **chosen}}
    train(build(other), run_dir=str(folder / "high"), plots=False).export(folder / "high.safetensors")
    (folder / "units.csv").rename(folder / "moved.csv")
    return folder, run


def predicted(*arguments):
    done = CliRunner().invoke(app, ["predict", *map(str, arguments), "--json"])
    assert done.exit_code == 0, done.output
    return json.loads(done.stdout.strip().splitlines()[-1])


def new_unit(folder):
    write(folder / "few.csv", [["colour", "x", "y"], ["red", 1.0, 101.0], ["blue", 3.0, 104.0], ["red", 4.0, 106.0]])
    write(folder / "more.csv", [["x", "colour"], [2.0, "blue"], [5.0, "red"]])
    return folder / "few.csv", folder / "more.csv"


def test_an_export_predicts_in_the_units_of_the_table_without_it(home):
    folder, run = home
    few, more = new_unit(folder)
    report = predicted(folder / "model.safetensors", "--support", few, "--query", more)
    encoding = run.experiment.learner.tasks.encoded
    x = torch.tensor([[1.0, 0.0, 1.0], [3.0, 1.0, 0.0], [4.0, 0.0, 1.0]], dtype=torch.float64)
    q = torch.tensor([[2.0, 1.0, 0.0], [5.0, 0.0, 1.0]], dtype=torch.float64)
    y = torch.tensor([[101.0], [104.0], [106.0]], dtype=torch.float64)
    for t in (x, q):
        t[:, 0] = (t[:, 0] - encoding.mean[0]) / encoding.deviation[0]
    y = (y - encoding.target_mean[0]) / encoding.target_deviation[0]
    direct = run.predict(run.adapt(x.float(), y.float()), q.float()).double().numpy()
    expected = direct * encoding.target_deviation[0] + encoding.target_mean[0]
    assert [row["predicted"][0] for row in report["predictions"]] == pytest.approx(expected[:, 0].tolist(), rel=1e-5)
    assert "mae" not in report


def test_where_the_query_has_the_target_the_error_is_told(home):
    folder, _ = home
    few, _ = new_unit(folder)
    report = predicted(folder / "model.safetensors", "--support", few, "--query", few)
    found = [row["predicted"][0] for row in report["predictions"]]
    assert report["mae"] == pytest.approx(float(np.abs(np.array(found) - [101.0, 104.0, 106.0]).mean()), rel=1e-6)


def test_a_server_predicts_the_same(home):
    folder, _ = home
    few, more = new_unit(folder)
    here = predicted(folder / "model.safetensors", "--support", few, "--query", more)
    with serve(build_service(Serving((str(folder / "model.safetensors"),))), Endpoint()) as server:
        there = predicted(server.address, "--support", few, "--query", more)
    for a, b in zip(here["predictions"], there["predictions"]):
        assert a["predicted"] == pytest.approx(b["predicted"], rel=1e-5)


def test_classes_keep_their_names(home):
    folder, _ = home
    write(folder / "labelled.csv", [["x", "high"], [1.0, "no"], [4.0, "yes"]])
    report = predicted(
        folder / "high.safetensors", "--support", folder / "labelled.csv", "--query", folder / "labelled.csv"
    )
    assert report["classes"] == ["no", "yes"] and report["accuracy"] in (0.0, 0.5, 1.0)
    assert {row["predicted"] for row in report["predictions"]} <= {"no", "yes"}


def refused(*arguments):
    done = CliRunner().invoke(app, ["predict", *map(str, arguments)])
    assert done.exit_code == 2, done.output
    assert "Traceback" not in done.output
    return " ".join(done.output.split())


def test_mistakes_are_named(home):
    folder, _ = home
    few, more = new_unit(folder)
    write(folder / "wrong.csv", [["x", "color", "y"], [1.0, "red", 2.0]])
    write(folder / "holes.csv", [["x", "colour", "y"], ["", "red", 2.0], [1.0, "red", 2.0]])
    model = folder / "model.safetensors"
    assert "no column 'colour'" in refused(model, "--support", folder / "wrong.csv", "--query", more)
    assert "no column 'y'" in refused(model, "--support", more, "--query", more)
    assert "'x' has no value in 1 of 2 rows" in refused(model, "--support", folder / "holes.csv", "--query", more)
    assert "no such folder or file" in refused(model, "--support", folder / "nothing.csv", "--query", more)
    high = folder / "high.safetensors"
    write(folder / "third.csv", [["x", "high"], [1.0, "no"], [4.0, "perhaps"]])
    assert "the class 'perhaps'; the model knows no, yes" in refused(
        high, "--support", folder / "third.csv", "--query", more
    )


def test_a_model_of_arrays_refuses_a_table(home, monkeypatch):
    folder, _ = home
    few, more = new_unit(folder)
    monkeypatch.setattr("metadist.serving.prediction.open_model", lambda *_, **__: served())
    assert "was not trained on tables" in refused("model.safetensors", "--support", few, "--query", more)
