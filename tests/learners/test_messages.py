"""What can't be learned is refused in one line that says what to do, before anything long starts."""

from dataclasses import dataclass

import pytest
import torch
from shaped import Labels
from torch import nn
from toys import Blobs, Curves, Everything, keys, learner

from metadist.algorithms import ANIL, CNP, MAML, MetaSGD, ProtoNet, Reptile
from metadist.core.errors import ConfigError
from metadist.core.model import Model, use_batch_statistics
from metadist.core.outer import OuterLoop
from metadist.core.task import Examples, Task, TaskFamily
from metadist.learners.few_shot import FewShotLearner
from metadist.models import MLP, ConditionalNeuralProcess, Conv4

OWN = Blobs(input_shape=(1, 6, 6))


def refused(make, *needles):
    with pytest.raises(ConfigError) as caught:
        make()
    message = str(caught.value)
    assert "\n" not in message
    for needle in needles:
        assert needle in message


def mlp(family=Curves(), outputs=2):
    return MLP(hidden=(4,)).build(family.input_shape, outputs)


class Small(nn.Module):
    """x [N, 2] → [N, 2], spoiled by ``forward_part``."""

    def __init__(self, spoil=lambda self, x: x):
        super().__init__()
        self.linear, self.unused, self.spoil = nn.Linear(2, 2), nn.Linear(2, 2), spoil
        self.register_buffer("calls", torch.zeros(()))

    def forward(self, x):
        return self.unused(self.spoil(self, self.linear(x)))


def small(spoil, algorithm=MAML(), freeze=()):
    return learner(algorithm, lambda: Small(spoil), Curves(), freeze=freeze)


# Models ---------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "norm", [nn.BatchNorm2d(3), nn.SyncBatchNorm(3), nn.InstanceNorm2d(3, track_running_stats=True)]
)
def test_running_statistics(norm):
    module = nn.Sequential(nn.Conv2d(1, 3, 3), norm)
    refused(
        lambda: Model(lambda: module), "'1' is a", "track_running_stats=False", "metadist.use_batch_statistics(model)"
    )
    names = [n for n, _ in Model(lambda: use_batch_statistics(module)).module.named_buffers()]
    assert names == []


def test_lazy_modules():
    refused(lambda: Model(lambda: nn.Sequential(nn.LazyLinear(3))), "'0.weight'", "lazy", "input size")


def test_not_a_module():
    refused(lambda: Model(lambda: torch.ones), "torch.nn.Module")


def test_freeze_patterns():
    refused(lambda: Model(mlp, freeze=("heda.*",)), "'heda.*' matches no parameter", "1.weight")
    refused(lambda: Model(mlp, freeze=("*",)), "freezes every parameter")
    refused(
        lambda: Model(Everything, freeze=("second.weight",)), "matches no parameter", "first.weight"
    )  # tied: the first name counts
    assert Model(mlp, freeze=("*.bias",)).frozen == {"1.bias", "3.bias"}


def test_random_numbers_without_a_key():
    spoiled = small(lambda self, x: x + torch.rand(2, dtype=x.dtype))
    refused(
        lambda: spoiled.contribute(spoiled.initial(0).theta(spoiled.slots), keys(0, 1), 0),
        "not keyed",
        "torch.nn.Dropout",
    )


def test_buffers_written_in_forward():
    """They would make a result depend on what a worker did before."""

    def count(self, x):
        self.calls += 1
        return x

    for algorithm in (MAML(), Reptile()):
        spoiled = small(count, algorithm)
        refused(lambda spoiled=spoiled: spoiled.dry_run(0), "'Small' can't be trained", "in place")


@pytest.mark.parametrize(
    ("spoil", "named"),
    [
        (lambda self, x: x.detach(), "linear.weight, linear.bias"),
        (lambda self, x: self.calls.expand(x.shape[0], 2), "linear.weight, linear.bias"),
    ],
)
def test_a_missing_gradient(spoil, named):
    for algorithm in (MAML(), MAML(first_order=True), MAML(inner_steps=0), ProtoNet()):
        family = Blobs(input_shape=(2,), outputs=2) if isinstance(algorithm, ProtoNet) else Curves()
        spoiled = learner(algorithm, lambda: Small(spoil), family)
        refused(lambda spoiled=spoiled: spoiled.dry_run(0), named, "missing gradient", "model.freeze")
    learner(MAML(), lambda: Small(spoil), Curves(), freeze=("linear.*",)).dry_run(0)
    refused(lambda: learner(MetaSGD(inner_steps=0), mlp, Curves()).dry_run(0), "inner_lr/1.weight")


