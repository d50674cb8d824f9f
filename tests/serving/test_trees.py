"""Models with any inputs and outputs: a run, its export, both protocols, the command line and the registry agree."""

from __future__ import annotations

import contextlib
import json
import urllib.request

import numpy as np
import pytest
import tiny
import torch
from wide import CASES, document

import metadist
from metadist.config.build import build
from metadist.core.differences import flat
from metadist.core.errors import ConfigError, DataError
from metadist.core.random import TaskKey
from metadist.core.signature import InvalidInput, TensorKind
from metadist.core.tree import arrays, as_lists, at, named, of_names
from metadist.experiment.load import load_run
from metadist.experiment.registration import fetch_registered, register_run
from metadist.rpc.endpoint import Endpoint
from metadist.serving import adapt_pb2 as pb
from metadist.serving.load import Serving, build_service, open_model, serve
from metadist.serving.prediction import ModelSource, predict_arrays
from metadist.serving.tensors import to_message, tree_from_json, tree_from_message

pytestmark = [pytest.mark.lane("services"), pytest.mark.filterwarnings("ignore")]
TRUST = ("wide",)


class Case:
    """A trained run with its export, and a held-out task."""

    def __init__(self, name, folder):
        self.name, self.run_dir, self.exported = name, str(folder / name), str(folder / f"{name}.safetensors")
        self.result = tiny.train(build(document(name)), run_dir=self.run_dir, plots=False)
        self.result.export(self.exported)
        tasks = self.result.experiment.learner.sample(TaskKey.of(7, "test", 0, [0]))
        self.x, self.y, self.query, self.truth = (
            at(part, 0) for part in (tasks.support.x, tasks.support.y, tasks.query.x, tasks.query.y)
        )

    @property
    def expected(self):
        return self.result.predict(self.result.adapt(self.x, self.y), self.query)


@pytest.fixture(scope="module")
def cases(tmp_path_factory):
    folder = tmp_path_factory.mktemp("trees")
    found = {"dict": Case("dict", folder)}
    with pytest.MonkeyPatch.context() as patch:  # one new process of Python is enough
        patch.setattr("metadist.experiment.train.compared_elsewhere", lambda experiment: contextlib.nullcontext())
        return found | {name: Case(name, folder) for name in CASES if name != "dict"}


@pytest.fixture(scope="module")
def running(cases):
    """One server with every case, half of them from their runs and half from their exports."""
    places = [case.run_dir if i % 2 else case.exported for i, case in enumerate(cases.values())]
    sources = tuple(f"{name}={place}" for name, place in zip(cases, places))
    with serve(build_service(Serving(sources, trust=TRUST)), Endpoint(), 0) as running:
        yield running


def same(found, expected):
    found, expected = named(found), named(expected)
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        torch.testing.assert_close(found[name].double(), tensor.double(), rtol=1e-5, atol=1e-6)


def test_json_of_truth_values_and_of_large_numbers():
    kinds = {"mask": TensorKind((2,), torch.bool), "scale": TensorKind((), torch.float32)}

    def read(mask, scale):
        return tree_from_json("x", {"mask": mask, "scale": scale}, kinds, lambda part, shape: None)

    found = read([[True, False], [False, False]], [1, 2])
    assert found["mask"].dtype == torch.bool and found["mask"].tolist() == [[True, False], [False, False]]
    assert found["scale"].dtype == torch.float64
    assert read([[1, 0]], [True])["scale"].dtype == torch.bool  # refused with all other wrong dtypes
    with pytest.raises(InvalidInput, match="x.scale: expected numbers, found bool"):
        read([[1, 0]], [1.5, True])
    with pytest.raises(InvalidInput, match="x.mask: a number is too large"):
        read([[2**70, 1]], [1.0])


@pytest.mark.parametrize(
    "given", ["text", None, {"a": "text"}, [torch.ones(2), torch.ones(3)], np.array([{}]), [[1, 2], [3]]]
)
def test_what_is_no_array_is_refused_in_one_line(given):
    """``Result.adapt`` and the client convert what they are given."""
    with pytest.raises(ConfigError, match="expected a tensor, an array of numbers, or a dict or tuple"):
        arrays(given)


