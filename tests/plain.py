"""The reference: one task after the other, ordinary autograd, no torch.func and nothing of metadist but its random
streams.
"""

from __future__ import annotations

import copy

import torch
import torch.nn.functional as F
from torch import nn

QUERY = (1 << 14) - 1


class KeyedDropout(nn.Module):
    """Dropout by masks drawn from the task's public stream ``dropout``, at (inner step, number of the call)."""

    def __init__(self, p, whole_channels, counter):
        super().__init__()
        self.p, self.whole_channels, self.counter = p, whole_channels, counter

    def forward(self, x):
        self.counter["call"] += 1
        shape = (*x.shape[:2], 1, 1) if self.whole_channels else x.shape
        stream = self.counter["key"].stream("dropout", self.counter["step"], self.counter["call"])
        return x * (stream.uniform(*shape) >= self.p) / (1 - self.p)


class Plain:
    """``module`` called with any tensors in place of its parameters and buffers, by putting them where those were."""

    def __init__(self, module, key):
        self.counter = {"key": key}
        self.module = copy.deepcopy(module).train()
        self.owners: dict[str, list] = {}
        first_name: dict[int, str] = {}
        for kind in ("parameters", "buffers"):
            for name, tensor in getattr(self.module, f"named_{kind}")(remove_duplicate=False):
                owner, _, leaf = name.rpartition(".")
                alias = first_name.setdefault(id(tensor), name)
                self.owners.setdefault(alias, []).append((self.module.get_submodule(owner), leaf))
        for owners in self.owners.values():
            for owner, leaf in owners:
                owner._parameters.pop(leaf, None)
                owner._buffers.pop(leaf, None)
        for parent in list(self.module.modules()):
            if isinstance(parent, nn.BatchNorm2d):
                parent.__class__ = nn.BatchNorm2d  # PyTorch's own, whatever a model makes of it
            for name, child in parent.named_children():
                if isinstance(child, (nn.Dropout, nn.Dropout2d)):
                    setattr(parent, name, KeyedDropout(child.p, isinstance(child, nn.Dropout2d), self.counter))

    def __call__(self, tensors, *arguments, step=QUERY, method="forward"):
        for name, owners in self.owners.items():
            for owner, leaf in owners:
                object.__setattr__(owner, leaf, tensors[name])
                if isinstance(owner, nn.RNNBase):
                    owner._flat_weights[owner._flat_weights_names.index(leaf)] = tensors[name]
        self.counter.update(step=step, call=0)
        return getattr(self.module, method)(*arguments)


def loss(family, prediction, examples):
    if family.kind == "classification":
        return F.cross_entropy(prediction, examples.y)
    return F.mse_loss(prediction, examples.y)


def descend(objective, phi, rates, steps, *, first_order=False, momentum=0.0, adam=None):
    """φ_k by hand. ``objective(phi, step)``; ``adam`` is (β1, β2, ε), ε inside the root."""
    first, second = dict.fromkeys(phi, 0.0), dict.fromkeys(phi, 0.0)
    for step in range(steps):
        inner = objective(phi, step)
        gradients = dict(zip(phi, torch.autograd.grad(inner, list(phi.values()), create_graph=not first_order)))
        if adam is not None:
            b1, b2, eps = adam
            first = {n: b1 * first[n] + (1 - b1) * g for n, g in gradients.items()}
            second = {n: b2 * second[n] + (1 - b2) * g**2 for n, g in gradients.items()}
            gradients = {
                n: first[n] / (1 - b1 ** (step + 1)) / (second[n] / (1 - b2 ** (step + 1)) + eps).sqrt() for n in phi
            }
        elif momentum:
            gradients = first = {n: momentum * first[n] + g for n, g in gradients.items()}
        phi = {n: p - rates[n] * gradients[n] for n, p in phi.items()}
    return phi


def prototypical(embed_support, embed_query, support, ways):
    centres = torch.stack([embed_support[support.y == c].mean(0) for c in range(ways)])
    return -((embed_query.unsqueeze(1) - centres) ** 2).sum(-1)