def test_gradients_that_are_zero_are_not_missing():
    learner(MAML(), lambda: Small(lambda self, x: x * 0), Curves()).dry_run(0)


# Shapes ---------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("algorithm", [MAML(), ANIL(), Reptile()])
def test_outputs_that_do_not_fit_n_way(algorithm):
    refused(
        lambda: learner(algorithm, lambda: Everything(outputs=4), OWN).dry_run(0),
        "puts out shape [6, 4]",
        "n_way = 3",
        "[6, 3]",
    )


def test_a_prediction_that_does_not_fit_the_targets():
    """[N, 1] against [N] would broadcast to [N, N] and be learned from."""
    refused(lambda: learner(MAML(), lambda: mlp(outputs=1), Curves()).dry_run(0), "predicts shape [4, 1]", "[4, 2]")


@dataclass(frozen=True)
class FlatTargets(Curves):
    def sample(self, keys, split):
        task = super().sample(keys, split)
        return Task(*(Examples(e.x, e.y[..., 0]) for e in (task.support, task.query)))


def test_targets_without_a_dimension_of_their_own():
    refused(lambda: learner(MAML(), lambda: mlp(outputs=1), FlatTargets()).dry_run(0), "predicts shape [4, 1]", "[4]")
    flat = learner(MAML(), lambda: nn.Sequential(mlp(outputs=1), nn.Flatten(0)), FlatTargets())
    flat.dry_run(0)
    both = learner(MAML(), lambda: mlp(outputs=1), OneTarget())
    theta = flat.initial(0).theta(flat.slots)
    got = flat.contribute(theta, keys(0, 1), 0).slots["model"]
    torch.testing.assert_close(got, both.contribute(both.initial(0).theta(both.slots), keys(0, 1), 0).slots["model"])


@dataclass(frozen=True)
class OneTarget(Curves):
    def sample(self, keys, split):
        task = super().sample(keys, split)
        return Task(*(Examples(e.x, e.y[..., :1]) for e in (task.support, task.query)))


def test_inputs_that_do_not_fit_the_model():
    wide = lambda: nn.Linear(5, 2)  # noqa: E731
    refused(
        lambda: learner(MAML(), wide, Curves()).dry_run(0),
        "'Linear' fails on train tasks with inputs [6, 2] and targets [6, 2]",
    )
    refused(lambda: Conv4().build((2,), 3), "conv4", "[2]")
    refused(lambda: Conv4(blocks=4).build((1, 8, 8), 3), "model.blocks", "8×8")


class WrongLoss(Curves):
    def loss(self, prediction, target):
        return (prediction - target).square().mean()


class WrongMetric(Curves):
    def metric(self, prediction, target):
        return (prediction - target).square()


@pytest.mark.parametrize("family", [WrongLoss(), WrongMetric()])
def test_losses_and_metrics_are_per_example(family):
    spoiled = learner(MAML(), mlp, family)
    refused(
        lambda: spoiled.contribute(spoiled.initial(0).theta(spoiled.slots), keys(0), 0),
        "one value per example",
        "reduction='none'",
    )
    refused(lambda: spoiled.dry_run(0), "one value per example")


def test_a_family_that_samples_nothing():
    with pytest.raises(NotImplementedError, match="needs sample_task"):
        TaskFamily().sample_task(keys(0), "train")


# Combinations ---------------------------------------------------------------------------------------------------------


def test_incompatible_parts():
    refused(lambda: learner(ProtoNet(), mlp, Curves()), "'ProtoNet'", "'Curves'", "no classes")
    refused(lambda: learner(CNP(), mlp, Curves()), "'CNP'", "encode", "'cnp'")
    refused(lambda: learner(CNP(), Everything, OWN), "real-valued")
    chosen = Model(lambda: ConditionalNeuralProcess(8, 8).build((2,), 2), output=0)
    refused(lambda: FewShotLearner(CNP(), chosen, Curves(), OuterLoop()), "model.output chooses")
    refused(
        lambda: learner(ANIL(head="haed.*"), Everything, OWN), "'haed.*' matches no learned parameter", "head.weight"
    )
    refused(
        lambda: learner(ANIL(), Everything, OWN, freeze=("head.*",)),
        "matches no learned parameter",
        "head.weight, head.bias",
    )


