"""Meta-gradients in float64 against a plain autograd loop over tasks, finite differences, and identities."""

import plain
import pytest
import torch
from gradient_cases import ALGORITHMS, CASES, cnp_learner, make, plain_cnp, plain_contribution
from toys import Blobs, Curves, keys, learner, relative_error, somewhere

from metadist.algorithms import ANIL, MAML, MetaSGD, ProtoNet, Reptile
from metadist.core.outer import OuterLoop
from metadist.models import MLP, Conv4
from metadist.tasks import Omniglot


@pytest.mark.parametrize(("algorithm", "model"), CASES)
def test_meta_gradient_is_the_plain_loop_s(algorithm, model):
    subject, shard = make(ALGORITHMS[algorithm], model), keys(0, 1, 5)
    theta = somewhere(subject)
    got = subject.contribute(theta, shard, 3)
    expected, loss = plain_contribution(subject, theta, shard)
    assert got.slots.keys() == expected.keys()
    for slot, vector in expected.items():
        assert relative_error(got.slots[slot], vector) <= 1e-10, slot
    assert got.metrics["loss"] == pytest.approx(loss, rel=1e-12)
    assert (got.weight, got.tasks) == (3.0, 3)


@pytest.mark.lane("numerics")
@pytest.mark.parametrize("algorithm", ["maml-1", "maml-5", "protonet"])
@pytest.mark.parametrize("pooling", ["stride", "max"])
def test_on_the_network_and_the_data_of_the_main_job(algorithm, pooling, data):
    method, family, config = (
        ALGORITHMS[algorithm],
        Omniglot(query_shots=2),
        Conv4(filters=64, pooling=pooling, features="mean" if pooling == "stride" else "flatten"),
    )
    subject = learner(method, lambda: config.build(family.input_shape, method.outputs(family)), family)
    subject.prepare(torch.device("cpu"))
    theta = somewhere(subject)
    expected, _ = plain_contribution(subject, theta, keys(0, 1))
    assert relative_error(subject.contribute(theta, keys(0, 1), 3).slots["model"], expected["model"]) <= 1e-10


def test_first_order_differs_from_second_order():
    """Otherwise, the tests above would prove nothing about either."""
    shard = keys(0, 1)
    second, first = (make(ALGORITHMS[a], "mlp") for a in ("maml-1", "fomaml-1"))
    theta = somewhere(second)
    assert (
        relative_error(
            first.contribute(theta, shard, 3).slots["model"], second.contribute(theta, shard, 3).slots["model"]
        )
        > 1e-2
    )


def test_dropout_depends_on_task_and_step_alone():
    subject = make(ALGORITHMS["maml-5"], "own")
    theta = somewhere(subject)
    together = subject.contribute(theta, keys(0, 1), 3).slots["model"]
    apart = sum(subject.contribute(theta, keys(i), 3).slots["model"] for i in (0, 1))
    assert relative_error(apart, together) < 1e-12
    elsewhere = subject.contribute(theta, keys(0, 1, meta_step=4), 4).slots["model"]
    assert relative_error(elsewhere, together) > 1e-2


# A conditional neural process ----------------------------------------------------------------------------------------


def test_cnp_gradient_is_the_plain_loop_s():
    subject, shard = cnp_learner(), keys(0, 1, 5)
    theta = somewhere(subject)
    expected, loss = plain_contribution(subject, theta, shard, plain_cnp)
    got = subject.contribute(theta, shard, 3)
    assert relative_error(got.slots["model"], expected["model"]) <= 1e-10
    assert got.metrics["loss"] == pytest.approx(loss, rel=1e-12)


# Finite differences --------------------------------------------------------------------------------------------------

SMALL = {
    "maml": (MAML(inner_lr=0.2, inner_steps=3), Curves()),
    "adam": (MAML(inner_lr=0.05, inner_steps=2, inner_optimizer="adam", inner_eps=1e-3), Curves()),
    "anil": (ANIL(inner_lr=0.2, inner_steps=2), Curves()),
    "meta_sgd": (MetaSGD(inner_lr=0.2, inner_steps=2), Curves()),
    "protonet": (ProtoNet(), Blobs()),
}


