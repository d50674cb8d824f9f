"""Learned optimisers in the carried learner, with networks of several shapes: against particles in plain Python."""

from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from ragged import Shades
from tiny import train
from torch import nn
from torch.utils._pytree import tree_leaves
from wide import CASES, Described, DictReader, Encoder, Gated, PairReader, Pairs, Recurrent, Sequences

import metadist
from metadist.algorithms.lstm_optimizer import LSTMOptimizer
from metadist.algorithms.mlp_optimizer import MLPOptimizer
from metadist.config.build import build
from metadist.core.engine import Engine
from metadist.core.errors import ConfigError
from metadist.core.model import Model, use_batch_statistics
from metadist.core.outer import OuterLoop, SlotOptimizer
from metadist.core.random import TaskKey
from metadist.core.round import EvaluationRequest, MetaStepKey
from metadist.core.task import Examples
from metadist.engine.plan import Device
from metadist.learners.carried import CarriedLearner
from metadist.models.conv4 import Conv4
from metadist.models.mlps import MLPs
from metadist.testing.carried import LearnedRate, Population
from metadist.testing.quadratics import Linear, Quadratics

NETWORKS = MLPs(networks=((3,), (2, 2)), test_networks=((4,),), each=2)
OUTER = OuterLoop(meta_batch_size=4, shard_size=2)


def learner(algorithm, networks=NETWORKS, outer=OUTER, dtype=torch.float64):
    return CarriedLearner(algorithm, Model(networks.variants((3,), 1), dtype=dtype), Quadratics(), outer)


def advanced(subject, theta, meta_steps):
    """The contributions of the shards of each meta-step, with the states handed on as an executor does."""
    kept, found = {}, []
    for meta_step in range(meta_steps):
        rounds = subject.meta_step(MetaStepKey("run", meta_step, 0), subject.initial(0))
        shards = next(rounds).shards
        done = [subject.compute(shard, theta, [kept[key] for key in shard.needs]) for shard in shards]
        kept = {shard.key: one.output for shard, one in zip(shards, done)}
        found.append([one.result for one in done])
    return found


@pytest.mark.parametrize("estimator", ["truncated", "es", "pes"])
@pytest.mark.parametrize("kind", [LSTMOptimizer, MLPOptimizer])
def test_shards_are_particles_in_plain_python(kind, estimator):
    algorithm = kind(window=2, unroll=(2, 6), batch_size=3, scales=(0.5, 2.0))
    subject, engine = learner(algorithm), Engine(differentiation=estimator)
    subject.set_engine(engine)
    state = subject.initial(0)
    theta = state.theta(subject.slots)
    plain = Population(algorithm, subject.model, Quadratics(), size=4, engine=engine)
    for meta_step, shards in enumerate(advanced(subject, state.slots, 4)):
        each = plain.advance(theta, meta_step)
        for number, shard in enumerate(shards):
            pair = each[2 * number : 2 * number + 2]
            vectors = [subject.slots["optimizer"].layout.flatten(c.slots["optimizer"]) for c in pair]
            expected = vectors[0] + vectors[1]
            assert shard.slots.keys() == {"optimizer"}
            assert (shard.slots["optimizer"] - expected).abs().max() < 1e-8 * (1e-3 + expected.abs().max())


@pytest.mark.parametrize("name", ["dict", "tuple", "output"])
@pytest.mark.parametrize("batch_size", [None, 3])
def test_networks_with_inputs_of_several_tensors(name, batch_size):
    """The minibatches of a window are rows of every tensor, as the ones of steps by hand are."""
    family, module, _ = CASES[name]
    algorithm = LSTMOptimizer(window=2, unroll=4, batch_size=batch_size)
    subject = CarriedLearner(algorithm, Model(module, dtype=torch.float64), family(), OUTER)
    subject.dry_run(0)
    task = family().sample(TaskKey.of(0, "train", 0, [0]).each()[0], "train")
    rows = torch.tensor([2, 0, 2])
    batch = algorithm._batch(SimpleNamespace(task=task), rows)
    for tensor, whole in zip(tree_leaves([batch.x, batch.y]), tree_leaves([task.support.x, task.support.y])):
        assert torch.equal(tensor, whole[rows])


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"optimizers": {"optimiser": SlotOptimizer(lr=0.1)}}, "slot 'optimiser' is not in this experiment"),
        ({"optimizers": {"model": SlotOptimizer(lr=0.1)}}, "slot 'model' is constant and has no optimiser"),
        ({"optimizer": "muon"}, "muon, but slot 'optimizer' has no matrices"),
    ],
)
def test_optimizers_of_slots_that_are_not_learned_are_refused(settings, message):
    with pytest.raises(ConfigError, match=message):
        learner(MLPOptimizer(), outer=OuterLoop(meta_batch_size=4, shard_size=2, **settings))


