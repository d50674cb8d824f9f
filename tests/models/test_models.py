"""The networks of the package: sizes, derivatives, initial values, refused settings."""

from dataclasses import replace

import pytest
import torch
from torch import nn

from metadist.core.errors import ConfigError
from metadist.models import MLP, ConditionalNeuralProcess, Conv4
from metadist.models.conv4 import BatchNorm


def derivatives(norm, x):
    """Output, gradient and gradient of the squared gradient, by x, scale and shift."""
    x = x.clone().requires_grad_()
    leaves = [x, norm.weight, norm.bias]
    out = norm(x)
    first = torch.autograd.grad(out.sin().sum(), leaves, create_graph=True)
    return [out, *first, *torch.autograd.grad(sum(g.square().sum() for g in first), leaves)]


def test_batch_norm_is_torch_s_to_the_second_derivative():
    ours, theirs = BatchNorm(3).double(), nn.BatchNorm2d(3, track_running_stats=False).double()
    with torch.no_grad():
        for norm in (ours, theirs):
            norm.weight.copy_(torch.tensor([0.5, 2.0, -1.0]))
            norm.bias.copy_(torch.tensor([0.0, 1.0, -2.0]))
    x = torch.randn(4, 3, 5, 5, generator=torch.Generator().manual_seed(0), dtype=torch.float64) * 3 + 1
    for a, b in zip(derivatives(ours, x), derivatives(theirs, x)):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize(
    ("pooling", "image", "features"),
    [("stride", 28, 4 * 8), ("max", 28, 8), ("max", 84, 25 * 8), ("stride", 84, 36 * 8)],
)
def test_conv4_sizes(pooling, image, features):
    config = Conv4(filters=8, pooling=pooling)
    x = torch.randn(2, 3, image, image)
    assert config.build((3, image, image), None)(x).shape == (2, features)
    assert config.build((3, image, image), 5)(x).shape == (2, 5)
    averaged = replace(config, features="mean").build((3, image, image), None)
    assert averaged(x).shape == (2, 8)
    torch.testing.assert_close(averaged(x), averaged[:-2](x).mean((2, 3)))


def test_conv4_has_the_paper_s_112_thousand_parameters():
    """Omniglot, 64 filters, stride: 640 + 3 · 36928 of convolutions, 512 of norms, 256 · 5 + 5 of the head."""
    module = Conv4(pooling="stride").build((1, 28, 28), 5)
    assert sum(p.numel() for p in module.parameters()) == 640 + 3 * 36928 + 512 + 1285
    assert not list(module.buffers())


def test_group_norm_takes_any_number_of_filters():
    for filters in (1, 6, 12, 64):
        module = Conv4(filters=filters, norm="group", blocks=1).build((1, 4, 4), 2)
        assert module(torch.randn(2, 1, 4, 4)).shape == (2, 2)


def test_mlp():
    assert MLP(hidden=(7, 5)).build((1, 4, 4), None)(torch.randn(3, 1, 4, 4)).shape == (3, 5)
    assert MLP(hidden=()).build((4,), 2)(torch.randn(3, 4)).shape == (3, 2)
    with pytest.raises(ConfigError, match="at least one hidden layer"):
        MLP(hidden=()).build((4,), None)
    layers = [m for m in MLP(init="maml").build((1,), 1) if isinstance(m, nn.Linear)]
    assert all(layer.bias.eq(0).all() and layer.weight.abs().max() <= 0.02 for layer in layers)
    assert 0.007 < float(layers[1].weight.detach().std()) < 0.01  # a normal of .01, truncated at twice that, has .0088


def test_cnp_reads_a_set():
    module = ConditionalNeuralProcess(width=8, representation=6).build((2,), 3)
    x, y = torch.randn(5, 2), torch.randn(5, 3)
    order = torch.tensor([3, 1, 4, 0, 2])
    r = module.encode(x, y, None)
    torch.testing.assert_close(module.encode(x[order], y[order], None), r)
    padded = torch.cat([x, torch.full((2, 2), 1e30)]), torch.cat([y, torch.zeros(2, 3)])
    torch.testing.assert_close(module.encode(*padded, torch.tensor([1.0] * 5 + [0.0] * 2)), r)
    mean, deviation = module.decode(r, x)
    assert mean.shape == deviation.shape == (5, 3)
    assert bool((deviation > 0.1).all())


@pytest.mark.parametrize(
    "make",
    [
        lambda: Conv4(pooling="avg"),
        lambda: Conv4(norm="bach"),
        lambda: Conv4(features="means"),
        lambda: Conv4(filters=0),
        lambda: MLP(activation="rleu"),
        lambda: MLP(norm="batch"),
        lambda: MLP(hidden=(4, 0)),
    ],
)
def test_bad_settings(make):
    with pytest.raises(ConfigError, match=r"model\."):
        make()
