"""Tasks whose ways, shots and queries are drawn: what they are, and that padding and absent classes change nothing."""

from dataclasses import dataclass, replace

import plain
import pytest
import torch
from gradient_cases import plain_cnp, plain_contribution, plain_objective
from ragged import Lines, Shades
from toys import keys, learner, relative_error, somewhere

from metadist.algorithms import ANIL, CNP, MAML, MetaSGD, ProtoNet, Reptile
from metadist.core.computation import Evaluate
from metadist.core.engine import Engine
from metadist.core.errors import ConfigError
from metadist.core.outer import OuterLoop
from metadist.core.random import TaskKey
from metadist.core.round import EvaluationRequest, MetaStepKey
from metadist.core.state import Records
from metadist.core.task import Examples, Task, alone, with_rows
from metadist.engine.buckets import MOST, Buckets
from metadist.models import ConditionalNeuralProcess, Conv4
from metadist.testing import check_tasks
from metadist.testing.gradients import by_autograd

ALGORITHMS = {
    "maml": MAML(inner_lr=0.3, inner_steps=2),
    "fomaml": MAML(inner_lr=0.3, inner_steps=2, first_order=True),
    "adam": MAML(inner_lr=0.02, inner_steps=2, inner_optimizer="adam", inner_eps=1e-6),
    "minibatches": MAML(inner_lr=0.3, inner_steps=4, inner_batch_size=5),
    "anil": ANIL(inner_lr=0.3, inner_steps=2),
    "meta_sgd": MetaSGD(inner_lr=0.3, inner_steps=2),
    "protonet": ProtoNet(),
}
SHARD = keys(*range(1, 7))


def subject(algorithm, family=Shades(), norm="group", **options):
    if isinstance(algorithm, CNP):
        family, model = Lines(), ConditionalNeuralProcess(width=8, representation=6)
    else:
        model = Conv4(filters=4, blocks=2, norm=norm)
    return learner(algorithm, lambda: model.build(family.input_shape, algorithm.outputs(family)), family, **options)


def bucketed(subject, tasks, shard):
    """The contribution of each group of ``shard`` in a bucket, as a compiled shard has it, computed eagerly."""
    buckets, theta, total = Buckets.of(subject.tasks, subject.algorithm), somewhere(subject), None
    for group in shard.runs(2):
        padded = buckets.pad(subject.sample(group))
        assert padded.support.mask is not None and padded.query.mask is not None
        part = subject.contribute_tasks(theta, padded, group, 3)
        total = part if total is None else total + part
    return total


# What is drawn --------------------------------------------------------------------------------------------------------


def test_every_size_in_the_bounds_occurs_and_a_group_shares_it():
    family, seen = Shades(), set()
    for group in range(400):
        task = family.sample(keys(2 * group, 2 * group + 1), "train")
        ways, support, query = task.ways.tolist(), task.support.y, task.query.y
        n = ways[0]
        assert ways == [n, n] and support.max() == query.max() == n - 1
        assert support.shape[1] % n == query.shape[1] % n == 0
        seen.add((n, support.shape[1] // n, query.shape[1] // n))
    assert seen == {(n, k, q) for n in range(2, 6) for k in range(1, 5) for q in range(1, 4)}
    assert set(family.possible_sizes("train")) == {(n * k, n * q) for n, k, q in seen}


def test_the_size_is_a_function_of_seed_step_and_group_alone():
    family = Shades(same_size=3)

    def size(index, seed=7, step=3, among=()):
        task = family.sample(TaskKey.of(seed, "train", step, [index, *among]), "train")
        return tuple(alone(task, 0).support.y.shape), int(task.ways[0])

    assert size(3) == size(4) == size(5) == size(5, among=[0, 9, 40])
    for other in ({"seed": 8}, {"step": 4}):
        assert any(size(i) != size(i, **other) for i in range(0, 30, 3))
    assert len({size(i) for i in range(0, 60, 3)}) > 5


@pytest.mark.lane("numerics")
@pytest.mark.parametrize("family", [Shades(), Shades(n_way=3), Shades(k_shot=1, query_shots=2), Lines()], ids=str)
def test_they_are_a_proper_family(family):
    check_tasks(family, another_process=False)


def test_training_and_evaluation_may_differ():
    mixed = Shades(n_way=5, k_shot=1, train_n_way=(2, 7), train_k_shot=None, query_shots=2)
    assert mixed.outputs == 7 and mixed.ways("train") == 7 and mixed.ways("test") == 5
    assert mixed.group_size("train") == 2 and mixed.group_size("test") is None
    assert mixed.sample(keys(0, 1, split="test"), "test").ways.tolist() == [5, 5]
    fixed = Shades(n_way=5, k_shot=1, query_shots=2, train_n_way=7)
    assert fixed.outputs == 5 and fixed.sample(keys(0), "train").ways is None


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"n_way": (5, 3)}, r"tasks.n_way = \[5, 3\]: begins above its end; write \[3, 5\]"),
        ({"train_k_shot": (0, 3)}, r"tasks.train_k_shot = \[0, 3\]: must be at least 1"),
        ({"same_size": 0}, "tasks.same_size = 0: must be at least 1"),
    ],
)
def test_bounds_that_make_no_sense(options, message):
    with pytest.raises(ConfigError, match=message):
        Shades(**options)


