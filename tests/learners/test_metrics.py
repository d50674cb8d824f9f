"""Metrics on tasks of unequal size: real rows alone, metrics of whole tasks, against scikit-learn."""

import itertools
import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from sklearn import metrics as sk
from sklearn.calibration import calibration_curve

from metadist.algorithms import MAML
from metadist.core.computation import Gradient
from metadist.core.engine import Engine
from metadist.core.errors import ConfigError
from metadist.core.model import Model
from metadist.core.outer import OuterLoop
from metadist.core.random import TaskKey
from metadist.core.round import EvaluationRequest, MetaStepKey, Shard
from metadist.core.state import Records
from metadist.core.task import Classification, Examples, Task, TaskFamily
from metadist.core.task_metrics import BUILT_IN, task_metrics_of
from metadist.learners.few_shot import FewShotLearner
from metadist.models import MLP

CLASSES, TASKS, STEPS = 3, 8, 3
FIVE = ("balanced_accuracy", "macro_f1", "roc_auc", "calibration_error", "confusion_matrix")


def balanced(prediction, target):
    """Balanced accuracy as a metric of examples: right predictions, weighted by the size of their class."""
    right = (prediction.argmax(-1) == target).to(prediction.dtype)
    hot = (target.unsqueeze(-1) == torch.arange(CLASSES)).to(prediction.dtype)
    counts = hot.sum(0)
    return right * (hot / counts.clamp(min=1)).sum(-1) * len(target) / (counts > 0).sum()


