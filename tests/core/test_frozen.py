"""Parameters that the user's module freezes with ``requires_grad=False``: in every algorithm, and in everything that
is made of a run.
"""

import plain
import pytest
import torch
from gradient_cases import plain_contribution
from torch import nn
from toys import Blobs, Curves, keys, learner, relative_error, somewhere, train

from metadist import EvaluateSettings, compose, load
from metadist.algorithms import ANIL, CNP, MAML, MetaSGD, ProtoNet, Reptile
from metadist.core.engine import Engine
from metadist.core.errors import ConfigError
from metadist.core.model import Model
from metadist.core.outer import OuterLoop
from metadist.experiment.load import initial_parameters
from metadist.experiment.request import RunRequest
from metadist.experiment.train import train as train_experiment
from metadist.models import ConditionalNeuralProcess
from metadist.training.observers import Observer


class Body(nn.Sequential):
    def __init__(self):
        super().__init__(nn.Linear(1, 8), nn.Tanh(), nn.Linear(8, 8), nn.Tanh())
        self[0].requires_grad_(False)


class Network(nn.Module):
    """A frozen layer within a submodule, a frozen scale, a frozen table of integers, a buffer."""

    def __init__(self, outputs=2):
        super().__init__()
        self.body, self.head = Body(), nn.Linear(8, outputs)
        self.scale = nn.Parameter(torch.full((), 1.5), requires_grad=False)
        self.order = nn.Parameter(torch.arange(7, -1, -1), requires_grad=False)
        self.register_buffer("shift", torch.linspace(0, 1, 8))

    def forward(self, x):
        return self.head(self.body(x.flatten(1)[:, :1])[:, self.order] + self.shift) * self.scale


FROZEN = ("body.0.weight", "body.0.bias", "scale", "order")
METHODS = {
    "maml": MAML(inner_lr=0.1, inner_steps=2),
    "fomaml": MAML(inner_lr=0.1, inner_steps=2, first_order=True),
    "adam": MAML(inner_lr=0.1, inner_steps=2, inner_optimizer="adam", inner_eps=1e-6),
    "anil": ANIL(inner_lr=0.1),
    "anil-pattern": ANIL(inner_lr=0.1, head="*"),
    "meta_sgd": MetaSGD(inner_lr=0.1, inner_steps=2),
    "reptile": Reptile(inner_lr=0.1, inner_steps=2),
    "reptile-carried": Reptile(inner_lr=0.01, inner_steps=2, inner_optimizer="adam", moments="carried"),
    "protonet": ProtoNet(),
}


def subject_of(method, freeze=(), **options):
    algorithm = METHODS[method]
    tasks = Blobs() if method == "protonet" else Curves()
    return learner(algorithm, lambda: Network(4 if method == "protonet" else 2), tasks, freeze=freeze, **options)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("freeze", [(), ("body.2.*", "scale")])
def test_neither_loop_changes_a_frozen_parameter(method, freeze):
    """Each slot of a learned kind lacks them, φ has none that differs, and weight decay leaves them as they are."""
    outer = OuterLoop(optimizer="sgd", lr=0.1, weight_decay=0.5, meta_batch_size=2, shard_size=2)
    subject = subject_of(method, freeze, outer=outer)
    frozen = {*FROZEN, *(("body.2.weight", "body.2.bias") if freeze else ())}
    assert subject.model.frozen == frozen
    before, after = subject.initial(0), train(subject, 3)
    old, new = (subject.parameters(s) for s in (before, after))
    moved = {n for n in new if not new[n].equal(old[n])}
    assert moved == set(new) - frozen - {"shift"}
    for name, slot in subject.slots.items():
        assert slot.rule == "constant" or not frozen & set(slot.layout.names), name


@pytest.mark.parametrize("method", ["maml", "fomaml", "adam", "anil", "meta_sgd", "protonet"])
def test_the_meta_gradient_is_that_of_the_learned_parameters(method):
    """… as autograd has it for a module with ``requires_grad=False``."""
    subject, shard = subject_of(method), keys(0, 1)
    theta = somewhere(subject)
    expected, loss = plain_contribution(subject, theta, shard)
    got = subject.contribute(theta, shard, 3)
    assert got.slots.keys() == expected.keys()
    assert all(relative_error(got.slots[slot], expected[slot]) <= 1e-10 for slot in expected)
    assert got.metrics["loss"] == pytest.approx(loss, rel=1e-12)