def test_bounds_beyond_the_data():
    wide = Shades(n_way=(6, 9))
    assert wide.outputs == wide.ways("validation") == 9 and wide.protocol("validation")["n_way"] == [6, 7]
    drawn = {int(wide.sample(keys(2 * i, split="validation"), "validation").ways) for i in range(20)}
    assert drawn == {6, 7} and wide.protocol("train")["n_way"] == [6, 9]
    assert wide.data_notes() == (
        "validation tasks have at most 7 ways, not 9: the split has no more classes",
        "test tasks have at most 7 ways, not 9: the split has no more classes",
    )
    assert len(wide.sources(keys(0, split="test").each()[0], "test")) == 9
    with pytest.raises(ConfigError, match="n_way = 8: the validation split has 7 classes"):
        Shades(n_way=(8, 9)).sample(keys(0, split="validation"), "validation")
    with pytest.raises(ConfigError, match=r"k_shot \+ tasks.query_shots = 11 \+ 3"):
        Shades(k_shot=(1, 11)).sample(keys(0), "train")


# Buckets --------------------------------------------------------------------------------------------------------------


def test_a_bucket_is_a_function_of_the_rows_and_there_are_few():
    possible = [(n * k, 5 * n) for n in range(5, 21) for k in range(1, 51)]

    class Sizes(Shades):
        def possible_sizes(self, split):
            return possible

    buckets = Buckets.of(Sizes(), MAML(inner_steps=1))
    assert len(buckets.sizes) == MOST and buckets.largest == (1000, 100)
    padded = [buckets.rows(*rows) for rows in possible]
    assert set(padded) <= set(buckets.sizes)
    assert all(a >= s and b >= q for (a, b), (s, q) in zip(padded, possible))
    # 2 (support) + 1 (query) passes of a second-order step: three quarters of them or more are over real rows.
    assert sum(2 * s + q for s, q in possible) > 0.75 * sum(2 * s + q for s, q in padded)
    assert Buckets.of(Shades(n_way=3, k_shot=2, query_shots=1), ProtoNet()).sizes == ((6, 3),)
    assert Buckets((), 1).rows(5, 8) == (8, 8)


def test_a_bucket_holds_tasks_with_several_targets():
    class Several(Lines):
        def sample_task(self, key, split):
            task = super().sample_task(key, split)
            return Task(*(Examples({"x": e.x}, {"y": e.y, "twice": 2 * e.y}) for e in (task.support, task.query)))

    family, shard = Several(), keys(0, 1)
    tasks = family.sample(shard, "train")
    padded = Buckets.of(family, MAML()).pad(tasks)
    for part, real in ((padded.support, tasks.support), (padded.query, tasks.query)):
        rows = real.y["y"].shape[1]
        assert part.mask.sum(1).tolist() == [rows, rows]
        assert torch.equal(part.y["twice"][:, :rows], real.y["twice"]) and not part.y["twice"][:, rows:].any()


# The mathematics ------------------------------------------------------------------------------------------------------


