"""The adaptation service over gRPC and HTTP: the same answers as in this process, limits, and error messages."""

from __future__ import annotations

import base64
import inspect
import json
import re
import urllib.error
import urllib.request
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import grpc
import numpy as np
import pyarrow as pa
import pytest
import shaped
import tls
import torch
from outsiders import wait_for
from serving_toys import close, expected, served, tasks

from metadist import Client
from metadist.algorithms import MAML, ProtoNet
from metadist.cli.serve import serve as command
from metadist.core.errors import MetadistError
from metadist.core.model import Model
from metadist.core.outer import OuterLoop
from metadist.learners.few_shot import FewShotLearner
from metadist.rpc.channel import connect
from metadist.rpc.endpoint import Endpoint
from metadist.serving import adapt_pb2 as pb
from metadist.serving import adapt_pb2_grpc
from metadist.serving import load as serving
from metadist.serving.model import ServedModel
from metadist.serving.service import AdaptationService
from metadist.serving.tensors import from_reply, to_message
from metadist.testing.toys import Blobs

pytestmark = pytest.mark.lane("services")
OUTER = OuterLoop(meta_steps=1)


@pytest.fixture(scope="module")
def secrets(tmp_path_factory):
    return tls.make(tmp_path_factory.mktemp("tls"))


@pytest.fixture(scope="module")
def running(secrets):
    models = [
        served("maml", name="curves"),
        served("protonet", name="blobs", support=50),
        served("maml", "inductive", name="images"),
    ]
    service = AdaptationService(models, budget=20_000)
    with serving.serve(service, Endpoint(token_file=secrets.token, message_bytes=1 << 20), 0) as own:
        yield own


@pytest.fixture
def client(running, secrets):
    with Client(running.address, token_file=secrets.token) as own:
        yield own


@pytest.fixture
def ask(running, secrets):
    token = Path(secrets.token).read_text().strip()

    def ask(path, body=None, *, token=token, raw=None):
        """(status, JSON)"""
        data = raw if raw is not None else None if body is None else json.dumps(body).encode()
        headers = {"Authorization": f"Bearer {token}"} if token else {}
        try:
            with urllib.request.urlopen(
                urllib.request.Request(running.http_address + path, data, headers), timeout=120
            ) as answer:
                return answer.status, json.loads(answer.read())
        except urllib.error.HTTPError as error:
            return error.code, json.loads(error.read())

    return ask


@pytest.mark.parametrize("name", ["curves", "blobs", "images"])
def test_grpc_and_http_give_the_same_answer(running, client, ask, name):
    model = running.service.models[name]
    x, y, query = tasks(model, 1)[0]
    reference = expected(model, x, y, query)
    handle = client.adapt(x, y, model=name)
    assert torch.equal(client.predict(handle, query), reference)
    assert torch.equal(client.adapt_predict(x, y, query, model=name), reference)
    assert torch.equal(
        client.adapt_predict(x.numpy(), y.numpy().astype(y.numpy().dtype), query.double(), model=name), reference
    )
    lists = {"model": name, "x": x.tolist(), "y": y.tolist()}
    status, answer = ask("/v1/adapt_predict", {**lists, "query": query.tolist()})
    assert status == 200 and torch.equal(torch.tensor(answer["prediction"]), reference)
    status, adapted = ask("/v1/adapt", lists)
    packed = {
        "shape": list(query.shape),
        "dtype": "float32",
        "data": base64.b64encode(query.numpy().tobytes()).decode(),
    }
    status, answer = ask("/v1/predict", {"handle": adapted["handle"], "x": packed})
    assert status == 200 and torch.equal(torch.tensor(answer["prediction"]), reference)
    assert (
        client.forget(handle)
        and not client.forget(handle)
        and ask("/v1/forget", {"handle": adapted["handle"]})[1] == {"existed": True}
    )


