"""The architecture search in float64, against Reptile and first-order DARTS in a plain loop."""

import math

import pytest
import torch
import torch.nn.functional as F
from toys import Blobs, keys, learner, somewhere, train

from metadist.algorithms import MAML, MetaNAS, Reptile
from metadist.algorithms.metanas import _halves
from metadist.core.errors import ConfigError
from metadist.core.outer import OuterLoop
from metadist.core.task import Examples
from metadist.models import MLP
from metadist.models.supernet import OPERATIONS, Supernet

IMAGES = Blobs(shots=4, input_shape=(1, 8, 8))
SEARCH = MetaNAS(inner_lr=0.1, inner_steps=2, architecture_lr=0.5, temperature_steps=4)


def searching(algorithm=SEARCH, config=Supernet(filters=4, cells=2), **options):
    return learner(algorithm, lambda: config.build(IMAGES.input_shape, 3), IMAGES, **options)


def test_it_is_reptile_around_first_order_darts():
    subject, shard = searching(), keys(0, 1, 4)
    theta = somewhere(subject)
    expected = {"model": 0.0, "architecture": 0.0}
    tasks = subject.sample(shard)
    for i in range(3):
        x, y = tasks.support.x[i], tasks.support.y[i]
        half, key = len(y) // 2, shard.each()[i]
        w, alpha = dict(theta["model"]), theta["architecture"]["logits"]
        for step in range(2):
            order = key.stream("halves", step).bits(len(y)).argsort()
            leaves, logits = {n: t.clone().requires_grad_() for n, t in w.items()}, alpha.clone().requires_grad_()

            def loss(w, alpha, rows, x=x, y=y):
                mixture = torch.softmax(alpha / 1.0, 1)
                return F.cross_entropy(torch.func.functional_call(subject.model.module, w, (x[rows], mixture)), y[rows])

            for_w = torch.autograd.grad(loss(leaves, alpha, order[:half]), list(leaves.values()))
            (for_alpha,) = torch.autograd.grad(loss(w, logits, order[half:]), logits)
            w, alpha = {n: t - 0.1 * g for (n, t), g in zip(w.items(), for_w)}, alpha - 0.5 * for_alpha
        expected["model"] += torch.cat([(theta["model"][n] - w[n]).flatten() for n in w])
        expected["architecture"] += (theta["architecture"]["logits"] - alpha).flatten()
    got = subject.contribute(theta, shard, 3)
    for slot, vector in expected.items():
        assert float((got.slots[slot] - vector).norm() / vector.norm()) < 1e-10, slot
    assert float(got.slots["temperature"]) == pytest.approx(3 * 0.05)


def test_the_temperature_falls_geometrically_and_one_operation_remains():
    outer = OuterLoop(optimizer="sgd", lr=1.0, meta_batch_size=2, shard_size=1, meta_steps=4)
    subject = searching(outer=outer)
    values = [float(train(subject, n).slots["temperature"]) for n in range(6)]
    assert values == pytest.approx([0.05 ** (min(n, 4) / 4) for n in range(6)])
    theta = {"architecture": {"logits": torch.tensor([[0.0, 0.0, 0.1, 0.0, 0.0], [0.2, 0.0, 0.1, 0.0, 0.0]])}}
    assert SEARCH.discretised(subject.model, theta) == {"operations": ["pool", "conv3"]}
    assert MAML().discretised(subject.model, theta) is None


def test_the_architecture_is_fixed_in_evaluation():
    subject = searching(MetaNAS(inner_lr=0.1, inner_steps=2, architecture_lr=0.5, inner_optimizer="adam"))
    theta = somewhere(subject)
    task = subject.sample(keys(0, split="test"))
    phi = subject.adapt(subject.initial(0), type(task.support)(task.support.x[0], task.support.y[0]))
    assert phi["parameters"]["architecture"].equal(subject.initial(0).theta(subject.slots)["architecture"]["logits"])
    assert math.isfinite(float(subject.evaluate(theta, keys(0, 1, split="test"), 0).columns["loss"].sum()))


def test_a_network_of_the_space_is_the_supernet_with_one_weight():
    chosen = ("pool", "conv3")
    one, whole = Supernet(4, 2, chosen).build((1, 8, 8), 3), Supernet(4, 2).build((1, 8, 8), 3)
    whole.load_state_dict(one.state_dict(), strict=False)
    mixture = torch.zeros(2, 5)
    for cell, name in enumerate(chosen):
        mixture[cell, OPERATIONS.index(name)] = 1.0
    x = torch.randn(6, 1, 8, 8, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(one(x), whole(x, mixture))


def test_a_run_can_begin_with_both():
    searching(dtype=torch.float32).dry_run(0)
    searching(Reptile(inner_steps=2), Supernet(4, 2, ("zero", "conv1")), dtype=torch.float32).dry_run(0)


def test_what_does_not_fit_is_refused():
    with pytest.raises(ConfigError, match=r"model.operations: 1 for 2 cells"):
        Supernet(cells=2, operations=("conv3",))
    with pytest.raises(ConfigError, match="model.operations.0: .*nearest|model.operations.0"):
        Supernet(cells=1, operations=("conv7",))
    with pytest.raises(ConfigError, match="fixes the architecture; leave it out, or learn by reptile"):
        searching(config=Supernet(4, 2, ("zero", "conv1")))
    with pytest.raises(ConfigError, match="use model: {name: supernet}"):
        learner(SEARCH, lambda: MLP().build(IMAGES.input_shape, 3), IMAGES)
    with pytest.raises(ConfigError, match="model.cells: 3 cells leave no pixel"):
        Supernet(cells=3).build((1, 8, 8), 3)


@pytest.mark.parametrize("real", [1, 2, 5])
def test_the_halves_of_padded_rows_are_those_without_padding(real):
    words = keys(0, 0, 1).each()[0].stream("halves", 0).bits(16)
    values = torch.arange(16.0)
    plain = _halves(Examples(values[:real], values[:real]), words[:real])
    padded = _halves(Examples(values, values, torch.arange(16) < real), words)
    for expected, found in zip(plain, padded):
        assert sorted(found.real(found.y).tolist()) == sorted(expected.y.tolist())
        assert float(found.mean(values)) == pytest.approx(float(expected.y.mean()))
