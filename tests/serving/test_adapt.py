"""The adaptation service: the same answers as in this process, single and batched, over gRPC and HTTP."""

from __future__ import annotations

import base64
import json
import pickle
import re
import threading
import urllib.error
import urllib.request
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import grpc
import numpy as np
import pyarrow as pa
import pytest
import tls
import torch
from outsiders import wait_for
from serving_toys import SUPERVISED, close, expected, served, tasks

from metadist import Client
from metadist.core.errors import ConfigError, MetadistError
from metadist.core.task import Examples
from metadist.rpc.channel import connect
from metadist.rpc.endpoint import Endpoint
from metadist.rpc.grpc_guard import Refused
from metadist.serving import adapt_pb2 as pb
from metadist.serving import adapt_pb2_grpc
from metadist.serving import load as serving
from metadist.serving.batching import Batcher
from metadist.serving.cache import HandleCache, SharedCache
from metadist.serving.model import AdaptedParameters
from metadist.serving.service import AdaptationService
from metadist.serving.tensors import from_reply, to_message

pytestmark = pytest.mark.lane("services")

KINDS = [(name, "transductive") for name in SUPERVISED] + [("maml", "inductive"), ("reptile", "inductive")]


def test_the_table_of_algorithms_is_complete():
    assert set(SUPERVISED) == {"anil", "cnp", "maml", "meta_sgd", "protonet", "reptile"}


@pytest.mark.parametrize(("algorithm", "normalization"), KINDS)
def test_batched_results_equal_single_ones(algorithm, normalization):
    """Adaptations to several support sets under one vmap, and predictions with them, equal those one by one."""
    model = served(algorithm, normalization)
    given = tasks(model, 7)
    supports = [Examples(x, y) for x, y, _ in given]
    together = model.adapt(supports, None)
    predictions = model.predict(together, [query for _, _, query in given])
    for (x, y, query), adapted, prediction in zip(given, together, predictions):
        assert isinstance(adapted, AdaptedParameters)
        alone = expected(model, x, y, query)
        assert close(prediction, alone)
        assert torch.equal(
            model.predict(model.adapt([Examples(x, y)], None), [query])[0], alone
        )  # a single request gives the same bits
    spread = torch.stack(predictions).std(0).max()
    assert spread > 1e-3  # different support sets give different answers


def test_the_bytes_of_adapted_parameters_are_counted():
    """They hold no view of the batch's memory; θ's own tensors (ANIL's body, a prototype's network) cost nothing."""
    for algorithm in ("maml", "anil", "protonet"):
        model = served(algorithm)
        own = {t.untyped_storage().data_ptr() for t in model.state.slots.values()}
        adapted = model.adapt([Examples(x, y) for x, y, _ in tasks(model, 4)], None)
        leaves = [t for t in torch.utils._pytree.tree_leaves(adapted[0].phi) if isinstance(t, torch.Tensor)]
        mine = [t for t in leaves if t.untyped_storage().data_ptr() not in own]
        assert adapted[0].bytes == sum(t.untyped_storage().nbytes() for t in mine) > 0
        assert (len(mine) < len(leaves)) == (algorithm != "maml")


def test_a_batch_that_is_too_large_is_split():
    model = served(batch_elements=30)
    given = tasks(model, 5)
    assert model.together(given[0][0].numel()) == 2
    for (x, y, query), adapted in zip(given, model.adapt([Examples(x, y) for x, y, _ in given], None)):
        assert close(model.predict([adapted], [query])[0], expected(model, x, y, query))


def test_an_algorithm_that_vmap_cannot_return_is_computed_one_by_one(caplog):
    model = served()
    given = tasks(model, 3)
    adapt = type(model.learner.algorithm).adapt

    class Odd(type(model.learner.algorithm)):
        def adapt(self, *arguments):
            return [{"phi": adapt(self, *arguments)[-1], "label": "text"}]

        def predict(self, bound, phi, x):
            return super().predict(bound, phi["phi"], x)

    model.learner.algorithm = Odd(**model.learner.algorithm.__dict__)
    adapted = model.adapt([Examples(x, y) for x, y, _ in given], None)
    assert "one by one" in caplog.text
    for each, (x, y, query) in zip(adapted, given):
        assert torch.equal(model.predict([each], [query])[0], expected(model, x, y, query))


