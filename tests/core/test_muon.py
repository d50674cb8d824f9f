"""Muon: torch.optim.Muon in float64, the paper's iteration, AdamW for all that is no matrix, bits by threads."""

import math

import pytest
import torch
import toys
from torch import nn

from metadist.algorithms import MAML, MetaSGD
from metadist.core.errors import ConfigError
from metadist.core.model import Model
from metadist.core.muon import orthogonalised
from metadist.core.outer import OuterLoop, SlotOptimizer
from metadist.core.parameters import Layout
from metadist.core.state import Contribution, Slot, State
from metadist.models import MLP

SHAPES = {"wide": (3, 5), "kernel": (6, 2, 3, 3), "bias": (4,), "square": (4, 4), "embedding": (7, 3)}
MATRICES = ("wide", "kernel", "square")
STEPS = 20


def tensors(seed):
    generator = torch.Generator().manual_seed(seed)
    return {n: torch.randn(s, generator=generator, dtype=torch.float64) for n, s in SHAPES.items()}


def gradients(theta, step):
    noise = tensors(100 + step)
    return {n: t + torch.sin(3 * t) + 0.1 * noise[n] for n, t in theta.items()}


def slots():
    return {"model": Slot(Layout.of(tensors(0)), matrices=MATRICES)}


def trained(outer, steps=STEPS):
    declared = slots()
    layout = declared["model"].layout
    start = {"model": layout.flatten(tensors(0))}
    state = State(start, outer.initial(declared, start))
    for step in range(steps):
        flat = layout.flatten(gradients(layout.unflatten(state.slots["model"]), step))
        state, _ = outer.update(declared, state, Contribution({"model": 3.0 * flat}, 3.0, 3), step)
    return layout.unflatten(state.slots["model"])


def test_twenty_steps_of_torch_optim(monkeypatch):
    """Kernels are flattened to [out, rest]; embeddings and vectors learn by AdamW, at the same rate and decay."""
    monkeypatch.setattr(torch.Tensor, "bfloat16", torch.Tensor.clone)  # torch iterates in bfloat16
    lr, decay = 0.02, 0.1
    theta = {n: nn.Parameter(t.flatten(1) if n in MATRICES else t) for n, t in tensors(0).items()}
    whole, others = ([t for n, t in theta.items() if (n in MATRICES) == is_matrix] for is_matrix in (True, False))
    reference = [
        torch.optim.Muon(whole, lr=lr, momentum=0.9, weight_decay=decay, adjust_lr_fn="match_rms_adamw"),
        torch.optim.AdamW(others, lr=lr, betas=(0.8, 0.95), weight_decay=decay),
    ]
    schedules = [torch.optim.lr_scheduler.LinearLR(o, 1.0, 0.1, STEPS) for o in reference]
    for step in range(STEPS):
        found = gradients({n: t.detach().view(SHAPES[n]) for n, t in theta.items()}, step)
        for name, parameter in theta.items():
            parameter.grad = found[name].view(parameter.shape)
        for part in (*reference, *schedules):
            part.step()
    options = {"lr": lr, "final_lr": lr / 10, "schedule": "linear", "meta_steps": STEPS}
    ours = trained(OuterLoop(optimizer="muon", momentum=0.9, betas=(0.8, 0.95), weight_decay=decay, **options))
    for name, parameter in theta.items():
        torch.testing.assert_close(ours[name].view(parameter.shape), parameter.detach(), rtol=1e-11, atol=1e-12)


def test_the_momentum_is_0_95_by_default():
    got, expected = (trained(OuterLoop(optimizer="muon", momentum=m), 3) for m in (None, 0.95))
    assert all(got[n].equal(expected[n]) for n in SHAPES)
    assert not trained(OuterLoop(optimizer="muon", momentum=0.0), 3)["wide"].equal(expected["wide"])


@pytest.mark.parametrize("shape", [(5, 5), (3, 8), (8, 3), (1, 6), (64, 576)])
def test_singular_vectors_stay_and_singular_values_become_one_nearly(shape):
    """The iteration maps each singular value by a s + b s³ + c s⁵, five times: scalars in float64."""
    matrix = torch.randn(shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    left, values, right = torch.linalg.svd(matrix, full_matrices=False)
    values = values / math.sqrt(float(values.square().sum()))
    for _ in range(5):
        values = 3.4445 * values - 4.7750 * values**3 + 2.0315 * values**5
    torch.testing.assert_close(orthogonalised(matrix), left * values @ right, rtol=1e-9, atol=1e-10)


def test_a_matrix_of_zeros_stays():
    assert not orthogonalised(torch.zeros(3, 4)).any()


def test_bits_do_not_depend_on_threads_and_precision():
    matrix = torch.randn(200, 300, generator=torch.Generator().manual_seed(2))
    threads, precision = torch.get_num_threads(), torch.get_float32_matmul_precision()
    expected = orthogonalised(matrix)
    try:
        for count in (1, 2, 4):
            torch.set_num_threads(count)
            torch.set_float32_matmul_precision("medium" if count == 2 else "highest")
            assert orthogonalised(matrix).equal(expected)
            assert torch.get_num_threads() == count
    finally:
        torch.set_num_threads(threads)
        torch.set_float32_matmul_precision(precision)


class Several(nn.Module):
    def __init__(self):
        super().__init__()
        self.tokens, self.place = nn.Embedding(9, 4), nn.Parameter(torch.zeros(1, 6, 4))
        self.along, self.inner = nn.Conv1d(4, 8, 3, bias=False), nn.Linear(8, 8)
        self.norm, self.frozen, self.head = nn.LayerNorm(8), nn.Linear(8, 8), nn.Linear(8, 2)

    def forward(self, x):
        return self.head(self.norm(self.inner(self.along((self.tokens(x) + self.place).mT).mean(-1))))


def test_the_matrices_of_a_model_are_weights_and_kernels_without_embeddings_and_head():
    assert Model(Several, freeze=("frozen.*",)).matrices() == ("along.weight", "inner.weight")


def learner(algorithm, outer, hidden=(8,)):
    return toys.learner(algorithm, lambda: MLP(hidden=hidden).build((2,), 2), toys.Curves(), outer=outer)


def test_slots_without_matrices_learn_by_adamw_and_may_not_ask_for_muon():
    subject = learner(MetaSGD(), OuterLoop(optimizer="muon", meta_batch_size=2, shard_size=2))
    assert subject.slots["model"].matrices and not subject.slots["inner_lr"].matrices
    slots = {"inner_lr": subject.slots["inner_lr"]}
    start = {"inner_lr": torch.ones(slots["inner_lr"].layout.numel, dtype=torch.float64)}
    total = Contribution({"inner_lr": start["inner_lr"].cumsum(0)}, 1.0, 1)
    found = [
        outer.update(slots, State(start, outer.initial(slots, start)), total, 0)[0].slots["inner_lr"]
        for outer in (OuterLoop(optimizer="muon"), OuterLoop(optimizer="adamw"))
    ]
    assert found[0].equal(found[1])
    with pytest.raises(ConfigError, match="outer.optimizers.inner_lr.optimizer: muon, but slot 'inner_lr' has no matr"):
        learner(MetaSGD(), OuterLoop(optimizers={"inner_lr": SlotOptimizer(optimizer="muon")}))


def test_a_model_that_is_a_head_alone_is_refused():
    with pytest.raises(ConfigError, match="outer.optimizer: muon, but slot 'model' has no matrices"):
        learner(MAML(), OuterLoop(optimizer="muon"), hidden=())