@pytest.mark.parametrize(
    ("make", "key"),
    [
        (lambda: MAML(inner_steps=-1), "inner_steps"),
        (lambda: MAML(inner_momentum=1.0), "inner_momentum"),
        (lambda: MAML(inner_optimizer="adam", inner_momentum=0.5), "inner_betas"),
        (lambda: MAML(inner_optimizer="amda"), "'adam'"),
        (lambda: MAML(inner_batch_size=0), "inner_batch_size"),
        (lambda: MetaSGD(inner_optimizer="adam"), "meta_sgd"),
        (lambda: Reptile(moments="caried"), "'carried'"),
        (lambda: Reptile(moments="carried"), "has no moments"),
        (lambda: learner(MAML(), mlp, Curves(), normalization="indutive"), "'inductive'"),
        (lambda: learner(MAML(), mlp, Curves(), non_finite="ignore"), "skip"),
    ],
)
def test_bad_settings(make, key):
    refused(make, key)


def test_init_from():
    whole = learner(MAML(), mlp, Curves())
    refused(lambda: whole.initial(0, {"1.weight": torch.zeros(3, 3)}), "'1.weight'", "[3, 3]", "[4, 2]")
    refused(lambda: whole.initial(0, {"conv.weight": torch.zeros(3)}), "conv.weight", "none of its parameters")
    given = {"1.weight": torch.full((4, 2), 0.5), "other": torch.zeros(1)}
    begun = whole.parameters(whole.initial(0, given))
    assert begun["1.weight"].eq(0.5).all()
    assert begun["1.weight"].dtype == torch.float64
    assert begun["3.weight"].equal(whole.parameters(whole.initial(0))["3.weight"])


def test_tasks_that_raise_are_named_with_the_line():
    class Broken(Curves):
        def sample(self, keys, split):
            raise KeyError("amplitude")

    subject = learner(MAML(), lambda: nn.Linear(2, 2), Broken())
    with pytest.raises(
        ConfigError, match=r"'Broken' can't sample train tasks: KeyError: 'amplitude' \(.*test_messages.py:\d+\)"
    ):
        subject.dry_run(0)


@pytest.mark.parametrize("rate", [-1.0, float("nan"), float("inf")])
def test_senseless_outer_rates_are_refused(rate):
    with pytest.raises(ConfigError, match="outer.lr: .* is not a finite number of 0 or more"):
        OuterLoop(lr=rate)


# Whose fault it is ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("kind_of", "words"),
    [
        ("from one", ("the support set of train tasks: y holds class 3", "0 to 2", "number them from 0 (y - 1)")),
        ("negative", ("y holds class -1", "ways(split)")),
        ("float", ("targets floating-point [6]", "int64 [N] from 0 to 2 (y.long())")),
        ("bool", ("targets bool [6]", "y.long()")),
        ("column", ("targets int64 [6, 1]", "int64 [N]")),
        ("int32", ("the loss of 'Labels' fails", "targets int32 [6]", "give classes as int64 (y.long())")),
        ("nan", ("NaN or Inf in support.x, query.x of train tasks", "engine.non_finite: skip")),
    ],
)
@pytest.mark.parametrize("algorithm", [MAML(), ProtoNet(), Reptile()], ids=lambda a: type(a).__name__)
def test_labels_of_a_family(algorithm, kind_of, words):
    family = Labels(kind_of=kind_of)
    refused(lambda: learner(algorithm, lambda: mlp(family, 3), family).dry_run(0), "tasks:", "'Labels'", *words)


def test_support_targets_of_another_shape_than_the_queries():
    """[N, 1] in the support set would broadcast to two values, and be adapted to."""

    class Narrow(Curves):
        def sample(self, keys, split):
            task = super().sample(keys, split)
            return Task(Examples(task.support.x, task.support.y[..., :1]), task.query)

    class OneTargetForAll(Curves):
        def sample(self, keys, split):
            task = super().sample(keys, split)
            return Task(Examples(task.support.x, task.support.y[:, :1]), task.query)

    refused(lambda: learner(MAML(), mlp, Narrow()).dry_run(0), "'Narrow'", "[6, 1] in the support set and [4, 2]")
    refused(lambda: learner(MAML(), mlp, OneTargetForAll()).dry_run(0), "x [6, 2] and y [1, 2]", "the same N")