@pytest.mark.lane("numerics")
@pytest.mark.parametrize("name", ALGORITHMS)
def test_gradients_are_those_of_a_plain_loop_over_each_task_s_own_classes(name, monkeypatch):
    """The loop has no padding and cuts the logits to the classes of the task."""
    algorithm = ALGORITHMS[name]
    if algorithm.inner_steps == 4:  # the reference knows no minibatches that are larger than the set
        algorithm = replace(algorithm, inner_batch_size=2)
    whole = subject(algorithm)
    current = []

    def objective(learner, theta, key, task):
        current[:] = [int(task.ways)]
        if name != "protonet":
            return plain_objective(learner, theta, key, task)
        embed = plain.Plain(learner.model.module, key)
        support, query = embed(theta["model"], task.support.x, step=0), embed(theta["model"], task.query.x)
        return plain.loss(learner.tasks, plain.prototypical(support, query, task.support, current[0]), task.query)

    def loss(family, prediction, examples):
        return torch.nn.functional.cross_entropy(prediction[:, : current[0]], examples.y)

    monkeypatch.setattr(plain, "loss", loss)
    theta = somewhere(whole)
    expected, losses = plain_contribution(whole, theta, SHARD, objective)
    got = whole.contribute(theta, SHARD, 3)
    assert got.metrics["loss"] == pytest.approx(losses, rel=1e-10)
    for slot, vector in expected.items():
        assert relative_error(got.slots[slot], vector) < 1e-10
    head = got.slots["model"][-5:]
    assert name == "protonet" or head.abs().min() > 0  # some task has each class


@pytest.mark.lane("numerics")
@pytest.mark.parametrize("name", [*ALGORITHMS, "reptile", "reptile-minibatches", "cnp"])
@pytest.mark.parametrize("differentiation", ["unrolled", "forward", "reverse"])
def test_a_bucket_changes_nothing(name, differentiation):
    """Padded and unpadded contributions agree in float64, in every mode."""
    others = {
        "reptile": Reptile(inner_lr=0.3, inner_steps=3),
        "reptile-minibatches": Reptile(inner_lr=0.02, inner_steps=4, inner_batch_size=4, inner_optimizer="adam"),
        "cnp": CNP(),
    }
    whole = subject({**ALGORITHMS, **others}[name])
    expected = whole.contribute(somewhere(whole), SHARD, 3)
    if differentiation != "unrolled":
        if whole.meta_gradient.cannot_walk_back:
            pytest.skip("has no inner loop to walk back over")
        whole.set_engine(Engine(differentiation="mixed", hessian=differentiation))
        mixed = whole.contribute(somewhere(whole), SHARD, 3)
        assert all(relative_error(mixed.slots[n], v) < 1e-11 for n, v in expected.slots.items())
    got = bucketed(whole, whole.tasks, SHARD)
    assert got.metrics == pytest.approx(expected.metrics, rel=1e-12)
    for slot, vector in expected.slots.items():
        assert relative_error(got.slots[slot], vector) < 1e-12


def test_cnp_on_drawn_rows_is_the_plain_one():
    whole = subject(CNP())
    theta = somewhere(whole)
    expected, losses = plain_contribution(whole, theta, SHARD, plain_cnp)
    got = whole.contribute(theta, SHARD, 3)
    assert got.metrics["loss"] == pytest.approx(losses, rel=1e-10)
    assert relative_error(got.slots["model"], expected["model"]) < 1e-10


def test_batch_norm_sees_real_rows_alone():
    """Groups of one size need no padding: transductive statistics are exact, in training and in evaluation."""
    whole = subject(MAML(inner_lr=0.3, inner_steps=1), norm="batch")
    theta = somewhere(whole)
    expected, losses = by_autograd(whole, theta, SHARD)
    got = whole.contribute(theta, SHARD, 3)
    assert got.metrics["loss"] == pytest.approx(losses, rel=1e-10)
    assert relative_error(got.slots["model"], expected["model"]) < 1e-10
    # Padding would change them, which is why no graph may pad these tasks.
    tasks = whole.sample(SHARD.runs(2)[1])
    padded = with_rows(tasks, tasks.support.y.shape[1] + 7, tasks.query.y.shape[1])
    here, there = (whole.contribute_tasks(theta, t, SHARD.runs(2)[1], 3) for t in (tasks, padded))
    assert relative_error(there.slots["model"], here.slots["model"]) > 1e-3