def test_arrow_and_inner_steps(running, client, secrets):
    model = running.service.models["curves"]
    x, y, query = tasks(model, 1)[0]
    stub = adapt_pb2_grpc.AdaptationStub(connect(running.address, secrets.token))
    arrow = pb.AdaptPredictRequest(
        model="curves",
        x=to_message(x, arrow=True),
        y=to_message(y, arrow=True),
        query=to_message(query, arrow=True),
        arrow=True,
        inner_steps=4,
    )
    answer = stub.AdaptPredict(arrow).prediction
    assert torch.equal(from_reply(answer), expected(model, x, y, query, 4))
    flat = pa.FixedSizeListArray.from_arrays(pa.array(x.numpy().ravel()), 2)
    assert pa.ipc.open_stream(answer.arrow).read_all().num_rows == len(query) and len(flat) == len(x)
    assert not torch.equal(client.adapt_predict(x, y, query, model="curves", inner_steps=0), from_reply(answer))


def test_many_callers_with_different_support_sets(running, client, monkeypatch):
    """Sixteen simultaneous callers, three models and two sizes: fitting requests are batched, every answer is right."""
    batcher = running.service._batcher
    compute = batcher._compute

    def once_others_wait(key, items):
        """Wait for more requests than there are sizes, so that some have one size."""
        monkeypatch.undo()
        wait_for(lambda: sum(map(len, batcher._queues.values())) > 6)
        return compute(key, items)

    monkeypatch.setattr(batcher, "_compute", once_others_wait)
    given = [
        (name, *task) for name in ("curves", "blobs", "images") for task in tasks(running.service.models[name], 12)
    ]
    given = [(n, x[: len(x) - i % 2], y[: len(y) - i % 2], q) for i, (n, x, y, q) in enumerate(given)]
    before = client.statistics()
    with ThreadPoolExecutor(16) as pool:
        answers = list(pool.map(lambda g: client.adapt_predict(*g[1:], model=g[0]), given))
    for (name, x, y, query), answer in zip(given, answers):
        assert close(answer, expected(running.service.models[name], x, y, query))
    after = client.statistics()
    assert after["adaptations"] - before["adaptations"] == len(given)
    assert after["largest_batch"] > 1 and after["batches"] - before["batches"] < 2 * len(given)
    assert after["p99_ms"] >= after["p50_ms"] > 0


def test_metrics(running, client, ask, secrets):
    """gRPC and HTTP calls are counted by method and status, under the names of the dashboard in deploy/."""
    x, y, query = tasks(running.service.models["curves"], 1)[0]
    client.adapt_predict(x, y, query, model="curves")
    ask("/v1/adapt_predict", {"model": "nothing"}), ask("/v1/adapt_predict", {"model": "curves", "x": 1})
    request = urllib.request.Request(
        running.http_address + "/metrics",
        headers={"Authorization": f"Bearer {Path(secrets.token).read_text().strip()}"},
    )
    text = urllib.request.urlopen(request, timeout=120).read().decode()
    values = dict(line.rsplit(" ", 1) for line in text.splitlines() if not line.startswith("#"))
    for code in ("OK", "NOT_FOUND", "INVALID_ARGUMENT"):
        assert float(values[f'metadist_serve_calls_total{{code="{code}",method="AdaptPredict"}}']) >= 1
    assert float(values['metadist_serve_seconds_bucket{le="+Inf",method="AdaptPredict"}']) >= 3
    assert float(values["metadist_serve_adaptations_total"]) == running.service.adaptations
    dashboard = (Path(__file__).parents[2] / "deploy/grafana/metadist.json").read_text()
    drawn = set(re.findall(r"metadist_serve_\w+", dashboard))
    assert drawn and drawn <= {name.partition("{")[0] for name in values}


