"""Meta-Weight-Net and learning to reweight in float64, against autograd through the look-ahead on the whole batch."""

import math

import pytest
import torch
import torch.nn.functional as F
from ragged import Shades
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from toys import Blobs, learner, train

from metadist.algorithms import MetaWeightNet, Plain, Reweight
from metadist.core.algorithm import TaskContext
from metadist.core.computation import StageSum, computation_of
from metadist.core.engine import Engine
from metadist.core.errors import ConfigError
from metadist.core.outer import OuterLoop
from metadist.core.random import TaskKey
from metadist.core.round import MetaStepKey, run_rounds
from metadist.core.stages import example_losses, slopes
from metadist.core.state import State, TreeSum
from metadist.core.task import Examples
from metadist.learners.few_shot import FewShotLearner
from metadist.models import MLP, Conv4
from metadist.testing import check_algorithm
from metadist.training.scheduler import fault_of

TASKS, LR = 5, 0.3


class Attending(nn.Module):
    """Attention over the two halves of x [N, 4]; ``build`` is that of a model config."""

    def __init__(self):
        super().__init__()
        self.attention, self.head = nn.MultiheadAttention(2, 1, batch_first=True), nn.Linear(4, 3)

    @staticmethod
    def build(input_shape, outputs):
        return Attending()

    def forward(self, x):
        parts = x.unflatten(-1, (2, 2))
        return self.head(torch.tanh(self.attention(parts, parts, parts, need_weights=False)[0]).flatten(1))


PICTURES = Blobs(input_shape=(1, 8, 8))
MODELS = {
    "mlp": (Blobs(), MLP(hidden=(8,), activation="tanh")),
    "attention": (Blobs(), Attending),
    "batch norm": (PICTURES, Conv4(filters=4, blocks=2, norm="batch", pooling="stride", features="mean")),
}


def shared(algorithm, model="mlp", *, shard_size=2, outer=None, **options) -> FewShotLearner:
    family, config = MODELS[model]
    outer = outer or OuterLoop(optimizer="sgd", lr=LR, meta_batch_size=TASKS, shard_size=shard_size, meta_steps=3)
    return learner(algorithm, lambda: config.build(family.input_shape, 3), family, outer=outer, **options)


def whole_batch(subject, meta_step=0):
    """The tasks of a meta-step, and the losses of all training and clean examples as functions of the parameters."""
    tasks = subject.sample(TaskKey.of(0, "train", meta_step, range(TASKS)))
    module = subject.model.module

    def losses(parameters, part):
        sets = [(part.x[i], part.y[i]) for i in range(TASKS)]
        with sdpa_kernel(SDPBackend.MATH):  # the reference differentiates twice
            outputs = [torch.func.functional_call(module, parameters, (x,)) for x, _ in sets]
        return torch.cat([F.cross_entropy(o, y, reduction="none") for o, (_, y) in zip(outputs, sets)])

    return lambda p: losses(p, tasks.support), lambda p: losses(p, tasks.query)


def leaves(subject, state, slot):
    return {n: t.clone().requires_grad_() for n, t in state.theta(subject.slots)[slot].items()}


def net(values, losses):
    hidden = torch.relu(torch.outer(losses, values["hidden.weight"]) + values["hidden.bias"])
    return torch.sigmoid(hidden @ values["output.weight"] + values["output.bias"])


def flat(tensors):
    return torch.cat([t.flatten() for t in tensors])


@pytest.mark.parametrize("model", MODELS)
@pytest.mark.parametrize("shard_size", [1, 2, 5])
def test_meta_weight_net_is_autograd_through_the_look_ahead(model, shard_size):
    """Two meta-steps: ∂ clean loss(θ − α ∇ weighted loss(θ)) / ∂ weight net, then the model under the new weights."""
    decay = 0.01
    algorithm = MetaWeightNet(hidden=7, lr_of_weight_net=2.0, weight_decay_of_weight_net=decay, look_ahead_lr=0.7)
    subject = shared(algorithm, model, shard_size=shard_size)
    state = subject.initial(0)
    expected = {slot: leaves(subject, state, slot) for slot in ("model", "weight_net")}
    for meta_step in range(2):
        training, clean = whole_batch(subject, meta_step)
        theta, weighing = expected["model"], expected["weight_net"]

        def weighted(theta, weighing, training=training):
            found = training(theta)
            return (net(weighing, found.detach()) * found).mean()

        first = torch.autograd.grad(weighted(theta, weighing), list(theta.values()), create_graph=True)
        ahead = {n: t - 0.7 * g for (n, t), g in zip(theta.items(), first)}
        outer = torch.autograd.grad(clean(ahead).mean(), list(weighing.values()))
        moved = {n: t - 2.0 * (g + decay * t) for (n, t), g in zip(weighing.items(), outer)}
        weighing = {n: t.detach().requires_grad_() for n, t in moved.items()}
        second = torch.autograd.grad(weighted(theta, weighing), list(theta.values()))
        theta = {n: (t - LR * g).detach().requires_grad_() for (n, t), g in zip(theta.items(), second)}
        expected = {"model": theta, "weight_net": weighing}
    got = train(subject, 2)
    for slot, values in expected.items():
        change = flat(t.detach() for t in values.values()) - state.slots[slot]
        error = (got.slots[slot] - state.slots[slot] - change).norm() / change.norm()
        assert float(error) < 1e-9, slot
    assert got.slots["direction"].equal(state.slots["direction"]), "published for a round, not kept"


