"""Adaptations and predictions in batches, caches of adapted parameters, and replicas that share a cache."""

from __future__ import annotations

import pickle
import threading

import pytest
import shaped
import torch
from serving_toys import SUPERVISED, close, expected, served, tasks
from wide import Reader, Words

from metadist.algorithms import MAML
from metadist.core.errors import ConfigError
from metadist.core.model import Model
from metadist.core.outer import OuterLoop
from metadist.core.random import TaskKey
from metadist.core.signature import InvalidInput
from metadist.core.task import Examples
from metadist.learners.few_shot import FewShotLearner
from metadist.rpc.grpc_guard import Refused
from metadist.serving.batching import Batcher
from metadist.serving.cache import HandleCache, SharedCache
from metadist.serving.model import ServedAdaptation, ServedModel
from metadist.serving.service import AdaptationService

KINDS = [(name, "transductive") for name in SUPERVISED] + [("maml", "inductive"), ("reptile", "inductive")]


def test_the_table_of_algorithms_is_complete():
    assert set(SUPERVISED) == {
        "anil",
        "cnp",
        "imaml",
        "maml",
        "meta_lstm",
        "meta_sgd",
        "meta_weight_net",
        "metanas",
        "plain",
        "protonet",
        "reptile",
        "reweight",
    }


@pytest.mark.parametrize(("algorithm", "normalization"), KINDS)
def test_batched_results_equal_single_ones(algorithm, normalization):
    """Adaptations to several support sets under one vmap, and predictions with them, equal those one by one."""
    model = served(algorithm, normalization)
    given = tasks(model, 7)
    supports = [Examples(x, y) for x, y, _ in given]
    together = model.adapt(supports, None)
    predictions = model.predict(together, [query for _, _, query in given])
    for (x, y, query), adapted, prediction in zip(given, together, predictions):
        assert isinstance(adapted, ServedAdaptation)
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


def test_a_request_that_fails_leaves_the_others_of_its_batch_alone():
    """A token that the embedding does not know stopped every request that was computed together with it."""
    family = Words()
    own = FewShotLearner(MAML(inner_steps=1), Model(Reader), family, OuterLoop(meta_steps=1))
    model = ServedModel("words", own, own.initial(5))
    drawn = family.sample(TaskKey.of(1, "test", 0, range(2)), "test")
    supports = [model.support(drawn.support.x[i] + 100 * i, drawn.support.y[i]) for i in range(2)]
    right, wrong = model.adapt(supports, None)
    assert isinstance(wrong, InvalidInput) and "does not know" in str(wrong)
    query = model.inputs("query", drawn.query.x[0])
    found, refused = model.predict([right, right], [query, query + 100])
    assert torch.equal(found, model.predict([right], [query])[0])
    assert isinstance(refused, InvalidInput) and "does not know" in str(refused)
    with pytest.raises(InvalidInput, match="does not know"):
        model.adapt_predict(drawn.support.x[0], drawn.support.y[0], drawn.query.x[0] + 100)
    calls = []
    adapt, own.adapt = own.adapt, lambda *given: calls.append(given) or adapt(*given)
    model.adapt([supports[0]] * 2, None)
    assert len(calls) == 1  # later batches are computed together, as before


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


def test_models_need_different_names():
    with pytest.raises(ConfigError, match="NAME=RUN"):
        AdaptationService([served(name="a"), served(name="a")])


@pytest.mark.lane("numerics")
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


def test_unknown_token_ids_are_found_on_the_cpu():
    """A GPU would stop the process at one."""
    own = FewShotLearner(MAML(), Model(shaped.Reader), shaped.Tokens(), OuterLoop(meta_steps=1))
    model = ServedModel("reader", own, own.initial(0))
    assert model._on_cpu is None
    model._on_cpu = own.model.module
    x, y = torch.arange(30).view(6, 5) % 20, torch.arange(6) % 3
    assert torch.equal(model.support(x, y).x, x)
    for call in (lambda: model.support(x + 20, y), lambda: model.inputs("query", x - 1)):
        with pytest.raises(InvalidInput, match="does not know: IndexError: index out of range"):
            call()
