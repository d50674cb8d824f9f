"""The benchmark's claim is that all contestants computed the same gradient: proved here in float64, and its failure
shown.
"""

from __future__ import annotations

import importlib.util
import json
import math

import pytest
import torch
from typer.testing import CliRunner

from metadist.benchmarks import inner_loop
from metadist.benchmarks.contestants import peers as contestants
from metadist.cli import app as cli
from metadist.core.errors import ConfigError

CPU = torch.device("cpu")
IMAGES = {
    "name": "metadist.benchmarks.random_images:RandomImages",
    "n_way": 3,
    "query_shots": 2,
    "channels": 2,
    "size": 12,
}
QUICK = ("--tasks", "2", "--inner-steps", "1", "--seconds", "0", "--eager")


def document(model, inner_steps, tasks=2):
    sinusoid = inner_loop.document_of("mlp", "sinusoid", inner_steps, tasks, 0.1, {"k_shot": 4, "query_shots": 3})
    if model == "mlp":
        return sinusoid
    pooling, features = model.split()
    conv4 = {"name": "conv4", "filters": 4, "blocks": 2, "pooling": pooling, "features": features}
    return {**sinusoid, "tasks": IMAGES, "model": conv4}


def gradient(name, problem):
    contestant = {**contestants.OURS, **contestants.PEERS}[name](problem)
    contestant.call()
    return contestant.read(contestant.call())  # the second call: what a first leaves behind must not add up


@pytest.mark.parametrize("inner_steps", [1, 3])
@pytest.mark.parametrize("model", ["mlp", "max flatten", "stride mean"])
@pytest.mark.parametrize("name", ["metadist", "higher", "torchopt", "jax"])
def test_contestants_compute_the_plain_loop_s_gradient(name, model, inner_steps):
    if name != "metadist":
        pytest.importorskip(name)
    problem = inner_loop.problem_of(document(model, inner_steps), "float64", CPU)
    reference = gradient("loop", problem)
    assert contestants.relative_error(gradient(name, problem), reference) < 1e-10
    assert reference.keys() == dict(problem.learner.model.module.named_parameters()).keys()


def test_the_loop_s_gradient_is_the_difference_quotient():
    problem = inner_loop.problem_of(document("mlp", 2), "float64", CPU)
    module, theta = problem.module(), {n: t.detach() for n, t in problem.parameters().items()}
    torch.manual_seed(0)
    direction = {n: torch.randn_like(t) for n, t in theta.items()}

    def objective(distance):
        total = 0.0
        for support_x, support_y, query_x, query_y in problem.each():
            phi = {n: (t + distance * direction[n]).requires_grad_() for n, t in theta.items()}
            for _ in range(problem.inner_steps):
                inner = problem.loss(torch.func.functional_call(module, phi, (support_x,)), support_y)
                slopes = torch.autograd.grad(inner, list(phi.values()))
                phi = {
                    n: (p - problem.inner_lr * s).detach().requires_grad_() for (n, p), s in zip(phi.items(), slopes)
                }
            total += problem.loss(torch.func.functional_call(module, phi, (query_x,)), query_y).item()
        return total

    quotient = (objective(1e-6) - objective(-1e-6)) / 2e-6
    found = sum(float((g * direction[n]).sum()) for n, g in gradient("loop", problem).items())
    assert found == pytest.approx(quotient, rel=1e-6)


def test_peers_get_pytorch_s_own_layers():
    module = inner_loop.problem_of(document("stride mean", 1), "float32", CPU).module()
    own = {type(layer).__name__ for layer in module.modules() if type(layer).__module__.split(".")[0] != "torch"}
    assert own == {"SpatialMean"}, "PyTorch's has no rule for vmap"


def test_theta_is_the_same_numbers_in_both_precisions_and_off_the_kinks():
    single, double = (
        inner_loop.problem_of(document("stride mean", 1), dtype, CPU).parameters() for dtype in ("float32", "float64")
    )
    assert all(torch.equal(single[n].double(), double[n]) for n in double)
    assert 0.05 < double["norm1.bias"].abs().max() < 0.5


def test_a_theta_on_a_kink_is_left(monkeypatch):
    """Where changes as small as rounding turn the loop's gradient, the next θ is tried."""
    tried, right = [], inner_loop.problem_of

    def noted(document, dtype, device, offset):
        tried.append((dtype, offset))
        return right(document, dtype, device, offset)

    def fickle(problem):
        contestant = right_loop(problem)
        spoilt = 1.01 if tried[-1] == ("float32", 0) and problem.learner.model.dtype == torch.float32 else 1.0
        return contestants.Contestant(contestant.call, lambda gradient: {n: spoilt * g for n, g in gradient.items()})

    right_loop = contestants.loop
    monkeypatch.setattr(inner_loop, "problem_of", noted)
    monkeypatch.setattr(contestants, "loop", fickle)
    inner_loop.steady(document("stride mean", 1), CPU)
    assert tried == [("float64", 0), ("float32", 0), ("float64", 1), ("float32", 1)]


def test_operations_are_those_of_the_products():
    problem = inner_loop.problem_of(document("mlp", 0), "float32", CPU)
    # 3 query rows through 1→40→40→1: forward, gradient to the weights, and to the inputs of all but the first layer
    assert inner_loop.operations_of(problem) == 2 * 2 * 3 * (2 * (40 + 1600 + 40) + 1600 + 40)
    assert inner_loop.products_of(problem) == {
        (2, 4, 1, 40),
        (2, 4, 40, 1),
        (2, 1, 4, 40),
        (2, 4, 40, 40),
        (2, 40, 4, 40),
        (2, 40, 4, 1),
    }


