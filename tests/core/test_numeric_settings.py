"""Numbers that no optimiser can use are refused by the name of their key; Adam's bias correction keeps its digits."""

import math

import pytest
import torch
from gradient_cases import make
from toys import keys, relative_error, somewhere, train

from metadist.algorithms import MAML, MetaSGD, Reptile
from metadist.core.engine import Engine
from metadist.core.errors import ConfigError
from metadist.core.inner_loop import Moments
from metadist.core.outer import OuterLoop
from metadist.core.parameters import Layout, Parameters
from metadist.core.state import Slot
from metadist.engine.agreement import compiled_disagrees
from metadist.engine.compiled import Compiled

NAN = math.nan
LAYOUT = Layout(("a",), ((1,),))
WRONG = {
    "outer.betas[0]: 1.0 is not a number in [0, 1)": lambda: OuterLoop(betas=(1.0, 0.999)),
    "outer.betas[1]: 1.5 is not a number in [0, 1)": lambda: OuterLoop(betas=(0.9, 1.5)),
    "outer.betas[1]: nan is not a number in [0, 1)": lambda: OuterLoop(betas=(0.9, NAN)),
    "outer.eps: -1e-08 is not a finite number of 0 or more": lambda: OuterLoop(eps=-1e-8),
    "outer.lr: nan is not a finite number": lambda: OuterLoop(lr=NAN),
    "outer.final_lr: inf is not a finite number": lambda: OuterLoop(final_lr=math.inf),
    "outer.weight_decay: nan is not a finite number": lambda: OuterLoop(weight_decay=NAN),
    "outer.momentum: 1.0 is not a number in [0, 1)": lambda: OuterLoop(optimizer="sgd", momentum=1.0),
    "outer.clip_norm: nan is not above 0": lambda: OuterLoop(clip_norm=NAN),
    "algorithm.inner_lr: nan is not a finite number": lambda: MAML(inner_lr=NAN),
    "algorithm.inner_lr: -0.1 is not a finite number of 0": lambda: MetaSGD(inner_lr=-0.1),
    "algorithm.inner_betas[1]: 1 is not a number in [0, 1)": lambda: MAML(inner_optimizer="adam", inner_betas=(0.9, 1)),
    "algorithm.inner_betas[0]: -0.1 is not a number": lambda: Reptile(inner_optimizer="adam", inner_betas=(-0.1, 0.9)),
    "algorithm.inner_eps: -1.0 is not a finite number": lambda: MAML(inner_optimizer="adam", inner_eps=-1.0),
    "algorithm.inner_momentum: nan is not a number in [0, 1)": lambda: MAML(inner_momentum=NAN),
    "algorithm.lr_of_inner_lr: nan is not a finite number": lambda: MetaSGD(lr_of_inner_lr=NAN),
    "lr of a slot: nan is not a finite number": lambda: Slot(LAYOUT, lr=NAN),
    "weight_decay of a slot: -1 is not a finite number": lambda: Slot(LAYOUT, weight_decay=-1),
    "bounds of a slot: (1.0, 0.0); expected (low, high)": lambda: Slot(LAYOUT, bounds=(1.0, 0.0)),
    "bounds of a slot: (nan, None); expected (low, high)": lambda: Slot(LAYOUT, bounds=(NAN, None)),
}


@pytest.mark.parametrize("message", WRONG)
def test_a_number_that_cannot_be_meant_is_refused_by_name(message):
    with pytest.raises(ConfigError) as refused:
        WRONG[message]()
    assert message in str(refused.value) and "\n" not in str(refused.value)


@pytest.mark.parametrize("beta", [0.0, 0.5, 0.999, 0.99999, 1 - 1e-7])
@pytest.mark.parametrize("count", [0, 1, 2, 5, 1000, 2**24])
def test_adam_s_bias_correction_has_float32_s_precision(beta, count):
    """With a count that is a tensor, as in compiled and carried moments, against float64."""
    algorithm = MAML(inner_lr=1.0, inner_optimizer="adam", inner_betas=(beta, beta), inner_eps=1e-12)
    g = torch.tensor([0.3, -2.0, 1e-3])

    def step(dtype, count, counted):
        p, gradient = Parameters({"a": torch.zeros(3, dtype=dtype)}), Parameters({"a": g.to(dtype)})
        moments = Moments(p, p, count, counted)
        phi, after = algorithm.update(p, gradient, 1.0, moments)
        return phi["a"], after.count

    # By hand: m = (1 − β) g and v = (1 − β) g², divided by 1 − β^(t + 1).
    correction = -math.expm1((count + 1) * math.log(beta)) if beta else 1.0
    exact = -(g.double() * (1 - beta) / correction) / (g.double().square() * (1 - beta) / correction + 1e-12).sqrt()
    got, after = step(torch.float32, torch.tensor(float(count), dtype=torch.float64), True)
    assert got.dtype == torch.float32 and float(after) == count + 1
    torch.testing.assert_close(got.double(), exact, rtol=1e-6, atol=0)


def test_compiled_and_carried_counts_agree_with_float64(monkeypatch):
    """The error of 1.3e-3 at β₂ = 0.99999 was taken for one of the compiler."""

    def eagerly(self, name, function, spec, tensors):
        def flat(*tensors):
            return torch.utils._pytree.tree_leaves(function(*torch.utils._pytree.tree_unflatten(tensors, spec)))

        returned = function(*torch.utils._pytree.tree_unflatten(tensors, spec))
        return flat, torch.utils._pytree.tree_structure(returned)

    monkeypatch.setattr(Compiled, "_compile", eagerly)
    adam = {"inner_lr": 0.01, "inner_steps": 3, "inner_optimizer": "adam", "inner_betas": (0.9, 0.99999)}
    outer = OuterLoop(meta_batch_size=2, shard_size=2)
    for algorithm in (MAML(**adam, inner_eps=1e-3), Reptile(**adam, moments="carried")):
        single, exact = (make(algorithm, "mlp", dtype=d, outer=outer) for d in (torch.float32, torch.float64))
        theta = somewhere(exact)
        expected = exact.contribute(theta, keys(0, 1), 3).slots["model"]
        single.set_engine(Engine(compile=True, differentiation="mixed"))
        got = single.contribute({n: p.map(torch.Tensor.float) for n, p in theta.items()}, keys(0, 1), 3).slots["model"]
        assert relative_error(got.double(), expected) < 1e-4
        assert compiled_disagrees(single, 0) is None


def test_carried_counts_stay_whole():
    algorithm = Reptile(inner_lr=0.01, inner_steps=3, inner_optimizer="adam", moments="carried")
    subject = make(
        algorithm, "mlp", dtype=torch.float32, outer=OuterLoop(optimizer="sgd", meta_batch_size=3, shard_size=2)
    )
    state = train(subject, 4)
    assert state.slots["inner_count"].tolist() == [12.0] and state.slots["inner_count"].dtype == torch.float32
