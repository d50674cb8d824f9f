"""The tensors of θ that the steps of an inner loop depend on."""

from __future__ import annotations

import torch
import torch.utils._pytree as pytree
from torch import Tensor

from metadist.core.algorithm import Theta
from metadist.core.parameters import Parameters
from metadist.core.random import TaskKey
from metadist.core.task import Task
from metadist.engine.meta_gradient import MetaGradient, Names


def held_by_steps(gradient: MetaGradient, theta: Theta, task: Task, key: TaskKey) -> Names:
    """Find the tensors of θ that an inner step depends on besides its state.

    Ordinary autograd finds them: it distinguishes None (no dependence) from zero, which ``torch.func`` does not.
    """
    leaves = {
        (slot, n): t.detach().clone().requires_grad_() for slot in gradient.learned for n, t in theta[slot].items()
    }
    with torch.enable_grad():
        given = {**theta, **{slot: Parameters({n: leaves[slot, n] for n in theta[slot]}) for slot in gradient.learned}}
        context = gradient.context(key, key.tasks, 0, task)
        descent = gradient.descent(context, given, task)
        phi = descent.phi.map(lambda t: t.detach().clone().requires_grad_())
        outputs = [descent.loss(phi, step) for step in range(gradient.algorithm.inner_steps)]
        outputs += [t.sum() for t in pytree.tree_leaves(descent.rate) if isinstance(t, Tensor)]
        outputs = [o for o in outputs if o.requires_grad]
        if not outputs:
            return frozenset()
        found = torch.autograd.grad(sum(outputs[1:], outputs[0]), list(leaves.values()), allow_unused=True)
    return frozenset(name for name, g in zip(leaves, found) if g is not None)