def test_a_wrong_or_missing_number_is_an_error_of_one():
    reference = {"a": torch.tensor([3.0, 4.0]), "b": torch.tensor([0.0])}
    assert contestants.relative_error(
        {"a": torch.tensor([3.0, 4.5]), "b": torch.tensor([0.0])}, reference
    ) == pytest.approx(0.1)
    assert contestants.relative_error({"a": torch.tensor([3.0, 4.0])}, reference) == math.inf
    assert (
        contestants.relative_error({"a": torch.tensor([3.0, math.nan]), "b": torch.tensor([0.0])}, reference)
        == math.inf
    )


def test_a_shard_of_20_ways_takes_the_paper_s_rate():
    twenty = inner_loop.document_of("conv4", "omniglot", 5, None, None, {"n_way": 20})
    assert twenty["algorithm"] == {"name": "maml", "inner_lr": 0.1, "inner_steps": 5}
    assert twenty["tasks"]["n_way"] == 20 and twenty["outer"]["shard_size"] == twenty["outer"]["meta_batch_size"]
    assert inner_loop.document_of("conv4", "omniglot", 1, None, None, {})["algorithm"]["inner_lr"] == 0.4


# The command ----------------------------------------------------------------------------------------------------------


def bench(*arguments):
    return CliRunner().invoke(cli.app, ["bench", "inner-loop", *arguments])


@pytest.mark.lane("numerics")
def test_the_command_prints_a_table_and_one_json_object():
    done = bench(*QUICK, "--json")
    assert done.exit_code == 0, done.stderr
    assert "1 inner step" in done.stdout and "floor" in done.stdout
    report = json.loads(done.stdout.splitlines()[-1])
    (case,) = report["cases"].values()
    assert case["contestants"].keys() == {"metadist", "loop"}
    assert case["contestants"]["loop"]["ratio"] == 1.0
    assert case["contestants"]["metadist"]["error_float32"] <= case["tolerance"]["float32"] == 1e-5
    assert case["floor"]["mflop"] > 0 and case["ahead"]["of"] == "metadist"
    assert report["settings"]["tasks"] == 2 and {"metadist", "torch"} == report["versions"].keys()


@pytest.mark.parametrize("spoilt", ["scaled", "silent", "not a number"])
def test_disagreement_ends_it_before_anything_is_timed(monkeypatch, spoilt):
    def wrong(problem):
        right = contestants.loop(problem)
        change = {"scaled": lambda g: g * 1.001, "silent": torch.zeros_like, "not a number": lambda g: g * math.nan}[
            spoilt
        ]
        return contestants.Contestant(right.call, lambda gradient: {n: change(g) for n, g in gradient.items()})

    def timed(*_, **__):
        raise AssertionError("timed")

    monkeypatch.setitem(contestants.OURS, "metadist", wrong)
    monkeypatch.setattr(inner_loop, "interleaved", timed)
    done = bench(*QUICK)
    assert done.exit_code == 2
    error = done.stderr.splitlines()[-1]
    assert error.startswith("error: bench: 'metadist' computed another gradient") and "allowed is 1e-05" in error
    assert done.stdout == ""


def test_batch_norm_has_to_agree_in_float64(monkeypatch):
    def slightly(problem):
        right = contestants.loop(problem)
        return contestants.Contestant(right.call, lambda gradient: {n: g * (1 + 1e-6) for n, g in gradient.items()})

    with pytest.raises(inner_loop.DisagreementError, match="in float64, allowed is 1e-08"):
        inner_loop._case(document("stride mean", 1), {"metadist": slightly, "loop": contestants.loop}, CPU, 0.0)


def test_one_that_is_missing_names_the_extra(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    done = bench(*QUICK, "--against", "loop,higher")
    assert done.exit_code == 2
    assert done.stderr.splitlines() == [
        "error: --against higher: higher is not installed; pip install 'metadist[bench]' brings it"
    ]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--against", "lop"), "--against: 'lop' is not one of loop, higher, torchopt, jax; did you mean 'loop'?"),
        (("--model", "conv5"), "--model: 'conv5' is not one of mlp, conv4; did you mean 'conv4'?"),
        (
            ("--task", "omniglott"),
            "--task: 'omniglott' is not one of sinusoid, omniglot, images84; did you mean 'omniglot'?",
        ),
        (("--inner-steps", "1,x"), "--inner-steps 1,x: expected different whole numbers, such as 0,1,2"),
        (("--n-way", "5"), "--n-way is for classification; sinusoids have no classes, so leave it out"),
        (
            ("--model", "conv4", "--task", "sinusoid"),
            "model 'conv4' needs images [channels, height, width]; these tasks' inputs are [1]",
        ),
    ],
)
def test_mistakes_are_one_line(arguments, message):
    done = bench(*QUICK, *arguments)
    assert done.exit_code == 2 and done.stdout == ""
    assert done.stderr.splitlines()[-1] == f"error: {message}"


def test_the_loop_is_always_there():
    assert contestants.chosen_peers("") == ["loop"]


def test_unknown_layers_are_refused_by_jax():
    pytest.importorskip("jax")
    named = document("stride mean", 1)
    named["model"] = {**named["model"], "norm": "group"}
    with pytest.raises(ConfigError, match="layer 'norm1' is a GroupNorm; expected one of Linear"):
        contestants.jax(inner_loop.problem_of(named, "float32", CPU))