class Unequal(Classification):
    """Three classes of unequal size; 6 to 45 examples by task."""

    outputs, input_shape = CLASSES, (2,)

    def __init__(self, **own):
        self.__dict__.update(own)

    def sample_task(self, key, split):
        generator = key.generator()
        rows = 6 + int(torch.randint(40, (), generator=generator))
        y = torch.multinomial(torch.tensor([0.1, 0.3, 0.6]), rows, replacement=True, generator=generator)
        y[:CLASSES] = torch.arange(CLASSES)
        centres = torch.randn(CLASSES, 2, generator=generator)
        x = centres[y] + torch.randn(rows, 2, generator=generator)
        return Task(Examples(x[: rows // 2 + 2], y[: rows // 2 + 2]), Examples(x, y))


class UnequalLines(TaskFamily):
    """Lines with two outputs, and 3 to 12 examples by task."""

    outputs, input_shape = 2, (2,)
    task_metrics = ("r2", "mae")

    def sample_task(self, key, split):
        generator = key.generator()
        rows = 3 + int(torch.randint(10, (), generator=generator))
        x = torch.randn(rows, 2, generator=generator)
        y = x @ torch.randn(2, 2, generator=generator)
        return Task(Examples(x[:3], y[:3]), Examples(x, y))


def made(family, shard_size=4, steps=STEPS, **engine):
    outer = OuterLoop(shard_size=shard_size, meta_batch_size=TASKS)
    model = Model(lambda: MLP(hidden=(8,)).build((2,), family.outputs))
    learner = FewShotLearner(MAML(inner_lr=0.5, inner_steps=steps), model, family, outer)
    learner.set_engine(Engine(**engine))
    return learner


def theta(learner):
    return learner.initial(0).theta(learner.slots)


def evaluated(learner, shard_size):
    """The records of test tasks 0 … 7, computed in shards."""
    starts = range(0, TASKS, shard_size)
    keys = [TaskKey.of(0, "test", 0, range(start, start + shard_size)) for start in starts]
    return Records.concatenate([learner.evaluate(theta(learner), key, 0) for key in keys])


def plainly(learner, split="test"):
    """(targets, logits after 0 … k steps) of the real rows of every task, one task after the other."""
    found = []
    for key in TaskKey.of(0, split, 0, range(TASKS)).each():
        task = learner.tasks.sample_task(key, split)
        state, logits = learner.initial(0), []
        for steps in range(learner.algorithm.inner_steps + 1):
            phi = learner.adapt(state, task.support, steps)
            logits.append(learner.predict(state, phi, task.query.x, task.support))
        found.append((task.query.y, torch.stack(logits)))
    return found


def calibration(y, probabilities):
    """Σ bins |accuracy − confidence| · share, by the bins of scikit-learn."""
    confidence, right = probabilities.max(1), probabilities.argmax(1) == y
    accuracy, mean = calibration_curve(right, confidence, n_bins=15)
    share = np.histogram(np.searchsorted(np.linspace(0, 1, 16)[1:-1], confidence), bins=np.arange(16))[0]
    return float((np.abs(accuracy - mean) * share[share > 0]).sum() / len(y))


def by_scikit_learn(name, y, logits):
    y, probabilities = y.numpy(), logits.double().softmax(-1).numpy()
    guess = probabilities.argmax(1)
    return {
        "balanced_accuracy": lambda: sk.balanced_accuracy_score(y, guess),
        "macro_f1": lambda: sk.f1_score(y, guess, average="macro"),
        "roc_auc": lambda: sk.roc_auc_score(y, probabilities, multi_class="ovr", average="macro"),
        "calibration_error": lambda: calibration(y, probabilities),
        "confusion_matrix": lambda: sk.confusion_matrix(y, guess, labels=range(CLASSES)),
    }[name]()


def expected(learner, name):
    return np.array([[by_scikit_learn(name, y, at) for at in logits] for y, logits in plainly(learner)])


# Against scikit-learn -------------------------------------------------------------------------------------------------


@pytest.mark.lane("numerics")
@pytest.mark.parametrize("shard_size", [1, 4, 8])
def test_five_task_metrics_are_scikit_learn_s_on_the_real_rows(shard_size):
    learner = made(Unequal(task_metrics=FIVE))
    found = evaluated(learner, shard_size)
    for name in FIVE:
        np.testing.assert_allclose(found.columns[name].numpy(), expected(learner, name), rtol=0, atol=1e-6)


@pytest.mark.lane("numerics")
@pytest.mark.parametrize("shard_size", [1, 4, 8])
def test_a_metric_of_examples_sees_the_real_rows_alone(shard_size):
    """Earlier, padded rows reached it as class 0: 0.99 and 1.11 in shards of 4 and 8, where 0.54 is right."""
    learner = made(Unequal(metric=balanced))
    right = expected(learner, "balanced_accuracy")
    np.testing.assert_allclose(evaluated(learner, shard_size).columns["accuracy"].numpy(), right, rtol=0, atol=1e-6)


def trained(learner, shard_size):
    """The metric over training tasks 0 … 7 of meta-step 0."""
    starts = range(0, TASKS, shard_size)
    shards = [Shard("r", 0, 0, i, Gradient(), start, shard_size, 0) for i, start in enumerate(starts)]
    return sum(learner.compute(s, learner.initial(0).slots).metrics["accuracy"] for s in shards) / TASKS


@pytest.mark.lane("numerics")
@pytest.mark.parametrize(
    ("shard_size", "differentiation"), [(1, "unrolled"), (4, "mixed"), (8, "unrolled"), (8, "mixed")]
)
def test_a_metric_in_training_sees_the_real_rows_alone(shard_size, differentiation):
    learner = made(Unequal(metric=balanced), shard_size, differentiation=differentiation)
    last = [by_scikit_learn("balanced_accuracy", y, logits[-1]) for y, logits in plainly(learner, "train")]
    assert trained(learner, shard_size) == pytest.approx(np.mean(last), abs=1e-6)


@pytest.mark.lane("compile")
def test_metrics_of_compiled_shards_see_the_real_rows_alone():
    learner = made(Unequal(metric=balanced, task_metrics=FIVE), 8, steps=1, compile=True)
    last = [by_scikit_learn("balanced_accuracy", y, logits[-1]) for y, logits in plainly(learner, "train")]
    assert trained(learner, 8) == pytest.approx(np.mean(last), abs=1e-6)
    found = evaluated(learner, 8)
    for name in FIVE:
        np.testing.assert_allclose(found.columns[name].numpy(), expected(learner, name), rtol=0, atol=1e-6)


@pytest.mark.parametrize("shard_size", [1, 8])
def test_r2_and_mae_are_scikit_learn_s(shard_size):
    learner = made(UnequalLines())
    found = evaluated(learner, shard_size).columns
    for task, (y, predictions) in enumerate(plainly(learner)):
        for step, p in enumerate(predictions):
            assert float(found["r2"][task, step]) == pytest.approx(sk.r2_score(y, p), abs=1e-6)
            assert float(found["mae"][task, step]) == pytest.approx(sk.mean_absolute_error(y, p), abs=1e-6)


@pytest.mark.parametrize("name", sorted(BUILT_IN))
def test_padded_rows_change_no_built_in_metric(name):
    generator, metric = torch.Generator().manual_seed(0), BUILT_IN[name]
    for rows, more in itertools.product((2, 7, 30), (0, 1, 20)):
        # Rounded: ties, which count half.
        prediction = torch.randn(rows + more, CLASSES, generator=generator).mul(2).round().double()
        target = torch.randint(CLASSES, (rows + more,), generator=generator)
        if metric.kind == "regression":
            target = torch.randn(rows + more, CLASSES, generator=generator)
        mask = torch.arange(rows + more) < rows
        alone = metric.function(prediction[:rows], target[:rows], mask[:rows])
        torch.testing.assert_close(metric.function(prediction, target, mask), alone, equal_nan=True)


def test_roc_auc_of_two_classes_and_of_missing_classes():
    generator, mask = torch.Generator().manual_seed(1), torch.ones(40, dtype=torch.bool)
    logits = torch.randn(40, 2, generator=generator).mul(2).round().double()
    y = torch.randint(2, (40,), generator=generator)
    expected = sk.roc_auc_score(y, logits.softmax(-1)[:, 1])
    assert float(BUILT_IN["roc_auc"].function(logits, y, mask)) == pytest.approx(expected, abs=1e-12)
    three = torch.randn(40, 3, generator=generator).double()
    mean = np.mean([sk.roc_auc_score(y == c, three.softmax(-1)[:, c]) for c in (0, 1)])
    assert float(BUILT_IN["roc_auc"].function(three, y, mask)) == pytest.approx(mean, abs=1e-12)
    assert math.isnan(BUILT_IN["roc_auc"].function(three, torch.zeros_like(y), mask))


# The kind: sentinels, losses, values that say yes or no ---------------------------------------------------------------


class Unlabelled(Unequal):
    """Every third query row has the target −1: no label. ``padded`` pads by itself, with −1 as well."""

    def sample_task(self, key, split):
        task = super().sample_task(key, split)
        y = task.query.y.clone()
        y[2::3] = -1
        if not self.padded:
            return Task(task.support, Examples(task.query.x, y))
        rows, more = len(y), 50 - len(y)
        x, y = torch.cat([task.query.x, torch.zeros(more, 2)]), torch.cat([y, torch.full((more,), -1)])
        return Task(task.support, Examples(x, y, torch.arange(50) < rows))

    def loss(self, prediction, target):
        return torch.nn.functional.cross_entropy(prediction, target, ignore_index=-1, reduction="none")

    def metric(self, prediction, target):
        labelled = target != -1
        return (prediction.argmax(-1) == target) * len(target) / labelled.sum()


@pytest.mark.parametrize("padded", [False, True])
def test_an_own_sentinel_among_the_targets_is_kept(padded):
    learner = made(Unlabelled(padded=padded))
    right = []
    for y, logits in plainly(made(Unlabelled(padded=False))):
        labelled = y != -1
        right.append([float((at.argmax(-1) == y)[labelled].double().mean()) for at in logits])
    for shard_size in (1, 8):
        found = evaluated(learner, shard_size).columns["accuracy"]
        np.testing.assert_allclose(found.numpy(), right, rtol=0, atol=1e-6)


def weighted(prediction, target):
    """Cross-entropy, weighted by the frequency of a class in the task."""
    loss = torch.nn.functional.cross_entropy(prediction, target, reduction="none")
    share = (target.unsqueeze(-1) == target.unsqueeze(0)).double().mean(0)
    return (loss / share).to(loss.dtype)


class Equal(Unequal):
    def sample_task(self, key, split):
        task = super().sample_task(key, split)
        return Task(*(Examples(e.x[:5], e.y[:5]) for e in (task.support, task.query)))


def test_a_loss_that_padding_changes_is_refused_where_tasks_are_padded():
    learner = made(Unequal(loss=weighted))
    message = "loss: the loss of 'Unequal' changes where a task is padded .* from that example alone"
    with pytest.raises(ConfigError, match=message):
        learner.dry_run(0)
    with pytest.raises(ConfigError, match=message):
        evaluated(learner, 4)
    with pytest.raises(ConfigError, match=message):
        trained(learner, 4)
    evaluated(learner, 1)  # nothing is padded
    same = made(Equal(loss=weighted))
    same.dry_run(0)
    trained(same, 4)


def test_a_metric_may_say_yes_or_no():
    def right(prediction, target):
        return prediction.argmax(-1) == target

    found, usual = (evaluated(made(family), 4).columns["accuracy"] for family in (Unequal(metric=right), Unequal()))
    assert found.equal(usual)


# Metrics of whole tasks -----------------------------------------------------------------------------------------------


def rows(prediction, target, mask):
    assert bool(mask.all()) and len(prediction) == len(target) == len(mask)
    return len(target)


def test_an_own_task_metric_gets_the_real_rows_alone():
    learner = made(Unequal(task_metrics=(rows, "balanced_accuracy")))
    assert [m.name for m in learner.task_metrics] == ["rows", "balanced_accuracy"]
    found = evaluated(learner, 8).columns["rows"]
    assert found[:, 0].tolist() == [len(y) for y, _ in plainly(learner)]


def one_each(prediction, target, mask):
    return mask.double()


def picky(prediction, target, mask):
    raise KeyError("no such class")


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (("balanced_acuracy",), "'balanced_acuracy' is unknown; .*did you mean 'balanced_accuracy'"),
        (("r2",), "'r2' is for regression; 'Unequal' is classification: expected one of balanced_accuracy"),
        (("macro_f1", "macro_f1"), "'macro_f1' is taken"),
        ((3,), "3 is no metric; expected one of"),
        ((one_each,), r"'one_each' returns shape \[\d+\] for one task; expected one number"),
        ((picky,), "'picky' fails: KeyError: .*test_metrics.py"),
    ],
)
def test_mistakes_in_task_metrics_are_named_before_a_run(given, message):
    with pytest.raises(ConfigError, match=f"^task_metrics: {message}"):
        made(Unequal(task_metrics=given)).dry_run(0)


def test_targets_that_are_no_classes_are_refused():
    learner = made(Unlabelled(padded=True, task_metrics=("macro_f1",)))
    with pytest.raises(
        ConfigError, match=r"task_metrics: 'macro_f1' needs integer targets in \[0, 3\), got .* from -1"
    ):
        evaluated(learner, 4)


def test_scores_by_task_metrics_are_summarised_apart():
    """Each metric leaves out its own tasks; a task that diverged is left out of all, and of tables."""

    class Few(Unequal):
        task_metrics = ("roc_auc", "confusion_matrix")

    learner = made(Few())
    records = evaluated(learner, 8).columns
    records["roc_auc"][2] = math.nan
    records["loss"][5, -1] = math.inf
    request = EvaluationRequest(MetaStepKey("r", 0, 0), "test", TASKS, STEPS)
    judged = learner.summarise(request, Records(records))
    score, kept = judged.task_metrics["roc_auc"], [i for i in range(TASKS) if i not in (2, 5)]
    assert (judged.left_out, score.left_out) == (1, 2)
    assert score.mean == pytest.approx(records["roc_auc"][kept].mean(0).tolist())
    assert judged.mean[0] == pytest.approx(float(records["accuracy"][[i for i in range(TASKS) if i != 5], 0].mean()))
    assert judged.loss[-1] == pytest.approx(float(records["loss"][[i for i in range(TASKS) if i != 5], -1].mean()))
    counts = records["confusion_matrix"][[i for i in range(TASKS) if i != 5], -1].sum(0)
    assert judged.tables["confusion_matrix"] == counts.tolist()
    metrics = judged.metrics()
    assert metrics["eval/test/roc_auc"] == score.mean[-1] and metrics["eval/test/roc_auc/left_out"] == 2.0
    assert metrics["eval/test/accuracy/left_out"] == 1.0
    assert not any("confusion" in name for name in metrics)


def test_a_prediction_that_is_not_finite_gives_no_score():
    learner = made(Unequal(task_metrics=FIVE[:4]))
    tasks = learner.sample(TaskKey.of(0, "test", 0, range(4)))
    prediction = torch.randn(4, 1, *tasks.query.y.shape[1:], CLASSES)
    prediction[1, 0, 0] = math.nan
    prediction[:, :, -1][~tasks.query.mask[:, -1]] = math.inf  # of a padded row
    for metric in task_metrics_of(learner.tasks):
        found = metric.of_tasks(prediction, tasks.query)[:, 0]
        assert found.isfinite().tolist() == [True, False, True, True], metric.name


def test_listed_metrics_do_not_change_the_others():
    plain, more = made(Unequal()), made(Unequal(task_metrics=FIVE))
    a, b = evaluated(plain, 4).columns, evaluated(more, 4).columns
    assert all(a[name].equal(b[name]) for name in a)
    assert replace(plain.outer) == more.outer