def test_evicted_handles_are_named(running, client, ask):
    x, y, query = tasks(running.service.models["curves"], 1)[0]
    first = client.adapt(x, y, model="curves")
    while client.statistics()["evictions"] == 0 or running.service.cache.get(first):
        client.adapt(x, y, model="curves")
        assert client.statistics()["handle_bytes"] <= 20_000
    with pytest.raises(MetadistError, match=r"evicted.*adapt again") as caught:
        client.predict(first, query)
    assert caught.value.code == grpc.StatusCode.NOT_FOUND
    assert ask("/v1/predict", {"handle": first, "x": query.tolist()})[0] == 404
    assert ask("/v1/models")[1]["statistics"]["evictions"] > 0


def test_more_than_the_budget_is_refused():
    service = AdaptationService([served()], budget=100)
    with serving.serve(service, Endpoint()) as own, Client(own.address) as client:
        x, y, query = tasks(served(), 1)[0]
        with pytest.raises(MetadistError, match="--budget-mib"):
            client.adapt(x, y)
        assert client.adapt_predict(x, y, query).shape == (4, 2)


X, Y = [[0.5, 1.0], [1.0, 2.0]], [[1.0, 1.0], [2.0, 2.0]]


@pytest.mark.parametrize(
    ("body", "words"),
    [
        ({"x": X}, "y: expected nested lists"),
        ({"x": X, "y": Y, "inner_steps": 101}, "0 to 100"),
        ({"x": X, "y": Y, "inner_steps": -1}, "0 to 100"),
        ({"x": X, "y": Y, "inner_steps": 1.5}, "whole number"),
        ({"x": X, "y": Y, "steps": 1}, "unknown key 'steps'"),
        ({"x": [[0.5, 1.0, 2.0]], "y": Y}, r"takes \[N, 2\]"),
        ({"x": [[0.5, 1.0], [1.0]], "y": Y}, "different lengths"),
        ({"x": [], "y": []}, "rows"),
        ({"x": "text", "y": Y}, "nested lists"),
        ({"x": [["a", "b"]], "y": Y}, "expected numbers"),
        ({"x": [[True, 1.0]], "y": Y}, "expected numbers"),
        ({"x": [[True, False]] * 2, "y": Y}, "holds bool; expected floating-point"),
        ({"x": {"shape": [2, 2], "dtype": "float32", "date": "AAAA"}, "y": Y}, "unknown key 'date'"),
        ({"x": X, "y": [[1.0, 1.0]]}, "with 2 rows of x"),
        ({"x": [[0.0, 0.0]] * 1001, "y": [[0.0, 0.0]] * 1001}, "1 to 1000"),
        ({"x": [[1e300, 1.0], [1.0, 2.0]], "y": Y}, "NaN or Inf"),
        ({"model": "curvs", "x": X, "y": Y}, "did you mean 'curves'"),
        ({"model": 5, "x": X, "y": Y}, "expected text"),
        ({"model": "blobs", "x": [[0.0] * 4] * 51, "y": [0] * 51}, "1 to 50"),
        ({"model": "blobs", "x": [[0.0] * 4], "y": [3]}, "class 3"),
        ({"model": "blobs", "x": [[0.0] * 4], "y": [-1]}, "class -1"),
        ({"model": "blobs", "x": [[0.0] * 4], "y": [0.5]}, "whole numbers"),
        ({"model": "blobs", "x": [[0.0] * 4], "y": [[0]]}, "y has shape"),
        ({"x": {"shape": [2, 2], "dtype": "float32", "data": "AAAA"}, "y": Y}, "takes 16 bytes, but data has 3"),
        ({"x": {"shape": [2, 2], "dtype": "object", "data": "AAAA"}, "y": Y}, "is not one of"),
        ({"x": {"shape": [2**40, 2], "dtype": "float32", "data": "AAAA"}, "y": Y}, "shape"),
        ({"x": {"shape": [2, 2], "dtype": "float32", "data": "?"}, "y": Y}, "base64"),
        ({"x": {"shape": "x"}, "y": Y}, "expected"),
    ],
)
def test_mistakes_are_named(ask, body, words):
    status, answer = ask("/v1/adapt", {"model": "curves", **body})
    assert status in (400, 404) and re.search(words, answer["error"]), answer