def test_names_of_places_that_are_written_otherwise_are_no_tuple():
    for names in (["00"], ["0", "01"], ["0", "2"], ["١"]):
        with pytest.raises(ValueError, match="places"):
            of_names(dict.fromkeys(names, torch.ones(1)))


def test_a_message_of_one_tensor_and_of_several():
    kinds = {"mask": TensorKind((2,), torch.bool)}
    part = to_message(torch.ones(1, 2, dtype=torch.bool))
    assert bool(tree_from_message("x", pb.Tensor(tensors={"mask": part}), kinds, lambda *_: None)["mask"].all())
    for more in ({"shape": [1, 2]}, {"dtype": "bool"}, {"data": b"11"}, {"arrow": b"1"}):
        with pytest.raises(InvalidInput, match="x: give one tensor, or several"):
            tree_from_message("x", pb.Tensor(tensors={"mask": part}, **more), kinds, lambda *_: None)


def post(running, call, body):
    request = urllib.request.Request(f"{running.http_address}/v1/{call}", json.dumps(body).encode())
    with urllib.request.urlopen(request, timeout=60) as reply:
        return json.load(reply)


@pytest.mark.parametrize("name", CASES)
def test_grpc(name, cases, running):
    case = cases[name]
    with metadist.Client(running.address) as client:
        same(client.adapt_predict(case.x, case.y, case.query, model=name), case.expected)
        handle = client.adapt(*(torch.utils._pytree.tree_map(np.asarray, t) for t in (case.x, case.y)), model=name)
        same(client.predict(handle, case.query), case.expected)
        about = next(m for m in client.models() if m["name"] == name)
    assert [t["name"] for t in about["inputs"]] == list(named(case.x))
    assert [t["shape"] for t in about["predictions"]] == [list(t.shape[1:]) for t in named(case.expected).values()]


@pytest.mark.parametrize("name", CASES)
def test_http(name, cases, running):
    case = cases[name]
    x, y, query = (as_lists(tree) for tree in (case.x, case.y, case.query))
    found = post(running, "adapt_predict", {"model": name, "x": x, "y": y, "query": query})["prediction"]
    handle = post(running, "adapt", {"model": name, "x": x, "y": y})["handle"]
    assert post(running, "predict", {"handle": handle, "x": query})["prediction"] == found
    expected = as_lists(case.expected)
    flatten = torch.utils._pytree.tree_leaves
    np.testing.assert_allclose(flatten(found), flatten(expected), rtol=1e-5, atol=1e-6)
    assert torch.utils._pytree.tree_structure(found) == torch.utils._pytree.tree_structure(expected)


@pytest.mark.parametrize("name", CASES)
def test_runs_and_exports_are_the_same_model(name, cases):
    case = cases[name]
    loaded = load_run(case.run_dir, trust=TRUST)
    assert loaded.recorded == case.result.signature
    same(loaded.predict(loaded.adapt(case.x, case.y), case.query), case.expected)
    for source in (case.run_dir, case.exported):
        model = open_model(source, trust=TRUST)
        same(model.adapt_predict(case.x, case.y, case.query), case.expected)
        support, query = model.support(case.x, case.y), model.inputs("query", case.query)
        adapted = model.adapt([support] * 3, None)
        for prediction in model.predict(adapted, [query] * 3):  # several requests together
            same(prediction, case.expected)
        same(model.predict([model.unpack(model.pack(adapted[0]))], [query])[0], case.expected)


@pytest.mark.parametrize("name", ["dict", "tuple", "flat"])
def test_arrays_of_files(name, cases, tmp_path):
    case = cases[name]
    np.savez(tmp_path / "support.npz", **{n: t.numpy() for n, t in flat({"x": case.x, "y": case.y}).items()})
    np.savez(tmp_path / "query.npz", **{n: t.numpy() for n, t in flat({"x": case.query, "y": case.truth}).items()})
    source = ModelSource(case.exported, trust=TRUST)
    report = predict_arrays(source, str(tmp_path / "support.npz"), str(tmp_path / "query.npz"))
    for row, found in enumerate(report["predictions"]):
        flatten = torch.utils._pytree.tree_leaves
        np.testing.assert_allclose(flatten(found["predicted"]), flatten(as_lists(at(case.expected, row))), rtol=1e-5)
    assert ("mse" in report) == (name != "tuple")