def test_classes_and_rows_that_a_task_lacks_count_nowhere():
    """Tasks of 2 to 5 classes: training against particles in plain Python, evaluation against a loop over real rows."""
    family = Shades(same_size=1)
    algorithm = LSTMOptimizer(window=2, unroll=4, batch_size=None, evaluation_steps=1)

    def network(norm=False):
        return lambda: nn.Sequential(nn.Flatten(), *[nn.BatchNorm1d(64)] * norm, nn.Linear(64, 5))

    subject = CarriedLearner(algorithm, Model(network(), dtype=torch.float64), family, OUTER)
    state = subject.initial(0)
    theta = state.theta(subject.slots)
    plain = Population(algorithm, subject.model, family, size=4)
    (shards,) = advanced(subject, state.slots, 1)
    each = plain.advance(theta, 0)
    for number, shard in enumerate(shards):
        pair = each[2 * number : 2 * number + 2]
        expected = sum(subject.slots["optimizer"].layout.flatten(c.slots["optimizer"]) for c in pair)
        assert (shard.slots["optimizer"] - expected).abs().max() < 1e-8 * (1e-3 + expected.abs().max())
    keys = TaskKey.of(0, "test", 0, range(4))
    found = subject.evaluate(theta, keys, 1).columns
    assert len(set(found["ways"].tolist())) > 1
    for number, key in enumerate(keys.each()):
        task, context = family.sample(key, "test"), plain.context(theta, number, 0, 0, "test")
        inner = algorithm.start(theta, context)
        for step in range(2):
            inner = algorithm.step(theta, inner, context, 0) if step else inner
            logits = algorithm.predict(theta, inner, task.query.x.double(), context)[:, : int(task.ways)]
            loss = torch.nn.functional.cross_entropy(logits, task.query.y)
            assert found["loss"][number, step] == pytest.approx(float(loss), rel=1e-9)
            right = float((logits.argmax(-1) == task.query.y).double().mean())
            assert found["accuracy"][number, step] == pytest.approx(right)
    normed = CarriedLearner(algorithm, Model(lambda: use_batch_statistics(network(True)())), family, OUTER)
    with pytest.raises(ConfigError, match="batch normalisation over padded rows"):
        normed.sample(keys)


def test_tasks_have_networks_of_their_split():
    subject = learner(MLPOptimizer(evaluation_steps=2))
    shapes = {
        split: [tuple(p.shape for p in subject.model.variant(split, i).module.parameters())[0] for i in range(5)]
        for split in ("train", "validation", "test")
    }
    assert shapes["train"] == shapes["validation"] == [(3, 3), (3, 3), (2, 3), (2, 3), (3, 3)]
    assert shapes["test"] == [(4, 3)] * 5
    records = subject.evaluate(subject.initial(0).theta(subject.slots), TaskKey.of(0, "test", 0, range(3)), 2)
    assert records.columns["loss"].shape == (3, 3)


def test_a_shard_of_several_shapes_is_refused():
    with pytest.raises(ConfigError, match=r"outer.shard_size: 4, .* let model.each be a multiple of outer.shard_size"):
        learner(MLPOptimizer(), outer=OuterLoop(meta_batch_size=4, shard_size=4))