def test_mixed_differentiation_keeps_them_too():
    subject, shard = subject_of("maml"), keys(0, 1)
    theta = somewhere(subject)
    expected = subject.contribute(theta, shard, 3)
    for hessian in ("forward", "reverse"):
        subject.set_engine(Engine(differentiation="mixed", hessian=hessian))
        assert relative_error(subject.contribute(theta, shard, 3).slots["model"], expected.slots["model"]) < 1e-12


def test_an_inner_loop_by_hand():
    """φ_1 of one task: the learned layers step along their own gradients, the frozen ones do not."""
    subject = subject_of("maml")
    state = subject.initial(0)
    task = torch.utils._pytree.tree_map(lambda t: t[0], subject.sample(keys(0)))
    module = Network().double()
    module.load_state_dict(subject.parameters(state))
    loss = plain.loss(subject.tasks, module(task.support.x), task.support)
    loss.backward()
    learned = {n: p for n, p in module.named_parameters() if p.requires_grad}
    phi = subject.adapt(state, task.support, inner_steps=1)
    assert set(phi) == set(learned)
    for name, parameter in learned.items():
        torch.testing.assert_close(phi[name], parameter.detach() - 0.1 * parameter.grad)


def test_a_neural_process_freezes_its_encoder():
    def frozen():
        model = ConditionalNeuralProcess(8, 8).build((2,), 2)
        next(model.children()).requires_grad_(False)
        return model

    outer = OuterLoop(meta_batch_size=2, shard_size=2)
    subject = learner(CNP(), frozen, Curves(), outer=outer)
    first = dict(frozen().named_parameters())
    fixed = {n for n, p in first.items() if not p.requires_grad}
    assert subject.model.frozen == fixed and fixed
    old, new = subject.parameters(subject.initial(0)), subject.parameters(train(subject, 2))
    assert {n for n in new if new[n].equal(old[n])} == fixed


def test_it_is_said_and_survives_export_resume_and_init_from(tmp_path):
    notes = []

    class Notes(Observer):
        def note(self, message):
            notes.append(message)

    def parts(steps, **more):
        return compose(
            tasks=Curves(),
            model=Network,
            algorithm=METHODS["maml"],
            outer=OuterLoop(meta_steps=steps, meta_batch_size=2, shard_size=2),
            evaluate=EvaluateSettings(every=1, tasks=2, test_tasks=2),
            tracking="none",
            freeze=("body.2.bias",),
            **more,
        )

    directory = str(tmp_path / "run")
    train_experiment(parts(1), RunRequest(run_dir=directory), Notes())
    [line] = [n for n in notes if "frozen" in n]
    assert line == (
        "frozen by requires_grad=False and model.freeze, in inner and outer loop: "
        "scale, order, body.0.weight, body.0.bias, body.2.bias"
    )
    whole = train_experiment(parts(3), RunRequest(run_dir=directory, resume=True))
    straight = train_experiment(parts(3), RunRequest(run_dir=str(tmp_path / "straight")))
    assert whole.params_sha256 == straight.params_sha256
    start = Model(Network, freeze=("body.2.bias",)).initial(0)
    exported = str(tmp_path / "x.safetensors")
    load(directory, parts(3)).export(exported)
    started = parts(1, init_from=exported, seed=5).learner
    again = started.parameters(started.initial(5, initial_parameters(exported)))
    for values in start:
        for name, tensor in values.items():
            assert again[name].equal(tensor) == (name in {*FROZEN, "shift", "body.2.bias"}), name


def test_what_cannot_learn_is_refused():
    def all_frozen():
        return Network().requires_grad_(False)

    with pytest.raises(ConfigError, match="model: requires_grad=False fix every parameter of 'Network'; leave"):
        Model(all_frozen)
    with pytest.raises(ConfigError, match=r"requires_grad=False and model.freeze: \['head.\*', 'body.2.\*'\] fix "):
        Model(Network, freeze=("head.*", "body.2.*"))

    def headless():
        network = Network()
        network.head.requires_grad_(False)
        return network

    with pytest.raises(ConfigError, match=r"algorithm.head: the last module \(head.weight, head.bias\) matches no "):
        learner(ANIL(), headless, Curves())


@pytest.mark.parametrize("registered", [True, False])
def test_a_tensor_that_requires_a_gradient_and_is_no_parameter_is_refused(registered):
    class Loose(nn.Linear):
        def __init__(self):
            super().__init__(1, 1)
            if registered:
                self.register_buffer("gain", torch.ones(1, requires_grad=True))
            else:
                self.gain = torch.ones(1, requires_grad=True)

        def forward(self, x):
            return super().forward(x) * self.gain

    with pytest.raises(ConfigError, match="model: '0.gain' requires a gradient but is no parameter.*nn.Parameter"):
        Model(lambda: nn.Sequential(Loose()))
