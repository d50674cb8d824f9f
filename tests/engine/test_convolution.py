"""Test convolutions of compiled shards, as matrix products and as library calls, and the layout of their graphs."""

from __future__ import annotations

from dataclasses import replace

import pytest
import test_engines as engines
import torch
import torch.nn.functional as F
from gradient_cases import ALGORITHMS, MODELS, make
from torch import nn
from torch.func import grad, jvp, vjp, vmap
from torch.fx.experimental.proxy_tensor import make_fx
from toys import Blobs, keys, relative_error

import metadist.engine.convolution as convolution
from metadist.engine.block_sums import DECOMPOSITIONS
from metadist.engine.channels_last import channels_last
from metadist.engine.convolution import conv2d
from metadist.engine.functions import directly
from metadist.models import Conv4

aten = torch.ops.aten
WAYS = ["patches", "library"]


@pytest.fixture
def choose(monkeypatch):
    return lambda way: monkeypatch.setattr(convolution, "SMALL", {"patches": float("inf"), "library": 0}[way])


@pytest.mark.parametrize("stride", [1, 2, (2, 1)])
@pytest.mark.parametrize("padding", [0, 1, (0, 2), "same"])
@pytest.mark.parametrize("dilation", [1, (1, 2)])
@pytest.mark.parametrize("kernel", [(3, 3), (2, 3), (1, 1)])
@pytest.mark.parametrize("groups", [1, 2])
@pytest.mark.parametrize("way", WAYS)
def test_convolution(stride, padding, dilation, kernel, groups, way, choose):
    """Value, gradient and Hessian-vector product in both modes equal those of torch."""
    choose(way)
    if padding == "same" and stride != 1:
        pytest.skip("torch has no such convolution")
    generator = torch.Generator().manual_seed(0)
    x, w, b, tx, tw = (
        torch.randn(*shape, dtype=torch.float64, generator=generator)
        for shape in ((2, 4, 7, 6), (6, 4 // groups, *kernel), (6,), (2, 4, 7, 6), (6, 4 // groups, *kernel))
    )
    results = []
    for function in (conv2d, F.conv2d):

        def loss(x, w, function=function):
            return torch.tanh(function(x, w, b, stride, padding, dilation, groups)).square().sum()

        gradient = torch.func.grad(loss, argnums=(0, 1))
        value = function(x, w, b, stride=stride, padding=padding, dilation=dilation, groups=groups)
        _, forward = torch.func.jvp(gradient, (x, w), (tx, tw))
        _, pull = torch.func.vjp(gradient, x, w)
        results.append(
            [value, function(x, w, None, stride, padding, dilation, groups), *gradient(x, w), *forward, *pull((tx, tw))]
        )
    for ours, theirs in zip(*results):
        torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-12)


def test_convolution_without_a_batch_is_torch_s():
    x, w = torch.randn(1, 5, 5), torch.randn(2, 1, 3, 3)
    assert conv2d(x, w).equal(F.conv2d(x, w))


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("own", [(0, 0), (0, None), (None, 0), (1, 2)], ids=str)
def test_every_task_with_a_kernel_of_its_own(way, own, choose):
    """Values, gradients and Hessian-vector products in both modes under vmap equal those of single tasks."""
    choose(way)
    generator = torch.Generator().manual_seed(0)
    shapes = ((2, 3, 6, 5), (4, 3, 3, 3))
    x, w = (
        torch.randn(
            *(shape if dim is None else (*shape[:dim], 3, *shape[dim:])), dtype=torch.float64, generator=generator
        )
        for shape, dim in zip(shapes, own)
    )
    tx, tw = (torch.randn(*shape, dtype=torch.float64, generator=generator) for shape in shapes)

    def everything(function):
        def derivatives(x, w):
            gradient = grad(lambda x, w: torch.tanh(function(x, w, None, 2, 1)).square().sum(), argnums=(0, 1))
            return *gradient(x, w), *jvp(gradient, (x, w), (tx, tw))[1], *vjp(gradient, x, w)[1]((tx, tw))

        return derivatives

    got = vmap(everything(conv2d), in_dims=own)(x, w)
    for task in range(3):
        given = [t if dim is None else t.select(dim, task) for t, dim in zip((x, w), own)]
        for ours, theirs in zip(got, everything(F.conv2d)(*given)):
            torch.testing.assert_close(ours[task], theirs, rtol=1e-12, atol=1e-12)


def test_rounding_is_that_of_the_library(choose):
    """In float32 the error against float64 is at most twice torch's own."""
    generator = torch.Generator().manual_seed(0)
    x, w = torch.randn(5, 64, 14, 14, generator=generator), 0.05 * torch.randn(64, 64, 3, 3, generator=generator)

    def second(function):
        def loss(x, w):
            return function(torch.relu(function(x, w, None, 1, 1)), w, None, 2, 1).square().mean()

        return lambda x, w: grad(lambda w: loss(x, w - 0.1 * grad(loss, argnums=1)(x, w)))(w)

    exact = second(F.conv2d)(x.double(), w.double())
    plain = relative_error(second(F.conv2d)(x, w), exact)
    for way in WAYS:
        choose(way)
        assert relative_error(second(conv2d)(x, w), exact) <= max(2 * plain, 1e-6), way


def test_autocast_reaches_the_products(choose):
    choose("library")
    x, w = torch.randn(2, 3, 8, 8), torch.randn(4, 3, 3, 3)
    with torch.autocast("cpu", torch.bfloat16):
        assert conv2d(x, w).dtype == torch.bfloat16


@pytest.mark.lane("compile")
@pytest.mark.timeout(900)
@pytest.mark.parametrize(
    ("model", "engine"),
    [
        ("conv2-stride-batch", engines.UNROLLED),
        *(
            pytest.param(model, engine, marks=pytest.mark.long)
            for model in ("conv4-stride-batch", "conv4-max-batch")
            for engine in (engines.UNROLLED, engines.MIXED)
        ),
    ],
    ids=engines.name_of,
)
def test_compiled_by_the_library(model, engine, choose, monkeypatch):
    """Compare a shard of three tasks with the plain loop; small convolutions are library calls here too."""
    choose("library")
    config = Conv4(filters=4, blocks=2, pooling="stride", norm="batch", features="mean")
    monkeypatch.setitem(MODELS, "conv2-stride-batch", (Blobs(input_shape=(1, 8, 8)), config))
    calls = []
    monkeypatch.setitem(convolution.REPLACEMENTS, F.conv2d, lambda *a, **k: calls.append(a) or conv2d(*a, **k))
    engines.check(make(ALGORITHMS["maml-1"], model, outer=engines.SHARD), engine, keys(0, 1, 5))
    assert calls


@pytest.mark.lane("numerics")
@pytest.mark.parametrize("compiled", [True, False])
def test_a_compiled_shard_has_no_grouped_convolution(compiled):
    """Under vmap, torch's convolution with a kernel of each task is one with a group for each task, which is slow."""
    config = Conv4(filters=4, blocks=2, pooling="stride", norm="batch", features="mean")
    MODELS["conv2"] = (Blobs(input_shape=(1, 8, 8)), config)
    learner = make(ALGORITHMS["maml-1"], "conv2", outer=engines.SHARD)
    del MODELS["conv2"]
    gradient = learner.meta_gradient_under(replace(learner.engine, compile=compiled))
    theta = learner.initial(0).theta(learner.slots)
    some = keys(0, 1, 5)
    tasks = learner.sample(some)
    vectors = gradient.flat(theta)

    def whole(vectors):
        return gradient.sums(directly, gradient.named(vectors), tasks, some, 0, torch.ones(3, dtype=torch.bool))

    graph = make_fx(whole, decomposition_table=DECOMPOSITIONS)(vectors).graph
    groups = [node.args[-1] for node in graph.nodes if node.target is aten.convolution.default]
    assert (max(groups, default=1) == 1) == compiled


# The layout of graphs -------------------------------------------------------------------------------------------------


class Images(nn.Module):
    """The operations of image networks, and one operation on other tensors."""

    def __init__(self):
        super().__init__()
        self.first, self.second = nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(8, 8, 3, stride=2, bias=False)
        self.scale, self.attention = nn.Parameter(torch.randn(8)), nn.MultiheadAttention(8, 2, batch_first=True)

    def forward(self, x):
        x = self.first(x)
        variance, mean = torch.var_mean(x, (0, 2, 3), correction=0, keepdim=True)
        x = F.max_pool2d(torch.relu((x - mean) / torch.sqrt(variance + 1e-5) * self.scale.view(1, -1, 1, 1)), 2)
        x = F.avg_pool2d(self.second(x).clamp(-1, 1) + self.scale[:, None, None], 2, 1)
        tokens = x.flatten(2).mT
        return self.attention(tokens, tokens, tokens)[0].mean(1), x.mean((2, 3))


def traced(way, choose, tasks):
    choose(way)
    module = Images().double()
    names, values = zip(*module.named_parameters())
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(tasks, 4, 3, 12, 12, dtype=torch.float64, generator=generator)

    def single(x, *values):
        def loss(*values):
            with convolutions():
                tokens, means = torch.func.functional_call(module, dict(zip(names, values)), (x,))
            return tokens.square().sum() + torch.tanh(means).sum()

        def stepped(*values):
            return loss(*(v - 0.1 * g for v, g in zip(values, grad(loss, argnums=tuple(range(len(values))))(*values))))

        return grad(stepped, argnums=tuple(range(len(values))))(*values)

    def whole(x, *values):
        return vmap(single, in_dims=(0, *(None,) * len(values)))(x, *values)

    arguments = (x, *(v.detach() for v in values))
    return make_fx(whole, decomposition_table=DECOMPOSITIONS)(*arguments), whole, arguments


class convolutions(torch.overrides.TorchFunctionMode):
    def __torch_function__(self, func, types, args=(), kwargs=None):
        return (conv2d if func is F.conv2d else func)(*args, **(kwargs or {}))


@pytest.mark.lane("numerics")
@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("tasks", [1, 2])
def test_a_graph_computes_the_same_channels_last(way, tasks, choose):
    graph, function, arguments = traced(way, choose, tasks)
    before = {n.target for n in graph.graph.nodes}
    channels_last(graph)
    graph.graph.lint()
    for got, expected in zip(graph(*arguments), function(*arguments)):
        torch.testing.assert_close(got, expected, rtol=1e-10, atol=1e-10)
    assert before - {aten.clone.default} <= {n.target for n in graph.graph.nodes} | {
        aten.view.default,
        aten._unsafe_view.default,
    }


@pytest.mark.lane("numerics")
@pytest.mark.parametrize("way", WAYS)
def test_hardly_anything_is_done_to_images_channels_first(way, choose):
    """Batch norm and ReLU work on [1, 4, 12, 12, 8] in place of [1, 4, 8, 12, 12]."""
    graph, _, arguments = traced(way, choose, 1)

    def done_to(shape):
        values = {}

        class Recorder(torch.fx.Interpreter):
            def run_node(self, n):
                values[n] = super().run_node(n)
                return values[n]

        Recorder(graph).run(*arguments)
        nodes = [n for n in graph.graph.nodes if torch.Tag.pointwise in getattr(n.target, "tags", ())]
        return sum(any(getattr(values[a], "shape", None) == shape for a in n.all_input_nodes) for n in nodes)

    first = done_to((1, 4, 8, 12, 12))
    channels_last(graph)
    assert first > 20
    assert done_to((1, 4, 8, 12, 12)) <= first // 5  # numbers that are expanded to images, and gathered patches
    assert done_to((1, 4, 12, 12, 8)) > first / 2


def test_graphs_without_images_do_not_change():
    def attention(x):  # [tasks, heads, rows, rows]: four dimensions do not make an image
        return torch.softmax(x @ x.mT, -1) * x.exp()

    graph = make_fx(attention)(torch.randn(2, 3, 4, 4))
    code = graph.code
    channels_last(graph)
    assert graph.code == code
