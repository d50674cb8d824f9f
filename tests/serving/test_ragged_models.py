"""A run whose tasks have 2 to 5 classes: adapted, exported, served over gRPC and HTTP, and registered."""

from __future__ import annotations

import json
import urllib.request

import pytest
import tiny
import torch
from tiny import train

import metadist
from metadist.core.errors import ConfigError
from metadist.experiment.load import load_run
from metadist.experiment.registration import register_run
from metadist.rpc.endpoint import Endpoint
from metadist.serving.load import Serving, build_service, open_model, serve

pytestmark = pytest.mark.lane("services")
SETTINGS = (
    "tasks={name: 'ragged:Shades'}",
    "model.hidden=[16]",
    "outer.meta_steps=4",
    "outer.shard_size=4",
    "evaluate={every: 2, tasks: 12, test_tasks: 12, inner_steps: 1}",
)


@pytest.fixture(autouse=True)
def trusted(monkeypatch):
    """Trust the module of the family, which configs of runs and exports name."""
    monkeypatch.setenv("METADIST_TRUST", "ragged")


def support(classes, shots=2):
    """Return x, y and queries of ``classes`` classes."""
    generator = torch.Generator().manual_seed(classes)
    patterns = torch.rand(classes, 1, 8, 8, generator=generator)
    y = torch.arange(classes).repeat(shots)
    x = patterns[y] + 0.1 * torch.randn(len(y), 1, 8, 8, generator=generator)
    return x, y, patterns[torch.tensor([1, 0, 1])]


def over_http(address, x, y, query):
    body = {"x": x.tolist(), "y": y.tolist(), "query": query.tolist()}
    headers = {"Content-Type": "application/json"}
    request = urllib.request.Request(f"{address}/v1/adapt_predict", json.dumps(body).encode(), headers)
    with urllib.request.urlopen(request) as answer:
        return torch.tensor(json.load(answer)["prediction"])


@pytest.mark.parametrize("algorithm", ["maml", "protonet"])
def test_any_number_of_classes_everywhere(algorithm, tmp_path):
    name = ["algorithm={name: protonet}", "evaluate.inner_steps=null"] if algorithm == "protonet" else []
    trained = train(tiny.experiment(*SETTINGS, *name), run_dir=str(tmp_path / "run"), plots=False)
    (score,) = trained.evaluations
    assert sum(row["tasks"] for row in score.by_ways) == 12
    result = load_run(str(tmp_path / "run"))
    result.export(tmp_path / "model.safetensors")
    asked = {classes: support(classes) for classes in (2, 3, 5)}
    expected = {n: result.predict(result.adapt(x, y), query) for n, (x, y, query) in asked.items()}
    assert {n: tuple(p.shape) for n, p in expected.items()} == {n: (3, n) for n in asked}
    assert all(bool(p.isfinite().all()) for p in expected.values())
    for source in (str(tmp_path / "run"), f"other={tmp_path}/model.safetensors"):
        model = open_model(source)
        for n, (x, y, query) in asked.items():
            assert torch.equal(model.adapt_predict(x, y, query), expected[n])
        service = build_service(Serving((source,)))
        with serve(service, Endpoint(), 0) as running, metadist.Client(running.address) as client:
            for n, (x, y, query) in asked.items():
                assert torch.equal(client.adapt_predict(x, y, query), expected[n])
                assert torch.equal(client.predict(client.adapt(x, y), query), expected[n])
                assert torch.allclose(over_http(running.http_address, x, y, query), expected[n])
            x, y, query = support(6)
            if algorithm == "maml":
                with pytest.raises(metadist.MetadistError, match="expected 5 classes"):
                    client.adapt_predict(x, y, query)
            else:
                assert client.adapt_predict(x, y, query).shape == (3, 6)
    x, y, _ = support(3)
    with pytest.raises(ConfigError, match="not every class below it"):
        result.adapt(x[y != 1], y[y != 1])


def test_requests_of_different_numbers_of_classes_are_computed_together(tmp_path):
    train(tiny.experiment(*SETTINGS), run_dir=str(tmp_path / "run"), plots=False)
    model = open_model(str(tmp_path / "run"))
    some = {n: support(n) for n in (2, 4)}
    adapted = [model.adapt([model.support(x, y)], None)[0] for x, y, _ in some.values()]
    found = model.predict(adapted, [query for *_, query in some.values()])
    for prediction, (x, y, query) in zip(found, some.values()):
        torch.testing.assert_close(prediction, model.adapt_predict(x, y, query), rtol=1e-5, atol=1e-6)
    assert torch.equal(model.predict([model.unpack(model.pack(adapted[0]))], [some[2][2]])[0], found[0][:, :2])


def test_a_registered_model(tmp_path, monkeypatch, empty_store):
    mlflow = pytest.importorskip("mlflow")
    empty_store(tmp_path / "mlflow.db")
    monkeypatch.setenv("METADIST_RUNS", str(tmp_path))
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    before = mlflow.get_tracking_uri()
    mlflow.set_tracking_uri(f"sqlite:///{tmp_path}/mlflow.db")
    try:
        settings = (*SETTINGS, f"tracking.uri=sqlite:///{tmp_path}/mlflow.db")
        result = train(tiny.experiment(*settings), run_dir=str(tmp_path / "run"), plots=False)
        assert register_run(str(tmp_path / "run"), "shades") == "1"
        loaded = mlflow.pyfunc.load_model("models:/shades/1")
        for n in (2, 5):
            x, y, query = support(n)
            answer = loaded.predict({"support_x": x.numpy(), "support_y": y.numpy(), "query_x": query.numpy()})
            torch.testing.assert_close(torch.as_tensor(answer), result.predict(result.adapt(x, y), query))
    finally:
        mlflow.set_tracking_uri(before)