def test_malformed_requests(ask):
    nan = b'{"model": "curves", "x": [[NaN, 1.0]], "y": [[1.0, 1.0]]}'
    cases = [
        (b"{", 400, "not JSON"),
        (nan, 400, "finite"),
        (b"[" * 100_000, 400, "not JSON"),
        (b"[]", 400, "object"),
        (b" " * 2_000_000, 413, "1 MiB"),
    ]
    for raw, status, words in cases:
        got, answer = ask("/v1/adapt", raw=raw)
        assert got == status and words in answer["error"]
    assert ask("/v1/nothing")[0] == 404 and ask("/v1/adapt")[0] == 405
    assert ask("/v1/models", token=None)[0] == 401 and ask("/v1/models", token="x" * 32)[0] == 401


def test_wrong_tensors(running, secrets):
    """In the packed and the Arrow form, over gRPC: each is INVALID_ARGUMENT."""
    stub = adapt_pb2_grpc.AdaptationStub(connect(running.address, secrets.token))
    good, target = to_message(torch.zeros(2, 2)), to_message(torch.zeros(2, 2))
    zeros = pa.FixedSizeListArray.from_arrays(pa.array(np.zeros(4)), 2)
    sink = pa.BufferOutputStream()
    with pa.ipc.new_stream(
        sink, pa.schema([pa.field("x", zeros.type)]), options=pa.ipc.IpcWriteOptions(compression="zstd")
    ) as writer:
        writer.write_batch(pa.RecordBatch.from_arrays([zeros], names=["x"]))
    wrong = [
        pb.Tensor(),
        pb.Tensor(shape=[2, 2], dtype="float32", data=b"\0" * 15),
        pb.Tensor(shape=[2**31, 2**31, 2**31], dtype="float32", data=b"\0" * 16),
        pb.Tensor(shape=[-1, 2], dtype="float32", data=b"\0" * 16),
        pb.Tensor(shape=[1] * 9, dtype="float32", data=b"\0" * 4),
        pb.Tensor(shape=[10_000_000, 2], dtype="float32", data=b"\0" * 16),
        pb.Tensor(arrow=b"not arrow"),
        pb.Tensor(arrow=sink.getvalue().to_pybytes()),
        pb.Tensor(arrow=to_message(torch.zeros(2, 2), arrow=True).arrow, data=b"\0"),
        pb.Tensor(arrow=to_message(torch.zeros(2, 2), arrow=True).arrow, shape=[4, 2]),
        to_message(torch.tensor([[float("nan"), 1.0], [1.0, 1.0]])),
        to_message(torch.tensor([[float("nan"), 1.0], [1.0, 1.0]]), arrow=True),
        to_message(torch.zeros(2, 2, dtype=torch.uint8)),
    ]
    for tensor in wrong:
        with pytest.raises(grpc.RpcError) as caught:
            stub.Adapt(pb.AdaptRequest(model="curves", x=tensor, y=target))
        assert caught.value.code() == grpc.StatusCode.INVALID_ARGUMENT, tensor
    with pytest.raises(grpc.RpcError) as caught:
        stub.Adapt(pb.AdaptRequest(x=good, y=target))
    assert "name one of" in caught.value.details()
    assert stub.Adapt(pb.AdaptRequest(model="curves", x=good, y=target)).handle


def test_a_diverged_adaptation_is_refused(client):
    huge = torch.full((4, 2), 3e38)
    with pytest.raises(MetadistError, match="scaled as in training") as caught:
        client.adapt(huge, huge, model="curves", inner_steps=3)
    assert caught.value.code == grpc.StatusCode.FAILED_PRECONDITION


def pooled():
    return torch.nn.Sequential(torch.nn.AvgPool2d(21), torch.nn.Flatten(), torch.nn.Linear(48, 8))