@pytest.mark.parametrize("model", MODELS)
@pytest.mark.parametrize("shard_size", [1, 2, 5])
def test_reweighting_is_autograd_by_the_weights_at_zero(model, shard_size):
    """ε ← max(−∂ clean loss(θ − α Σ ε_i ∇ℓ_i) / ∂ε at ε = 0, 0), normalised over all shards; then one step of SGD."""
    subject = shared(Reweight(), model, shard_size=shard_size)
    state = subject.initial(0)
    training, clean = whole_batch(subject)
    theta = leaves(subject, state, "model")
    found = training(theta)
    epsilon = torch.zeros(len(found), dtype=torch.float64, requires_grad=True)
    first = torch.autograd.grad((epsilon * found).sum(), list(theta.values()), create_graph=True)
    ahead = {n: t - LR * g for (n, t), g in zip(theta.items(), first)}
    (slope,) = torch.autograd.grad(clean(ahead).mean(), epsilon)
    weights = (-slope).clamp(min=0)
    assert 0 < int((weights > 0).sum()) < len(weights), "some examples help and some do not"
    gradient = torch.autograd.grad((weights / weights.sum() * training(theta)).sum(), list(theta.values()))
    got = train(subject, 1)
    change = -LR * flat(gradient)
    error = (got.slots["model"] - state.slots["model"] - change).norm() / change.norm()
    assert float(error) < 1e-9
    assert float(got.slots["total"]) == pytest.approx(float(weights.mean()) / LR, rel=1e-9)


def test_without_any_weight_the_model_stays():
    """A clean gradient that disagrees with every example: here, its negative is published."""
    subject = shared(Reweight())
    state = subject.initial(0)

    def run(round):
        total = TreeSum(len(round.shards))
        for shard in round.shards:
            total.add(shard.index, subject.compute(shard, round.parameters.slots))
        found = total.result()
        return found.scaled(0.0) if round.index == 0 else found

    new, report = run_rounds(subject.meta_step(MetaStepKey("run", 0, 0), state), run)
    assert new.slots["model"].equal(state.slots["model"])
    assert float(new.slots["total"]) == report["gradient_norm"] == 0.0


@pytest.mark.parametrize("clean", [False, True])
def test_plain_training_is_the_gradient_of_the_mean_loss(clean):
    subject = shared(Plain(clean=clean))
    state = subject.initial(0)
    training, trusted = whole_batch(subject)
    theta = leaves(subject, state, "model")
    loss = (training(theta).mean() + trusted(theta).mean()) / 2 if clean else training(theta).mean()
    change = -LR * flat(torch.autograd.grad(loss, list(theta.values())))
    got = train(subject, 1).slots["model"] - state.slots["model"]
    assert float((got - change).norm() / change.norm()) < 1e-9


@pytest.mark.parametrize(
    "algorithm",
    [pytest.param(MetaWeightNet(hidden=5), marks=pytest.mark.long), Reweight()],
    ids=["meta_weight_net", "reweight"],
)
@pytest.mark.lane("compile")
def test_compiled_stages_are_the_eager_ones(algorithm):
    eager, compiled = shared(algorithm), shared(algorithm)
    compiled.set_engine(Engine(compile=True))
    assert compiled.miscompiled(0) is None
    expected, got = train(eager, 2), train(compiled, 2)
    for slot in ("model", *({"weight_net"} & set(got.slots))):
        assert float((got.slots[slot] - expected.slots[slot]).norm() / expected.slots[slot].norm()) < 1e-10