@pytest.mark.parametrize(
    ("y", "message"),
    [
        (np.array([[0], [1], [0], [1]]), r"y has shape \[4, 1\]; expected classes \[4\]"),
        (np.eye(2)[[0, 1, 0, 1]], r"y has shape \[4, 2\]"),
        (np.array(1), "y has no rows and x 4"),
        (np.array([0, 1]), "y has 2 rows and x 4"),
    ],
)
def test_true_classes_of_another_shape_are_refused(y, message, cases, tmp_path):
    """Those in a column were broadcast against the predicted ones, and gave a wrong accuracy."""
    case = cases["output"]
    np.savez(tmp_path / "support.npz", **{n: t.numpy() for n, t in flat({"x": case.x, "y": case.y}).items()})
    np.savez(tmp_path / "query.npz", y=y, **{n: t.numpy() for n, t in flat({"x": case.query}).items()})
    with pytest.raises(DataError, match=message):
        predict_arrays(
            ModelSource(case.exported, trust=TRUST), str(tmp_path / "support.npz"), str(tmp_path / "query.npz")
        )


def test_requests_that_do_not_fit(cases, running):
    case = cases["dict"]
    with metadist.Client(running.address) as client:
        for x, words in (
            (case.x["tokens"], "x is one tensor; the model takes tensors mask, scale, tokens"),
            ({**case.x, "scale": case.x["scale"][:2]}, "the tensors of x differ in rows"),
            ({**case.x, "tokens": case.x["tokens"] + 100}, "x holds a number that the model does not know"),
        ):
            with pytest.raises(metadist.MetadistError, match=words):
                client.adapt(x, case.y, model="dict")
        with pytest.raises(metadist.MetadistError, match="x is tensors a; the model takes one tensor"):
            client.adapt({"a": cases["lstm"].x}, case.y, model="lstm")
    with pytest.raises(urllib.error.HTTPError) as error:
        post(running, "adapt", {"model": "dict", "x": {"tokens": [[1, 2, 3]], "more": [1]}, "y": [[1.0]]})
    assert "x is tensors more, tokens; the model takes tensors mask, scale, tokens" in error.value.read().decode()
    with pytest.raises(InvalidInput, match="x has 5 rows|y has shape|y is tensors|differ"):
        case.result.adapt(case.x, case.y[:-1])


@pytest.mark.parametrize(
    "name", [pytest.param(n, marks=() if n in ("dict", "gaussian") else pytest.mark.long) for n in CASES]
)
def test_the_registry(name, cases, tmp_path, monkeypatch, empty_store):
    mlflow = pytest.importorskip("mlflow")
    case = cases[name]
    empty_store(tmp_path / "mlflow.db")
    monkeypatch.setenv("METADIST_RUNS", str(tmp_path))
    monkeypatch.setenv("METADIST_TRUST", "wide")
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    store, before = f"sqlite:///{tmp_path}/mlflow.db", mlflow.get_tracking_uri()
    tracked = {**document(name), "tracking": {"uri": store, "register": "wide"}}
    monkeypatch.setattr("metadist.experiment.train.compared_elsewhere", lambda experiment: contextlib.nullcontext())
    try:
        mlflow.set_tracking_uri(store)
        result = tiny.train(build(tracked), run_dir=str(tmp_path / "run"), plots=False)
        assert register_run(str(tmp_path / "run"), "wide", TRUST) == "1"
        model = mlflow.pyfunc.load_model("models:/wide@champion")
        parts = {"support_x": case.x, "support_y": case.y, "query_x": case.query}
        found = model.predict({n: t.numpy() for n, t in flat(parts).items()})
        expected = result.predict(result.adapt(case.x, case.y), case.query)
        same(torch.as_tensor(found) if isinstance(found, np.ndarray) else by_name(found), by_name(named(expected)))
        fetched = open_model(fetch_registered("models:/wide@champion"), trust=TRUST)
        same(fetched.adapt_predict(case.x, case.y, case.query), expected)
    finally:
        mlflow.set_tracking_uri(before)


def by_name(found):
    """Return arrays by name as one tree: a place in a tuple is no name of a dict."""
    tensors = {f"part_{n}": torch.as_tensor(t) for n, t in found.items()}
    return tensors["part_"] if list(tensors) == ["part_"] else tensors
