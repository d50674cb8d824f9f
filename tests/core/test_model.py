"""Any nn.Module as a pure function: initial values, names, tied weights, keyed dropout, replaced functions."""

import cloudpickle
import pytest
import torch
import torch.nn.functional as F
from torch import nn
from toys import Everything, keys

from metadist.core.errors import ConfigError
from metadist.core.model import Model

KEY = keys(4).each()[0]


def test_initial_values_depend_on_the_seed_alone():
    model = Model(Everything)
    torch.manual_seed(1)
    before = torch.get_rng_state()
    first = model.initial(3)
    assert torch.get_rng_state().equal(before)
    torch.rand(5)
    again, other = Model(Everything).initial(3), model.initial(4)
    assert all(t.equal(again[0][n]) for n, t in first[0].items())
    assert not first[0]["stem.weight"].equal(other[0]["stem.weight"])


def test_names_are_the_module_s():
    model = Model(Everything, dtype=torch.float64, freeze=("stem.*",))
    learned, frozen, buffers = model.initial(0)
    assert set(frozen) == {"stem.weight", "stem.bias"}
    assert set(learned) | set(frozen) == {n for n, _ in Everything().named_parameters()}
    assert "second.weight" not in learned  # tied: the first name stands for both
    assert {n: b.dtype for n, b in buffers.items()} == {"offset": torch.float64, "order": torch.int64}
    assert model.head() == ("head.weight", "head.bias")


def test_a_held_model_is_the_model_bit_for_bit():
    model = Model(Everything, freeze=("stem.*",))
    x = torch.randn(3, 1, 6, 6, generator=torch.Generator().manual_seed(0))
    found = []
    for seed in (1, 2):
        learned, frozen, buffers = model.initial(seed)
        bound = model.bind({**frozen, **buffers}, None, False)
        found.append((bound.holding(learned), bound(learned, x)))
    for held, expected in found:  # two held models are independent
        assert held({}, x).equal(expected)


def test_a_call_is_the_module_s_own():
    module = Everything().eval()
    model = Model(lambda: module)
    learned, _, buffers = model.initial(0)
    x = torch.randn(5, 1, 6, 6)
    bound = model.bind(buffers, KEY, training=False)
    torch.testing.assert_close(bound(learned, x), module(x))
    state = {n: t + 1 for n, t in learned.items()}
    other = Everything().eval()
    other.load_state_dict({**state, **buffers, "second.weight": state["first.weight"]})
    torch.testing.assert_close(bound(state, x), other(x))
    torch.testing.assert_close(bound(learned, x), module(x))  # the call above left the parameters unchanged


def test_it_travels():
    model, x = Model(lambda: Everything(outputs=2)), torch.randn(5, 1, 6, 6)
    learned, _, buffers = model.initial(0)
    there = cloudpickle.loads(cloudpickle.dumps(model))
    a, b = (m.bind(buffers, KEY, training=True)(learned, x) for m in (model, there))
    assert a.equal(b)


class Functional(nn.Module):
    def __init__(self, function, p):
        super().__init__()
        self.function, self.p, self.weight = function, p, nn.Parameter(torch.ones(()))

    def forward(self, x):
        return self.function(x * self.weight, self.p, self.training)


SHAPES = {"dropout": (50, 40, 8), "dropout1d": (50, 40, 8), "dropout2d": (50, 40, 4, 4), "dropout3d": (50, 40, 2, 2, 2)}


