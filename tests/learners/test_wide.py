"""Any tree of tensors as input and target, any prediction that the loss takes: meta-gradients, messages, data."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.func import functional_call
from torch.nn.attention import SDPBackend, sdpa_kernel
from toys import Curves, keys, learner, relative_error, somewhere, train
from wide import CASES, Described, DictReader, Flat, Gaussian, Plain, Quantiles, Squeezed, Uncertain

from metadist.algorithms import CNP, MAML
from metadist.core.engine import Engine
from metadist.core.errors import ConfigError
from metadist.core.outer import OuterLoop
from metadist.core.signature import InvalidInput, Signature
from metadist.core.task import Examples, Task, stack
from metadist.core.tree import named, of_names
from metadist.models.cnp import ConditionalNeuralProcess
from metadist.oracles.supervised import measure

SHARD = OuterLoop(meta_batch_size=4, shard_size=2)
STEPS = 2


def subject(name, **options):
    family, module, more = CASES[name]
    options = {"outer": SHARD, **options}
    made = learner(MAML(inner_lr=0.1, inner_steps=STEPS), module, family(), **options)
    made.model.output = more.get("output")
    return made


def plain_gradient(subject, theta, shard):
    """Σ over tasks of the gradient of the query loss after the inner steps: one task after the other, no torch.func."""
    module, total = subject.model.module.train(), 0.0
    for key in shard.each():
        task = subject.tasks.sample_task(key, key.split).to(torch.device("cpu"), torch.float64)
        leaves = {n: t.clone().requires_grad_() for n, t in theta["model"].items()}

        def loss(phi, examples):
            arguments = ((), examples.x) if isinstance(examples.x, dict) else (examples.x, {})
            arguments = ((examples.x,), {}) if isinstance(examples.x, torch.Tensor) else arguments
            result = functional_call(module, phi, *arguments)
            result = result[0] if isinstance(result, tuple) and subject.model.output == 0 else result
            return subject.tasks.loss(getattr(result, "logits", result), examples.y).mean()

        phi = leaves
        for _ in range(STEPS):
            gradient = torch.autograd.grad(loss(phi, task.support), list(phi.values()), create_graph=True)
            phi = {n: p - 0.1 * g for (n, p), g in zip(phi.items(), gradient)}
        found = torch.autograd.grad(loss(phi, task.query), list(leaves.values()))
        total = total + torch.cat([g.flatten() for g in found])
    return total


@pytest.mark.lane("numerics")
@pytest.mark.parametrize("differentiation", ["unrolled", "mixed"])
@pytest.mark.parametrize("name", CASES)
def test_meta_gradients_are_those_of_the_plain_loop(name, differentiation):
    one = subject(name)
    theta, shard = somewhere(one), keys(0, 1)
    with sdpa_kernel(SDPBackend.MATH):
        expected = plain_gradient(one, theta, shard)
    one.set_engine(Engine(differentiation=differentiation))
    assert relative_error(one.contribute(theta, shard, 3).slots["model"], expected) <= 1e-10


@pytest.mark.lane("compile")
@pytest.mark.long
@pytest.mark.timeout(900)
@pytest.mark.parametrize("name", ["dict", "tuple", "output", "gaussian", "quantiles"])
def test_compiled_meta_gradients(name):
    one = subject(name)
    theta, shard = somewhere(one), keys(0, 1)
    expected = plain_gradient(one, theta, shard)
    one.set_engine(Engine(compile=True))
    assert relative_error(one.contribute(theta, shard, 3).slots["model"], expected) <= 1e-10


@pytest.mark.lane("numerics")
@pytest.mark.parametrize("normalization", ["transductive", "inductive"])
@pytest.mark.parametrize("name", CASES)
def test_a_run_of_each(name, normalization):
    """The dry run tries all paths; the score after adaptation is that of the prediction that ``predict`` returns."""
    one = subject(name, dtype=torch.float32)
    one.normalize(normalization)
    one.dry_run(0)
    state = train(one, 2)
    theta, some = state.theta(one.slots), keys(5, 6)
    found = one.evaluate(theta, some, 0)
    for row, key in zip(found.columns["loss"], some.each()):
        task = one.tasks.sample_task(key, key.split).to(torch.device("cpu"), torch.float32)
        prediction = one.predict(state, one.adapt(state, task.support), task.query.x, task.support)
        torch.testing.assert_close(
            row[-1], one.tasks.loss(prediction, task.query.y).mean().double(), rtol=1e-4, atol=1e-5
        )


class Ragged(Described):
    """Tasks of unequal size, whose dict is padded and masked."""

    def sample_task(self, key, split):
        rows = 3 + int(key.tasks) % 3
        return Task(self.example(key, "support", rows), self.example(key, "query", rows + 1))

    def sample(self, keys, split):
        return stack([self.sample_task(key, split) for key in keys.each()])


def test_padded_trees_give_the_gradient_of_the_real_rows():
    one = learner(MAML(inner_lr=0.1, inner_steps=STEPS), DictReader, Ragged(), outer=SHARD)
    theta, shard = somewhere(one), keys(0, 1, 2)
    assert one.sample(shard).support.mask is not None
    expected = plain_gradient(one, theta, shard)
    assert relative_error(one.contribute(theta, shard, 3).slots["model"], expected) <= 1e-10


def test_minibatches_of_trees():
    """A minibatch as large as the support set is the whole one, in another order."""
    one = subject("dict")
    shuffled = learner(MAML(inner_lr=0.1, inner_batch_size=3), DictReader, Described(), outer=SHARD)
    batch = shuffled.algorithm.minibatch(one.sample(keys(0)).support, keys(0).each()[0], 0)
    assert batch.rows == 1  # of a stack: rows are the tasks
    task = one.tasks.sample_task(keys(0).each()[0], "train")
    first, second = (shuffled.algorithm.minibatch(task.support, keys(0).each()[0], step) for step in (0, 1))
    both = torch.cat([first.x["scale"], second.x["scale"]])
    assert first.rows == 3 and both.sort().values.equal(task.support.x["scale"].sort().values)


# Messages -------------------------------------------------------------------------------------------------------------


def refused(make, *words):
    with pytest.raises(ConfigError) as error:
        make()
    text = str(error.value)
    assert "\n" not in text and all(word in text for word in words), text


class Broadcasting(Flat):
    """Targets [N] against predictions [N, 1]: [N, N], averaged over the wrong dimension."""

    def loss(self, prediction, target):
        return (prediction - target).square().mean(-1)

    metric = loss


class BroadcastingMetric(Quantiles):
    def metric(self, prediction, target):
        return (prediction[:, 1:2] - target).abs().mean(-1)


@pytest.mark.parametrize(
    ("module", "family", "words"),
    [
        (Plain, Flat(), ("predicts shape [4, 1]", "need [4]", "squeeze(-1)")),
        (
            Plain,
            Broadcasting(),
            ("the loss of 'Broadcasting' of a row depends on other rows", "[4, 1]", "[4]", "alone"),
        ),
        (
            lambda: Plain(3),
            BroadcastingMetric(),
            ("the metric of 'BroadcastingMetric' of a row depends on other rows",),
        ),
        (Gaussian, Flat(), ("predicts shape {0: [4, 1], 1: [4, 1]}", "need [4]", "model.output")),
        (Squeezed, Quantiles(), ("the loss of 'Quantiles' fails", "predictions {0: [4], 1: [4, 3, 2]}")),
    ],
)
def test_shapes_never_broadcast_silently(module, family, words):
    one = learner(MAML(), module, family, outer=SHARD)
    refused(lambda: one.dry_run(0), *words)


def test_a_gaussian_likelihood_never_broadcasts_silently():
    config = ConditionalNeuralProcess(width=4, representation=4)

    class FlatCurves(Curves):
        outputs = 1

        def sample(self, keys, split):
            task = super().sample(keys, split)
            return Task(*(Examples(e.x, e.y[..., 0]) for e in (task.support, task.query)))

    one = learner(CNP(), lambda: config.build((2,), 1), FlatCurves(), outer=SHARD)
    refused(lambda: one.dry_run(0), "prediction has shape [4, 1] and the target [4]")


@pytest.mark.parametrize("output", ["hidden_states", 3])
def test_a_part_that_forward_does_not_return(output):
    one = subject("output", dtype=torch.float32)
    one.model.output = output
    refused(lambda: one.dry_run(0), f"model.output: {output!r} is no part of what forward returns", "logits, hidden")


def test_a_part_by_name():
    one = subject("output", dtype=torch.float32)
    theta = somewhere(one)
    implicit = one.contribute(theta, keys(0, 1), 0)
    one.model.output = "logits"
    assert one.contribute(theta, keys(0, 1), 0).slots["model"].equal(implicit.slots["model"])


class Odd(Described):
    def example(self, keys, name, rows):
        plain = super().example(keys, name, rows)
        return Examples({**plain.x, "scale": plain.x["scale"][..., :-1]}, plain.y)


class Spaced(Described):
    def example(self, keys, name, rows):
        plain = super().example(keys, name, rows)
        return Examples({"token ids": plain.x["tokens"]}, plain.y)


@pytest.mark.parametrize(
    ("family", "words"),
    [
        (Odd(), ("support set of train tasks has x {tokens: [6, 3], mask: [6, 3], scale: [5]} and y [6, 1]",)),
        (Spaced(), ("'Spaced': x has the key 'token ids'; expected names",)),
    ],
)
def test_trees_that_are_none(family, words):
    refused(lambda: learner(MAML(), DictReader, family, outer=SHARD).dry_run(0), *words)


# Signature ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", CASES)
def test_signatures_are_plain_data(name):
    signature = subject(name, dtype=torch.float32).describe(0)
    assert Signature.of_dict(signature.as_dict()) == signature


def test_a_signature_of_single_tensors_is_that_of_earlier_versions():
    signature = learner(MAML(), lambda: nn.Linear(2, 2), Curves(), dtype=torch.float32).describe(0)
    assert signature.as_dict() == {
        "input": {"shape": [2], "dtype": "float32"},
        "target": {"shape": [2], "dtype": "float32"},
        "classes": None,
        "any_classes": False,
        "finite": True,
    }


def test_predictions_are_described():
    kinds = {
        name: subject(name, dtype=torch.float32).describe(0).prediction for name in ("gaussian", "quantiles", "flat")
    }
    shapes = {name: {part: kind.shape for part, kind in found.items()} for name, found in kinds.items()}
    assert shapes == {"gaussian": {"0": (1,), "1": (1,)}, "quantiles": {"": (3,)}, "flat": {"": ()}}
    assert isinstance(Uncertain(), type(subject("gaussian").tasks))


def test_inputs_are_checked_by_name():
    signature = subject("dict", dtype=torch.float32).describe(0)
    x = Described().example(keys(0).each()[0], "support", 2).x
    found = signature.inputs("x", {n: x[n] for n in reversed(x)})
    assert list(found) == ["tokens", "mask", "scale"]
    for wrong, words in (
        (x["tokens"], "x is one tensor; the model takes tensors mask, scale, tokens"),
        ({**x, "more": x["mask"]}, "x is tensors mask, more, scale, tokens; the model takes"),
        ({**x, "scale": x["scale"][:1]}, "the tensors of x differ in rows: x.tokens 2, x.mask 2, x.scale 1"),
        ({**x, "tokens": x["tokens"][:, :2]}, r"x.tokens has shape [2, 2]; the model takes [N, 3]"),
        ({**x, "tokens": x["tokens"].float()}, "x.tokens holds floating-point numbers"),
        ({**x, "mask": x["tokens"]}, "x.mask holds numbers that bool cannot hold"),
        ({**x, "mask": "no"}, "x.mask is str"),
    ):
        with pytest.raises(InvalidInput) as error:
            signature.inputs("x", wrong)
        assert words in str(error.value)
    assert signature.inputs("x", {**x, "mask": x["mask"].long()})["mask"].equal(x["mask"])


@pytest.mark.parametrize(
    "tree", [1, {"a": 1}, (1,), {"a": (1, {"b": 2}), "c": 3}, tuple(range(12)), ({"x": 1}, (2, 3))], ids=str
)
def test_names_are_those_of_one_tree(tree):
    as_tensors = torch.utils._pytree.tree_map(torch.tensor, tree)
    assert of_names({n: int(t) for n, t in named(as_tensors).items()}) == tree


@pytest.mark.parametrize("names", [[], ["", "a"], ["a", "a.b"], ["0", "2"], ["1"]])
def test_names_of_no_tree(names):
    with pytest.raises(ValueError, match=""):
        of_names(dict.fromkeys(names, 1))


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("dict", ("--compare: 'Described' has several tensors", "tokens: [1, 4, 3]")),
        ("gaussian", ("--compare: nearest_neighbour predicts [4, 1], and the metric of 'Uncertain' does not take it",)),
    ],
)
def test_baselines_that_have_no_such_inputs_or_predictions(name, words):
    refused(lambda: measure(CASES[name][0](), ["nearest_neighbour"], keys(0)), *words)