@pytest.mark.parametrize("name", [*SMALL, "cnp"])
def test_finite_differences(name):
    """The differences of the reported loss against the returned gradient, in the coordinates of every slot."""
    if name == "cnp":
        subject = cnp_learner()
    else:
        algorithm, family = SMALL[name]
        config = MLP(hidden=(3,), activation="tanh")
        subject = learner(algorithm, lambda: config.build(family.input_shape, algorithm.outputs(family)), family)
    theta, shard, h = somewhere(subject), keys(0, 1), 1e-5
    gradient = subject.contribute(theta, shard, 0).slots
    for slot, layout in ((n, s.layout) for n, s in subject.slots.items()):
        vector = layout.flatten(theta[slot])

        def loss(shift, slot=slot, layout=layout, vector=vector):
            return subject.contribute({**theta, slot: layout.unflatten(vector + shift)}, shard, 0).metrics["loss"]

        chosen = range(layout.numel) if layout.numel < 40 else range(0, layout.numel, layout.numel // 20)
        units = torch.eye(layout.numel, dtype=torch.float64)
        differences = torch.tensor([(loss(h * units[i]) - loss(-h * units[i])) / (2 * h) for i in chosen])
        assert relative_error(gradient[slot][list(chosen)], differences.double()) < 1e-7, slot


# Reptile -------------------------------------------------------------------------------------------------------------


def support_gradients(subject, theta, shard):
    """Return Σ over tasks of ∇θ of the loss on the support set."""

    def objective(learner, leaves, key, task):
        model = plain.Plain(learner.model.module, key)
        return plain.loss(learner.tasks, model(leaves["model"], task.support.x, step=0), task.support)

    return plain_contribution(subject, theta, shard, objective)[0]["model"]


@pytest.mark.parametrize("model", ["mlp", "conv4-stride-batch"])
def test_reptile_s_one_step_identity(model):
    """After one step of SGD, θ − φ is the rate times the gradient."""
    subject, shard = make(Reptile(inner_lr=0.3), model), keys(0, 1, 4)
    theta = somewhere(subject)
    delta = subject.contribute(theta, shard, 0).slots["model"]
    assert relative_error(delta, 0.3 * support_gradients(subject, theta, shard)) <= 1e-10


@pytest.mark.parametrize("moments", ["fresh", "carried"])
@pytest.mark.parametrize(("optimizer", "momentum"), [("adam", 0.0), ("sgd", 0.9)])
def test_reptile_s_moments_against_an_optimiser_with_state(moments, optimizer, momentum):
    """Two meta-steps of two tasks; moments start at zero, or at the mean over the tasks of the last meta-step."""
    betas, eps, lr, steps = (0.5, 0.99), 1e-6, 0.05, 3
    algorithm = Reptile(
        inner_lr=lr,
        inner_steps=steps,
        inner_optimizer=optimizer,
        inner_momentum=momentum,
        inner_betas=betas,
        inner_eps=eps,
        moments=moments,
    )
    subject = make(algorithm, "mlp", outer=OuterLoop(optimizer="sgd", lr=0.7, meta_batch_size=2, shard_size=2))
    state = subject.initial(0)
    layout = subject.slots["model"].layout
    theta = state.slots["model"].clone()
    first, second, count = torch.zeros_like(theta), torch.zeros_like(theta), 0
    for meta_step in range(2):
        total = subject.contribute(state.theta(subject.slots), keys(0, 1, meta_step=meta_step), meta_step)
        state, _ = subject.outer.update(subject.slots, state, total, meta_step)
        ends = []
        for key in keys(0, 1, meta_step=meta_step).each():
            phi, m, v, t = theta.clone(), first.clone(), second.clone(), count
            for _ in range(steps):
                g = support_gradients(
                    subject, {"model": layout.unflatten(phi)}, keys(int(key.tasks), meta_step=meta_step)
                )
                t += 1
                if optimizer == "adam":
                    m.mul_(betas[0]).add_(g, alpha=1 - betas[0])
                    v.mul_(betas[1]).addcmul_(g, g, value=1 - betas[1])
                    phi.sub_(lr * (m / (1 - betas[0] ** t)) / (v / (1 - betas[1] ** t) + eps).sqrt())
                else:
                    m.mul_(momentum).add_(g)
                    phi.sub_(lr * m)
            ends.append((phi, m, v))
        if moments == "carried":
            first, second, count = (ends[0][1] + ends[1][1]) / 2, (ends[0][2] + ends[1][2]) / 2, t
        theta = theta - 0.7 * sum(theta - phi for phi, _, _ in ends) / 2
    assert relative_error(state.slots["model"], theta) < 1e-10
    if moments == "carried":
        assert relative_error(state.slots["inner_first"], first) < 1e-10
        assert state.slots["inner_count"].item() == 2 * steps


# Frozen and missing parts --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("algorithm", ["maml-5", "meta_sgd", "anil"])
def test_frozen_parts_are_neither_adapted_nor_updated(algorithm):
    subject, shard = make(ALGORITHMS[algorithm], "own", freeze=("stem.*", "first.weight")), keys(0, 1)
    state = subject.initial(0)
    assert set(state.theta(subject.slots)["frozen"]) == {"stem.weight", "stem.bias", "first.weight"}
    total = subject.contribute(state.theta(subject.slots), shard, 3)
    assert "frozen" not in total.slots
    expected, _ = plain_contribution(subject, state.theta(subject.slots), shard)
    assert relative_error(total.slots["model"], expected["model"]) <= 1e-10
    after, _ = subject.outer.update(subject.slots, state, total, 0)
    assert after.slots["frozen"].equal(state.slots["frozen"])
    assert not after.slots["model"].equal(state.slots["model"])