@pytest.mark.parametrize("cut", [[[1, 2, 3, 4, 5, 6]], [[1], [2, 3], [4, 5, 6]], [[1, 2, 3], [4, 5, 6]]])
def test_any_cutting_into_shards(cut):
    whole = subject(MAML(inner_lr=0.3))
    theta = somewhere(whole)
    parts = [whole.contribute(theta, keys(*part), 3) for part in cut]
    total = sum(parts[1:], parts[0])
    expected = whole.contribute(theta, SHARD, 3)
    assert total.tasks == 6
    assert relative_error(total.slots["model"], expected.slots["model"]) < 1e-12


def test_shards_of_whole_groups_add_in_one_tree():
    """A group of a power of two is a node of the canonical tree: the bits are those of any such shards."""
    options = {"dtype": torch.float32, "outer": OuterLoop(shard_size=4)}
    whole = subject(MAML(inner_lr=0.3), **options)
    theta = somewhere(whole)
    pairs = [whole.contribute(theta, keys(i, i + 1), 3) for i in range(0, 8, 2)]
    fours = [whole.contribute(theta, keys(*range(i, i + 4)), 3) for i in (0, 4)]
    eight = whole.contribute(theta, keys(*range(8)), 3)
    for name, vector in eight.slots.items():
        assert torch.equal(((pairs[0] + pairs[1]) + (pairs[2] + pairs[3])).slots[name], vector)
        assert torch.equal((fours[0] + fours[1]).slots[name], vector)


# Scores ---------------------------------------------------------------------------------------------------------------


def of_own_classes(prediction, target, mask):
    """A metric of the user's own: the number of logits that it is given, and the mean accuracy."""
    assert mask.all()
    return prediction.shape[-1] + (prediction.argmax(-1) == target).double().mean() / 2


@pytest.mark.parametrize("name", ["maml", "protonet"])
def test_scores_are_over_real_rows_and_classes(name):
    @dataclass(frozen=True, kw_only=True)
    class Measured(Shades):
        task_metrics: tuple = ("balanced_accuracy", "roc_auc", "calibration_error", "confusion_matrix", of_own_classes)

    whole = subject(ALGORITHMS[name], Measured())
    theta, shard = somewhere(whole), keys(*range(10), split="test", meta_step=0)
    records = whole.evaluate(theta, shard, 0)
    ways = torch.tensor([int(whole.tasks.sample(keys(i, split="test", meta_step=0), "test").ways) for i in range(10)])
    assert records.columns["ways"].tolist() == ways.tolist() and len(ways.unique()) > 1
    for i, key in enumerate(shard.each()):
        task = whole.tasks.sample_task(key, "test").to(torch.device("cpu"), torch.float64)
        n = int(task.ways)
        alone_there = whole.evaluate(theta, keys(i, split="test", meta_step=0), 0)
        for column, values in records.columns.items():
            torch.testing.assert_close(values[i], alone_there.columns[column][0], equal_nan=True)
        own = records.columns["of_own_classes"][i, -1]
        assert own == pytest.approx(n + records.columns["accuracy"][i, -1].item() / 2)
        table = records.columns["confusion_matrix"][i, -1]
        assert table.sum() == len(task.query.y) and table[:n, :n].sum() == table.sum()
        assert table.diagonal().sum() / table.sum() == pytest.approx(records.columns["accuracy"][i, -1].item())
    assert bool(records.columns["roc_auc"].isfinite().all())


def test_the_score_says_the_chance_level_of_each_number_of_classes():
    whole = subject(ALGORITHMS["maml"])
    request = EvaluationRequest(MetaStepKey("run", 0, 0), "test", 40, None)
    state = whole.initial(0)
    shards = whole.shards(request.key, Evaluate(), split="test", tasks=40)
    records = Records.concatenate([whole.compute(shard, state.slots) for shard in shards])
    score = whole.summarise(request, records)
    assert [row["ways"] for row in score.by_ways] == [2, 3, 4, 5]
    assert [row["chance"] for row in score.by_ways] == [1 / 2, 1 / 3, 1 / 4, 1 / 5]
    assert sum(row["tasks"] for row in score.by_ways) == 40
    total = sum(row["tasks"] * row["mean"] for row in score.by_ways)
    assert total / 40 == pytest.approx(score.score)
    assert score.protocol["n_way"] == [2, 5] and score.protocol["same_size"] == 2