@pytest.mark.long
@pytest.mark.parametrize("estimator", ["truncated", "pes"])
def test_training_makes_an_optimizer_that_lowers_the_loss(estimator):
    """The loss of the networks after 30 steps, before and after meta-training, on test tasks."""
    # Few weights: the noise of an estimate by differences grows with their number.
    small = {"hidden": 4, "layers": 1, "batch_size": None, "step_size": 0.05}
    algorithm = MLPOptimizer(window=10, unroll=(10, 30), sigma=0.03, **small)
    networks = MLPs(networks=((4,),), each=16)
    outer = OuterLoop(meta_batch_size=16, shard_size=16, lr=0.02, clip_norm=1.0)
    subject = learner(algorithm, networks, outer, torch.float32)
    subject.set_engine(Engine(differentiation=estimator))
    state, kept = subject.initial(0), {}

    def loss(state):
        records = subject.evaluate(state.theta(subject.slots), TaskKey.of(0, "test", 0, range(16)), 30)
        return float(records.columns["loss"][:, -1].mean())

    before = loss(state)
    for meta_step in range(60):
        rounds = subject.meta_step(MetaStepKey("run", meta_step, 0), state)
        (shard,) = next(rounds).shards
        done = subject.compute(shard, state.slots, [kept[key] for key in shard.needs])
        kept = {shard.key: done.output}
        try:
            rounds.send(done.result)
        except StopIteration as end:
            state, _ = end.value
    assert loss(state) < 0.8 * before


def test_result_optimizer_trains_a_network_of_the_user_s(tmp_path):
    document = {
        "name": "optimizer",
        "tasks": {"name": "metadist.testing.quadratics:Quadratics"},
        "model": {"name": "mlps", "networks": [[2]], "each": 2},
        "algorithm": {"name": "mlp_optimizer", "window": 2, "unroll": 4, "batch_size": 3, "evaluation_steps": 2},
        "engine": {"differentiation": "pes"},
        "outer": {"meta_batch_size": 2, "shard_size": 2, "meta_steps": 2},
        "evaluate": {"every": 2, "tasks": 2, "test_tasks": 2},
        "workers": [{"min": 0, "max": 0}],
        "tracking": {"uri": "none"},
    }
    train(build(document), run_dir=str(tmp_path / "run"), plots=False)
    result = metadist.load(str(tmp_path / "run"))
    network = torch.nn.Linear(3, 2)
    start = network.weight.detach().clone()
    optimizer = result.optimizer(network.parameters())
    network(torch.ones(4, 3)).square().mean().backward()
    optimizer.step()
    assert isinstance(optimizer, torch.optim.Optimizer) and not torch.equal(network.weight, start)
    bare = CarriedLearner(LearnedRate(), Model(lambda: Linear().build((3,), 1)), Quadratics(), OUTER)
    with pytest.raises(ConfigError, match="algorithm 'LearnedRate' learns no optimiser"):
        bare.optimizer(bare.initial(0), network.parameters())


def test_an_optimizer_of_a_slot_that_is_not_there_is_refused():
    algorithm = MLPOptimizer(window=2, unroll=4, batch_size=3)
    misspelt = OuterLoop(meta_batch_size=4, shard_size=2, optimizers={"optimiser": SlotOptimizer(lr=1.0)})
    with pytest.raises(ConfigError, match="outer.optimizers.optimiser: slot 'optimiser' is not in this experiment"):
        learner(algorithm, outer=misspelt)
    with pytest.raises(ConfigError, match="muon, but slot 'optimizer' has no matrices"):
        learner(algorithm, outer=OuterLoop(meta_batch_size=4, shard_size=2, optimizer="muon"))


def test_an_evaluation_on_training_tasks_judges_the_network_of_one_life_without_an_estimator():
    """The first loss is that of the fresh network: the factors of ``scales`` cancel, whatever the run's meta-step."""
    algorithm = MLPOptimizer(window=2, unroll=4, batch_size=3, scales=(0.1, 10.0))
    subject = learner(algorithm)
    subject.set_engine(Engine(differentiation="pes"))
    state = subject.initial(0)
    request = EvaluationRequest(MetaStepKey("run", 3, 0), "train", 4, 2)
    [*shards] = subject.evaluation(request, state).shards
    found = torch.cat([subject.compute(shard, state.slots).columns["loss"] for shard in shards])
    population = Population(algorithm, subject.model, Quadratics(), size=4)
    for number in range(4):
        context = population.context(state.theta(subject.slots), number, 3, 3)
        query = context.task.query
        expected = context.loss(context.model(context.fresh(), query.x), query)
        assert float(found[number, 0]) == pytest.approx(float(expected), rel=1e-10)