@pytest.mark.parametrize("name", [*SHAPES, "alpha_dropout"])
def test_dropout_by_key_has_the_distribution_of_torch_s(name):
    """Mean and share of dropped units are those of torch; whole channels where torch drops whole channels."""
    function, p = getattr(F, name), 0.3
    model = Model(lambda: Functional(function, p))
    learned, _, _ = model.initial(0)
    x = torch.ones(SHAPES.get(name, (50, 40, 8))) if name != "alpha_dropout" else torch.randn(50, 40, 64)
    torch.manual_seed(0)
    ours, theirs = model.bind({}, KEY, training=True)(learned, x), function(x, p, True)
    assert ours.equal(model.bind({}, KEY, training=True)(learned, x))
    assert not ours.equal(model.bind({}, KEY, training=True)(learned, x, step=1))
    assert not ours.equal(model.bind({}, keys(5).each()[0], training=True)(learned, x))
    assert model.bind({}, KEY, training=False)(learned, x).equal(x)
    torch.testing.assert_close(ours.mean(), theirs.mean(), atol=0.1, rtol=0)
    torch.testing.assert_close(ours.var(), theirs.var(), atol=0.1, rtol=0)
    if name == "alpha_dropout":
        assert abs(float(ours.mean())) < 0.02
        assert abs(float(ours.var()) - 1) < 0.03
    else:
        assert abs(float((ours == 0).float().mean()) - p) < 0.05
        per_channel = (ours == 0).flatten(2).float().mean(2)
        assert bool(((per_channel == 0) | (per_channel == 1)).all()) == (name != "dropout")


@pytest.mark.parametrize(("p", "expected"), [(0.0, 1.0), (1.0, 0.0)])
def test_dropout_of_nothing_and_of_everything(p, expected):
    model = Model(lambda: nn.Sequential(nn.Linear(2, 2), nn.Dropout(p)))
    ones = {"0.weight": torch.zeros(2, 2), "0.bias": torch.ones(2)}
    assert model.bind({}, KEY, training=True)(ones, torch.ones(3, 2)).eq(expected).all()


def test_two_dropouts_of_one_pass_draw_different_masks():
    model = Model(lambda: nn.Sequential(nn.Linear(100, 100), nn.Dropout(0.5), nn.Dropout(0.5)))
    ones = {"0.weight": torch.zeros(100, 100), "0.bias": torch.ones(100)}
    out = model.bind({}, KEY, training=True)(ones, torch.ones(10, 100))
    assert abs(float((out == 0).float().mean()) - 0.75) < 0.05
    assert set(out.unique().tolist()) == {0.0, 4.0}


def test_attention_with_dropout_of_its_own_is_refused():
    """Torch draws this dropout inside one function: two runs of one task would differ."""
    with pytest.raises(
        ConfigError, match=r"'0\.self_attn' is a MultiheadAttention with dropout = 0\.1.*; set its dropout to 0"
    ):
        Model(lambda: nn.Sequential(nn.TransformerEncoderLayer(8, 2, 16, dropout=0.1)))
    with pytest.raises(ConfigError, match="'MultiheadAttention' is a MultiheadAttention"):
        Model(lambda: nn.MultiheadAttention(8, 2, dropout=0.2))
    assert Model(lambda: nn.Sequential(nn.MultiheadAttention(8, 2), nn.Dropout(0.1))).module[0].dropout == 0


class Norm(nn.Module):
    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(4))

    def forward(self, x):
        return F.group_norm(F.dropout(x, 0.5, self.training), 2, self.weight)


def test_replacements_are_called_wherever_they_are_given():
    calls = []

    def doubled(input, groups, weight=None, bias=None, eps=1e-5):
        calls.append((groups, tuple(weight.shape)))
        return 2 * F.group_norm(input, groups, weight, bias, eps)

    model, x = Model(Norm), torch.randn(3, 4, 5, generator=torch.Generator().manual_seed(0))
    learned, _, _ = model.initial(0)
    replaced = {"replacements": {F.group_norm: doubled}}
    plain, other = (model.bind({}, KEY, True, **options)(learned, x) for options in ({}, replaced))
    assert other.equal(2 * plain) and calls == [(2, (4,))]
    torch.manual_seed(0)
    model.bind({}, None, True, **replaced)(learned, x)
    assert len(calls) == 2
    judged = model.bind({}, None, False, **replaced)(learned, x)
    assert judged.equal(2 * F.group_norm(x, 2, learned["weight"])) and len(calls) == 3


def test_missing_attributes_are_listed():
    assert Model(Norm).missing("forward", "encode", "weight", "decode") == ["encode", "decode"]