# Before a run ---------------------------------------------------------------------------------------------------------


@pytest.mark.lane("numerics")
@pytest.mark.parametrize("name", [*ALGORITHMS, "cnp"])
@pytest.mark.parametrize("norm", ["group", "batch"])
def test_the_dry_run_accepts_them(name, norm):
    subject({**ALGORITHMS, "cnp": CNP()}[name], norm=norm).dry_run(0)


def test_a_loss_that_reads_absent_classes_is_refused():
    class Smoothed(Shades):
        def loss(self, prediction, target):
            return torch.nn.functional.cross_entropy(prediction, target, reduction="none", label_smoothing=0.1)

    with pytest.raises(ConfigError, match="logits of classes that a task does not have are −∞"):
        subject(MAML(), Smoothed()).dry_run(0)


@pytest.mark.parametrize(
    ("ways", "message"),
    [
        (lambda number: torch.tensor(5 - number % 2), "train task 1 has class 4 in the support set, and 4 ways"),
        (lambda number: torch.tensor(9), r"have ways \[9, .*expected one int64 number from 1 to 5"),
        (lambda number: torch.tensor(0), r"have ways \[0, "),
        (lambda number: torch.tensor(5.0), r"have ways \[5.0, "),
        (lambda number: torch.tensor([5]), r"have ways \[\[5\], "),
    ],
)
def test_ways_that_do_not_fit_the_tasks_are_refused(ways, message):
    """The label of a class that a task lacks has an infinite loss and a finite gradient: a run went on with it."""

    class Own(Shades):
        def sample(self, keys, split):
            own = [ways(number) for number in keys.tasks.tolist()]
            return replace(super().sample(keys, split), ways=torch.stack(own))

    with pytest.raises(ConfigError, match=message):
        subject(MAML(), Own(n_way=5, k_shot=1, query_shots=1)).dry_run(0)


def test_the_signature_says_that_classes_vary():
    whole = subject(ALGORITHMS["maml"])
    signature = whole.describe(0)
    assert signature.classes == 5 and signature.fewer_classes and signature.prediction[""].shape == (None,)
    assert replace(signature).of_dict(signature.as_dict()) == signature
    assert signature.ways(torch.tensor([0, 1, 2, 0])) == 3
    with pytest.raises(ConfigError, match="y holds class 2, and not every class below it"):
        signature.targets(torch.tensor([0, 2]), 2)
    with pytest.raises(ConfigError, match="expected 5 classes"):
        signature.targets(torch.arange(6), 6)


@pytest.mark.parametrize("classes", [2, 3, 5])
@pytest.mark.parametrize("name", ["maml", "anil", "meta_sgd", "protonet"])
def test_adaptation_to_a_number_of_classes_is_that_of_a_head_of_this_size(classes, name):
    """θ with a head of ``classes`` outputs, in a family of this many ways, adapts to the same parameters."""
    algorithm = ALGORITHMS[name]
    whole, small = subject(algorithm), subject(algorithm, Shades(n_way=classes, k_shot=2, query_shots=1))
    state, own = whole.initial(0), small.initial(0)
    for slot in own.slots if name != "protonet" else ():
        if slot == "model" or slot == "inner_lr":
            parameters = whole.slots[slot].layout.unflatten(state.slots[slot])
            cut = parameters.replace({n: t[:classes] for n, t in parameters.items() if n.startswith("head")})
            own.slots[slot] = small.slots[slot].layout.flatten(cut)
    task = Task(*(e for e in [alone(small.sample(keys(0)), 0).support] * 2))
    expected = small.predict(own, small.adapt(own, task.support), task.query.x, task.support)
    phi = whole.adapt(state, task.support, classes=classes)
    got = whole.predict(state, phi, task.query.x, task.support)
    torch.testing.assert_close(got[:, :classes], expected, rtol=1e-11, atol=1e-12)