def test_rounds_publish_and_update_what_they_say():
    subject, seen = shared(MetaWeightNet(hidden=5)), []
    state = subject.initial(0)

    def run(round):
        seen.append((round.index, round.shards[0].computation.stage, {s.round for s in round.shards}))
        assert {s.key_step for s in round.shards} == {7}
        published = State(round.parameters.slots)
        total = TreeSum(len(round.shards))
        for shard in round.shards:
            result = subject.compute(shard, published.slots)
            assert fault_of(result, shard, subject, True) is None
            wrong = computation_of("stage", {"stage": "clean" if shard.computation.stage == "weights" else "weights"})
            assert "expected" in fault_of(result, type(shard)(**{**vars(shard), "computation": wrong}), subject, True)
            total.add(shard.index, result)
        return total.result()

    _, report = run_rounds(subject.meta_step(MetaStepKey("run", 7, 0), state), run)
    assert seen == [(i, s, {i}) for i, s in enumerate(("train", "clean", "weights", "train"))]
    assert {"loss", "accuracy", "clean/loss", "weight_net/gradient_norm", "gradient_norm", "lr"} <= report.keys()
    assert all(math.isfinite(v) for v in report.values())


def test_a_stage_is_an_argument_of_a_shard():
    assert computation_of("stage", {"stage": "clean"}) == StageSum("clean")
    with pytest.raises(ValueError, match="no argument"):
        computation_of("stage", {"stage": "clean", "epsilon": 1.0})


@pytest.mark.parametrize("algorithm", [MetaWeightNet(hidden=5), Reweight(), Plain()])
def test_a_run_can_begin_with_it(algorithm):
    shared(algorithm, dtype=torch.float32).dry_run(0)


def test_settings_are_checked():
    with pytest.raises(ConfigError, match="algorithm.hidden"):
        MetaWeightNet(hidden=0)
    with pytest.raises(ConfigError, match="algorithm.look_ahead_lr"):
        MetaWeightNet(look_ahead_lr=-1.0)


@pytest.mark.lane("numerics")
@pytest.mark.parametrize("algorithm", [MetaWeightNet(hidden=5), Reweight()], ids=["meta_weight_net", "reweight"])
def test_each_stage_passes_the_check_of_algorithms(algorithm):
    check_algorithm(algorithm)


def test_weighted_tasks_of_several_sizes_have_no_logits_of_classes_that_they_lack():
    """Reference: the losses of examples over the first ``ways`` logits alone."""
    family, config = Shades(), MLP(hidden=(4,))
    subject = learner(MetaWeightNet(), lambda: config.build(family.input_shape, 5), family, outer=OuterLoop())
    state = subject.initial(0)
    theta = state.theta(subject.slots)
    keys, singles = TaskKey.of(0, "train", 0, range(8)), [TaskKey.of(0, "train", 0, [i]) for i in range(8)]
    task = next(t for t in (subject.sample(key) for key in singles) if int(t.ways) < 5)
    x, y, ways = task.support.x[0], task.support.y[0], task.ways[0]
    context = TaskContext(keys.each()[0], 0, True, family, task_ways=ways)
    model = subject.bind(theta, keys.each()[0], True)
    losses, _ = example_losses(model, theta["model"], Examples(x, y), context)
    logits = torch.func.functional_call(subject.model.module, dict(theta["model"]), (x,))
    assert torch.allclose(losses, F.cross_entropy(logits[:, : int(ways)], y, reduction="none"), rtol=1e-10)
    _, along, _ = slopes(model, theta["model"], theta["model"] * 0.5, Examples(x, y), context)
    assert bool(torch.isfinite(along).all())


@pytest.mark.parametrize("algorithm", [MetaWeightNet(hidden=5), Reweight()], ids=["meta_weight_net", "reweight"])
def test_classes_that_a_task_lacks_are_in_no_training_loss(algorithm):
    """The training stage of a task with two classes, against autograd over its own two of the model's five logits."""
    family = Shades()
    subject = learner(algorithm, lambda: nn.Sequential(nn.Flatten(), nn.Linear(64, 5)), family)
    drawn = (TaskKey.of(0, "train", 0, [start]) for start in range(0, 100, 2))
    keys = next(key for key in drawn if family.shape_of(key, "train")[0] == 2)
    state = subject.initial(0)
    support = subject.sample(keys).support
    theta = leaves(subject, state, "model")
    logits = torch.func.functional_call(subject.model.module, theta, (support.x[0],))[:, :2]
    losses = F.cross_entropy(logits, support.y[0], reduction="none")
    if isinstance(algorithm, MetaWeightNet):
        weights = net(leaves(subject, state, "weight_net"), losses.detach()).detach()
    else:  # the direction that nothing was published for is θ itself
        slopes = [torch.autograd.grad(one, list(theta.values()), retain_graph=True) for one in losses]
        direction = flat(t.detach() for t in theta.values())
        weights = torch.stack([flat(slope) @ direction for slope in slopes]).clamp(min=0)
    expected = flat(torch.autograd.grad((weights * losses).mean(), list(theta.values())))
    got = subject.parts[0].contribute(state.theta(subject.slots), keys, 0).slots["model"]
    assert float((got - expected).norm() / expected.norm()) < 1e-9