def test_tasks_of_several_sizes_have_no_logits_of_classes_that_they_lack():
    """Reference: cross-entropy over the first ``ways`` logits alone, in training and evaluation."""
    family, networks = Shades(), MLPs(networks=((4,),), each=2)
    algorithm = MLPOptimizer(window=1, unroll=3, batch_size=None)
    model = Model(networks.variants(family.input_shape, family.outputs), dtype=torch.float64)
    subject = CarriedLearner(algorithm, model, family, OUTER)
    subject.prepare(torch.device("cpu"))
    subject.set_engine(Engine(differentiation="pes"))
    state = subject.initial(0)
    theta = state.theta(subject.slots)

    def loss_of(context, part):
        examples = getattr(context.task, part)
        logits = context.model(context.fresh(), examples.x)[:, : int(context.task.ways)]
        return float(F.cross_entropy(logits, examples.y))

    plain = Population(algorithm, subject.model, family, size=4)
    begun = [plain.context(theta, number, 0, 0) for number in range(4)]
    expected = sum(loss_of(context, "support") for context in begun)
    found = sum(shard.metrics["loss"] for shard in advanced(subject, state.slots, 1)[0])
    assert found == pytest.approx(expected, rel=1e-10)  # a window of one step: the loss before it
    request = EvaluationRequest(MetaStepKey("run", 0, 0), "test", 6, 1)
    shards = subject.evaluation(request, state).shards
    records = [subject.compute(shard, state.slots).columns for shard in shards]
    contexts = [plain.context(theta, number, 0, 0, "test") for number in range(6)]
    losses = torch.cat([r["loss"] for r in records])[:, 0]
    assert losses.tolist() == pytest.approx([loss_of(context, "query") for context in contexts], rel=1e-10)
    ways = torch.cat([r["ways"] for r in records]).tolist()
    assert ways == [int(context.task.ways) for context in contexts] and len(set(ways)) > 1


def test_batch_norm_over_tasks_of_several_sizes_is_refused():
    family = Shades()
    model = Model(lambda: Conv4(filters=2, blocks=1, norm="batch").build(family.input_shape, family.outputs))
    subject = CarriedLearner(MLPOptimizer(window=2, unroll=4), model, family, OUTER)
    subject.prepare(torch.device("cpu"))
    with pytest.raises(ConfigError, match="batch normalisation over padded rows"):
        subject.dry_run(0)


@pytest.mark.parametrize("estimator", ["truncated", "es"])
def test_a_window_of_one_step_whose_gradient_is_always_zero_is_refused(estimator):
    subject = learner(MLPOptimizer(window=1, unroll=4, batch_size=3))
    subject.set_engine(Engine(differentiation=estimator))
    with pytest.raises(
        ConfigError, match=f"algorithm.window: 1 with engine.differentiation: {estimator} learns nothing"
    ):
        subject.dry_run(0)
    subject.set_engine(Engine(differentiation="pes"))
    subject.dry_run(0)


@pytest.mark.parametrize("module", [Recurrent, Gated, Encoder])
def test_second_order_particles_train_recurrent_layers_and_attention(module):
    """Reference: central differences of the window's mean loss in float64."""
    algorithm = MLPOptimizer(window=2, unroll=2, batch_size=3, first_order=False, evaluation_steps=2, step_size=1.0)
    subject = CarriedLearner(algorithm, Model(module, dtype=torch.float64), Sequences(), OUTER)
    subject.prepare(torch.device("cpu"))
    subject.dry_run(0)
    shard = next(subject.meta_step(MetaStepKey("run", 0, 0), subject.initial(0))).shards[0]
    vectors = subject.initial(0).slots
    direction = torch.sin(torch.arange(len(vectors["optimizer"]), dtype=torch.float64))

    def loss_at(distance):
        moved = {**vectors, "optimizer": vectors["optimizer"] + distance * direction}
        return subject.compute(shard, moved).result.metrics["loss"]

    slope = float(subject.compute(shard, vectors).result.slots["optimizer"] @ direction)
    assert slope == pytest.approx((loss_at(1e-5) - loss_at(-1e-5)) / 2e-5, rel=1e-5) and abs(slope) > 1e-6