def test_a_sample_that_is_no_task():
    class NoTask(Curves):
        def sample(self, keys, split):
            return super().sample(keys, split).support

    refused(lambda: learner(MAML(), mlp, NoTask()).dry_run(0), "sample of 'NoTask' returns Examples", "expected Task")


class ModelOutput(dict):
    """As of transformers: attributes, and items by name."""

    def __getattr__(self, name):
        return self[name]


@pytest.mark.parametrize(
    ("wrap", "words"),
    [
        (lambda y: ModelOutput(scores=y, loss=None), "returns ModelOutput with scores, loss"),
        (lambda y: {"scores": y}, "returns dict with scores"),
        (lambda y: (y, None), "returns tuple of 2"),
        (lambda y: None, "returns NoneType"),
    ],
)
@pytest.mark.parametrize("algorithm", [MAML(), MAML(inner_steps=0), ANIL(), Reptile(), ProtoNet()], ids=repr)
def test_models_that_return_no_tensor(algorithm, wrap, words):
    class Wrapped(nn.Linear):
        def forward(self, x):
            return wrap(super().forward(x))

    family = Blobs()
    refused(
        lambda: learner(algorithm, lambda: Wrapped(4, 3), family).dry_run(0), "model: 'Wrapped'", words, "[N, outputs]"
    )


class FailingMetric(Curves):
    def metric(self, prediction, target):
        return {}["threshold"]


class FailingLoss(Curves):
    def loss(self, prediction, target):
        return nn.HuberLoss(reduction="none", delta=-1)(prediction, target).mean(-1)


class FailingWays(Blobs):
    def ways(self, split):
        return {"train": 3}[split]


class FailingProtocol(Curves):
    def protocol(self, split):
        return {"rows": self.number}


class UnwritableProtocol(Curves):
    def protocol(self, split):
        return {"rows": {1, 2}}


@dataclass(frozen=True)
class FailingAlgorithm(MAML):
    def predict(self, model, phi, x):
        return [][1]


@pytest.mark.parametrize(
    ("family", "algorithm", "words"),
    [
        (
            FailingMetric(),
            MAML(),
            ("tasks: the metric of 'FailingMetric'", "KeyError: 'threshold' (", "test_messages.py:"),
        ),
        (FailingLoss(), MAML(), ("tasks: the loss of 'FailingLoss'", "predictions float64 [4, 2]", "delta")),
        (
            FailingProtocol(),
            MAML(),
            ("tasks: 'FailingProtocol' fails on train", "AttributeError", ".py:"),
        ),
        (UnwritableProtocol(), MAML(), ("protocol('train') of 'UnwritableProtocol'", "set", "numbers, text and lists")),
        (FailingWays(), MAML(), ("tasks: 'FailingWays'", "KeyError: 'validation'")),
        (Curves(), FailingAlgorithm(), ("algorithm: 'FailingAlgorithm' fails", "IndexError", "test_messages.py:")),
    ],
    ids=lambda value: type(value).__name__,
)
def test_the_culprit_is_named(family, algorithm, words):
    outputs = 3 if family.kind == "classification" else 2
    refused(lambda: learner(algorithm, lambda: mlp(family, outputs), family).dry_run(0), *words)


def test_any_error_of_a_model_is_one_line():
    def raise_(self, x):
        raise AssertionError("x must be even\nreally")

    refused(lambda: small(raise_).dry_run(0), "model: 'Small' fails on train tasks", "AssertionError: x must be even (")


@dataclass(frozen=True)
class Unprepared(Curves):
    def prepare(self, device):
        raise OSError("no such disk")


def test_a_family_that_cannot_be_prepared():
    refused(
        lambda: learner(MAML(), mlp, Unprepared()).prepare(torch.device("cpu")),
        "tasks: 'Unprepared' can't be prepared: OSError: no such disk (",
        "test_messages.py:",
    )