# Batches and caches ---------------------------------------------------------------------------------------------------


def test_only_requests_of_one_key_are_computed_together():
    seen, gate = [], threading.Event()

    def compute(key, items):
        gate.wait(60)
        seen.append((key, list(items)))
        return [ValueError("odd") if item % 2 else (key, item) for item in items]

    batcher = Batcher(compute, largest=3, max_wait=0.0)
    futures = [batcher.submit("ab"[i % 2], i) for i in range(10)]
    gate.set()
    for i, future in enumerate(futures):
        assert isinstance(future.exception(60), ValueError) if i % 2 else future.result(60) == ("a", i)
    assert all(len(items) <= 3 and {"ab"[i % 2] for i in items} == {key} for key, items in seen)
    assert sorted(i for _, items in seen for i in items) == list(range(10)) and batcher.counts.largest == 3
    batcher.close()
    with pytest.raises(RuntimeError):
        batcher.submit("a", 1)


def test_a_request_waits_for_others_up_to_the_limit():
    batcher = Batcher(lambda key, items: items, largest=64, max_wait=0.2)
    batcher._had_others = True
    import time

    began = time.monotonic()
    assert batcher.submit("a", 1).result(30) == 1
    assert 0.15 < time.monotonic() - began < 10
    batcher.max_wait = 60.0
    assert batcher.submit("a", 1).result(30) == 1  # the last batch had one request, so this one does not wait
    batcher.close()


def test_the_least_recently_used_is_evicted_first():
    cache = HandleCache(100)
    first, second = cache.put("a", 40), cache.put("b", 40)
    assert cache.get(first) == "a"
    third = cache.put("c", 40)
    assert (cache.get(first), cache.get(second), cache.get(third)) == ("a", None, "c")
    assert (cache.bytes, cache.evictions, len(cache)) == (80, 1, 2)
    assert cache.put("d", 101) is None and cache.evictions == 1
    assert cache.forget(first) and not cache.forget(first) and cache.bytes == 40


# gRPC and HTTP --------------------------------------------------------------------------------------------------------


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
        ({"x": [[True, False]], "y": Y}, "expected numbers"),
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


def test_models_need_different_names():
    with pytest.raises(ConfigError, match="NAME=RUN"):
        AdaptationService([served(name="a"), served(name="a")])


def test_a_diverged_adaptation_is_refused(client):
    huge = torch.full((4, 2), 3e38)
    with pytest.raises(MetadistError, match="scaled as in training") as caught:
        client.adapt(huge, huge, model="curves", inner_steps=3)
    assert caught.value.code == grpc.StatusCode.FAILED_PRECONDITION


def test_replicas_share_what_they_adapted():
    """One adapts, the other predicts; both forget and evict. The φ of every algorithm can be sent."""
    for algorithm, normalization in KINDS:
        shared = SharedCache(30_000)

        def call(method, *arguments, shared=shared):
            return getattr(shared, method)(*pickle.loads(pickle.dumps(arguments)))  # as Ray would

        one, other = (
            AdaptationService([served(algorithm, normalization)], budget=30_000, shared_cache=call) for _ in range(2)
        )
        model = one.model("")
        x, y, query = tasks(model, 1)[0]
        handle, _ = one.adapt(model, Examples(x, y), 2, lambda: 10)
        for replica in (one, other, other):
            assert torch.equal(
                replica.predict(*replica.find(handle), query, lambda: 10), expected(model, x, y, query, 2)
            )
        assert one.statistics()["handles"] == other.statistics()["handles"] == 1
        assert one.forget(handle)
        handle, _ = one.adapt(model, Examples(x, y), 2, lambda: 10)
        while not shared.evictions:
            other.adapt(model, Examples(x, y), 2, lambda: 10)
        for replica in (one, other):
            with pytest.raises(Refused, match="adapt again"):
                replica.find(handle)
            replica.close()