@pytest.mark.parametrize(("family", "module"), [(Described(), DictReader), (Pairs(), PairReader)])
def test_minibatches_of_dicts_and_tuples_have_the_drawn_rows(family, module):
    algorithm = MLPOptimizer(window=2, unroll=2, batch_size=3, evaluation_steps=2)
    subject = CarriedLearner(algorithm, Model(module, dtype=torch.float64), family, OUTER)
    subject.prepare(torch.device("cpu"))
    subject.dry_run(0)
    task = subject.sample(TaskKey.of(0, "train", 0, [0]))
    support = torch.utils._pytree.tree_map(lambda t: t[0], task.support)
    batch = algorithm._batch(Population(algorithm, subject.model, family).context({}, 0, 0, 0), torch.tensor([4, 1, 4]))
    for whole, part in zip(*(torch.utils._pytree.tree_leaves(e) for e in (support, batch))):
        assert torch.equal(part, torch.stack([whole[4], whole[1], whole[4]]))


@pytest.mark.parametrize("algorithm", [MLPOptimizer(window=2, unroll=4), LearnedRate()])
def test_init_from_is_refused_where_no_initial_parameters_are_learned(algorithm):
    networks = MLPs(networks=((3,),), each=2)
    subject = learner(algorithm, networks=networks)
    with pytest.raises(ConfigError, match="init_from: algorithm '.*' learns no initial parameters of the model"):
        subject.initial(0, dict(subject.model.initial(1)[0]))


def test_frozen_parameters_that_differ_between_networks_are_refused():
    def frozen(networks):
        model = Model(networks.variants((3,), 1), freeze=("1.*",))
        return CarriedLearner(MLPOptimizer(window=2, unroll=4), model, Quadratics(), OUTER)

    with pytest.raises(ConfigError, match="model: '1.weight' is frozen or a buffer, and differs in shape"):
        frozen(MLPs(networks=((4,), (3,)), each=2))
    subject = frozen(MLPs(networks=((4,),), each=2))
    subject.prepare(torch.device("cpu"))
    subject.dry_run(0)


@pytest.mark.parametrize("dtype", [torch.bool, torch.float32])
def test_minibatches_have_no_padded_rows_wherever_these_are(dtype):
    """Reference: the minibatches of the real rows alone."""
    algorithm = MLPOptimizer(window=2, unroll=2, batch_size=16)
    subject = learner(algorithm)
    context = Population(algorithm, subject.model, Quadratics()).context({}, 0, 0, 0)
    x, real = torch.arange(6.0).unsqueeze(1), torch.tensor([False, True, True, False, True, False])
    padded, alone = Examples(x, x, real.to(dtype)), Examples(x[real], x[real])
    found, expected = (
        algorithm._rows(replace(context, task=replace(context.task, support=support)), 0, 3)
        for support in (padded, alone)
    )
    for mine, theirs in zip(found, expected):
        assert torch.equal(padded.x[mine], alone.x[theirs])


def test_the_plan_measures_every_estimator():
    """Time and memory of a shard: the tape of truncated backpropagation grows with the window, the others hold none."""
    subject = learner(MLPOptimizer(window=20, unroll=40, batch_size=3, hidden=8))
    request = SimpleNamespace(
        compile="auto", differentiation="auto", chunk="auto", precision="float32", deterministic=True
    )
    found = subject.plan(request, Device("cpu", "here", 1 << 30, None)).as_dict()
    assert [way["name"] for way in found["estimators"]] == ["truncated", "es", "pes"]
    assert all(way["seconds"] > 0 and way["bias"] for way in found["estimators"])
    peaks = found["predicted_peak_bytes"]
    assert peaks["truncated"] > 4 * peaks["pes"] > 0
    assert subject.engine == Engine(), "the learner itself is as it was"
