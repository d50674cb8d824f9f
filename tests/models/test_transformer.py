"""The transformer: torch's encoder as reference, derivatives in both modes, and refused settings."""

import math

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.func import functional_call, grad, jvp, vmap
from toys import keys

from metadist.core.errors import ConfigError
from metadist.core.model import Model
from metadist.models import Transformer

IMAGES, VECTORS = (2, 8, 12), (5,)


def inputs(shape, count=6, seed=0):
    return torch.randn(count, *shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def small(shape=IMAGES, outputs=3, **settings):
    torch.manual_seed(0)
    return Transformer(**{"patch": 4, "width": 8, "heads": 2, **settings}).build(shape, outputs).double()


@pytest.mark.parametrize("shape", [IMAGES, VECTORS])
@pytest.mark.parametrize("pooling", ["mean", "cls"])
def test_shapes(shape, pooling):
    x = inputs(shape)
    assert small(shape, 3, pooling=pooling)(x).shape == (6, 3)
    assert small(shape, None, pooling=pooling)(x).shape == (6, 8)
    assert small(shape, None, width=12, heads=3, depth=1, mlp_ratio=0.5)(x).shape == (6, 12)


def test_the_blocks_are_torch_s():
    """``nn.TransformerEncoderLayer`` with the same weights, between the other layers written out."""
    module = small(mlp_ratio=3.0)
    x = inputs(IMAGES)
    tokens = (
        F.conv2d(x, module.embedding.weight.view(8, 2, 4, 4), module.embedding.bias, stride=4).flatten(2).mT
        + module.positions
    )
    for block in module.blocks:
        layer = nn.TransformerEncoderLayer(8, 2, 24, 0.0, "gelu", batch_first=True, norm_first=True).double()
        attention = {"in_proj_weight": block.attention.qkv.weight, "in_proj_bias": block.attention.qkv.bias}
        layer.self_attn.load_state_dict(
            {**attention, **{f"out_proj.{n}": t for n, t in block.attention.out.state_dict().items()}}
        )
        for mine, theirs in ((block.mlp[0], layer.linear1), (block.mlp[2], layer.linear2)):
            theirs.load_state_dict(mine.state_dict())
        layer.norm1.load_state_dict(block.attention_norm.state_dict())
        layer.norm2.load_state_dict(block.mlp_norm.state_dict())
        tokens = layer(tokens)
    expected = module.head(F.layer_norm(tokens, (8,), module.norm.weight, module.norm.bias).mean(1))
    torch.testing.assert_close(module(x), expected, rtol=1e-12, atol=1e-12)


def test_tokens_of_a_vector_are_its_numbers():
    module = small((4,))
    x = inputs((4,))
    assert module.cut(x).shape == (6, 4, 1)
    order = torch.tensor([2, 0, 3, 1])
    assert not torch.allclose(module(x[:, order]), module(x)), "places are told apart"
    module.positions.data.zero_()
    torch.testing.assert_close(module(x[:, order]), module(x))


@pytest.mark.parametrize("shape", [IMAGES, VECTORS])
@pytest.mark.parametrize("pooling", ["mean", "cls"])
def test_forward_over_reverse_is_reverse_over_reverse(shape, pooling):
    """Hessian-vector products, for one task and over tasks with different parameters."""
    module, y = small(shape, pooling=pooling), torch.arange(6) % 3
    theta = {n: p.detach() for n, p in module.named_parameters()}
    direction = {n: torch.randn_like(p) for n, p in theta.items()}

    def loss(theta, x):
        return F.cross_entropy(functional_call(module, theta, (x,)), y)

    def forward(theta, x):
        return jvp(lambda t: grad(loss)(t, x), (theta,), (direction,))[1]

    def reverse(theta, x):
        return grad(lambda t: sum((g * direction[n]).sum() for n, g in grad(loss)(t, x).items()))(theta)

    x = torch.stack([inputs(shape, seed=task) for task in range(3)])
    many = {n: torch.stack([p, p + 0.1, p * 2]) for n, p in theta.items()}
    mapped = vmap(forward)(many, x)
    for task in range(3):
        own = {n: p[task] for n, p in many.items()}
        expected = reverse(own, x[task])
        for products in (forward(own, x[task]), {n: p[task] for n, p in mapped.items()}):
            assert max(float((products[n] - expected[n]).abs().max()) for n in theta) < 1e-10
        assert max(float(p.abs().max()) for p in expected.values()) > 0.1


def test_dropout_is_keyed_and_only_in_training():
    config = Transformer(patch=4, width=8, heads=2, dropout=0.5)
    model = Model(lambda: config.build(IMAGES, 3), dtype=torch.float64)
    learned, _, _ = model.initial(0)
    key, other = (keys(task).each()[0] for task in (4, 5))
    x = inputs(IMAGES)

    def out(key, training=True, **step):
        return model.bind({}, key, training)(learned, x, **step)

    assert out(key).equal(out(key)) and out(key).isfinite().all()
    assert not out(key).equal(out(other)) and not out(key).equal(out(key, step=1))
    assert out(key, False).equal(out(other, False)) and not out(key, False).equal(out(key))


def test_the_head_comes_last():
    assert Model(lambda: small()).head() == ("head.weight", "head.bias")
    assert math.prod(small(outputs=None)(inputs(IMAGES)).shape) == 48


@pytest.mark.parametrize(
    ("settings", "shape", "message"),
    [
        ({"patch": 5}, (1, 28, 28), r"model\.patch: 5 does not divide .* 28×28"),
        ({"patch": 0}, IMAGES, r"model\.patch: 0 is below 1"),
        ({"width": 30}, IMAGES, r"model\.width: 30 is not a multiple of model\.heads = 4"),
        ({"heads": 0}, IMAGES, r"model\.heads: 0"),
        ({"depth": 0}, IMAGES, r"model\.depth: 0"),
        ({"mlp_ratio": 0.001}, IMAGES, r"model\.mlp_ratio: 0\.001"),
        ({"dropout": 1.0}, IMAGES, r"model\.dropout: 1\.0"),
        ({"pooling": "max"}, IMAGES, r"model\.pooling"),
        ({}, (3, 4), r"model 'transformer' needs images .* \[3, 4\]"),
    ],
)
def test_impossible_settings_are_named(settings, shape, message):
    with pytest.raises(ConfigError, match=message):
        Transformer(**settings).build(shape, 3)