def test_150_colour_images_in_one_call():
    """12.7 MB of queries, under the limit that ``metadist serve`` has; above a limit, the limit and the remedy."""
    limit = int(inspect.signature(command).parameters["max_message_mib"].default * 2**20)
    family = Blobs(input_shape=(3, 84, 84))
    learner = FewShotLearner(ProtoNet(), Model(pooled), family, OUTER)
    model = ServedModel("colours", learner, learner.initial(0))
    generator = torch.Generator().manual_seed(0)
    x, y = torch.rand(6, 3, 84, 84, generator=generator), torch.arange(6) % 3
    query = torch.rand(150, 3, 84, 84, generator=generator)
    reference = expected(model, x, y, query)
    with serving.serve(AdaptationService([model]), Endpoint(message_bytes=limit)) as own, Client(own.address) as client:
        assert torch.equal(client.adapt_predict(x, y, query), reference)
        assert torch.equal(client.predict(client.adapt(x, y), query), reference)
    with (
        serving.serve(AdaptationService([model]), Endpoint(message_bytes=8 << 20), 0) as own,
        Client(own.address) as client,
        pytest.raises(MetadistError) as caught,
    ):
        client.adapt_predict(x, y, query)
    assert "a message of 12.6 MiB is above the limit of 8 MiB; send fewer rows" in str(caught.value)
    assert "--max-message-mib 13)" in str(caught.value)


def test_token_ids_as_json():
    """Whole numbers stay whole numbers; the model's description says so."""
    learner = FewShotLearner(MAML(), Model(shaped.Reader), shaped.Tokens(), OUTER)
    model = ServedModel("reader", learner, learner.initial(0))
    model.warm_up()
    x, y, query = torch.arange(30).view(6, 5) % 20, torch.arange(6) % 3, torch.arange(10).view(2, 5)
    with serving.serve(AdaptationService([model]), Endpoint(), 0) as own, Client(own.address) as client:

        def ask(**body):
            data = json.dumps({"x": x.tolist(), "y": y.tolist(), "query": query.tolist(), **body}).encode()
            try:
                return json.loads(urllib.request.urlopen(f"{own.http_address}/v1/adapt_predict", data, 60).read())
            except urllib.error.HTTPError as error:
                return json.loads(error.read())

        reference = expected(model, x, y, query)
        assert torch.equal(torch.tensor(ask()["prediction"]), reference)
        assert torch.equal(client.adapt_predict(x, y, query), reference)
        assert re.search("expected whole numbers", ask(query=[[0.5] * 5])["error"])
        assert re.search("does not know", ask(query=[[20] * 5])["error"])
        about = client.models()[0]
        assert (about["input_shape"], about["input_dtype"], about["target_dtype"]) == ([5], "int64", "int64")


def test_prototypes_of_different_numbers_of_classes_in_one_batch():
    """Each support set gets its own classes, alone or beside others of its shape."""
    model = served("protonet")
    service = AdaptationService([model], max_wait=0.2)
    x, _, query = tasks(model, 1)[0]
    labels = [torch.arange(6) % 3, torch.arange(6) % 5, torch.arange(6), torch.arange(6) % 2]
    with serving.serve(service, Endpoint()) as own, Client(own.address) as client, ThreadPoolExecutor(8) as pool:
        answers = list(pool.map(lambda y: client.adapt_predict(x, y, query), labels * 2))
        assert [a.shape[1] for a in answers] == [3, 5, 6, 3] * 2
        for y, answer in zip(labels * 2, answers):
            assert close(answer, model.adapt_predict(x, y, query))
        handle = client.adapt(x, labels[2])
        assert client.predict(handle, query).shape == (6, 6)
        assert client.models()[0]["any_classes"]
    adapted = model.adapt([model.support(x, labels[2])], None)[0]
    assert torch.equal(
        model.predict([model.unpack(model.pack(adapted))], [query])[0], model.predict([adapted], [query])[0]
    )
