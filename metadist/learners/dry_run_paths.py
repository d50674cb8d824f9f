"""Try every way in which a run will call the user's module, before the run starts.

A module may work on one and fail on another: an operator may have a batching rule for its gradient and none for a plain
forward pass, so that training works and the first validation does not.
"""

from __future__ import annotations

import copy
import traceback
from collections.abc import Callable
from typing import Protocol

import torch
import torch.utils._pytree as pytree
from torch import Tensor, nn

from metadist.core.algorithm import Algorithm, Phi, with_inner_steps
from metadist.core.decompositions import PACKED
from metadist.core.errors import ConfigError, MetadistError, NonFiniteError, first_line
from metadist.core.model import Model, called
from metadist.core.random import TaskKey
from metadist.core.state import State
from metadist.core.task import Examples, alone
from metadist.core.tree import Tree
from metadist.engine.subject import Subject, initial_theta
from metadist.learners.culprit import failed

#: tasks that are computed together: more than one, so that ``vmap`` has tasks to batch
TASKS = 2
#: inner steps: the second one differentiates through the first
STEPS = 2


class Tried(Subject, Protocol):
    """A learner with all paths of a run: train and evaluate, and adapt and predict for one task."""

    def with_algorithm(self, algorithm: Algorithm) -> Tried: ...

    def adapt(self, state: State, support: Examples, inner_steps: int | None = None) -> Phi: ...

    def predict(self, state: State, phi: Phi, x: Tree, support: Examples) -> Tree: ...


def try_paths(learner: Tried, seed: int) -> None:
    """Train on two tasks, evaluate two, adapt to one and predict as the service does; look for state in the module.

    ConfigError names the path, the module and the remedy. NaN and Inf are left to training, which reports its tasks.
    """
    algorithm = learner.algorithm
    learner = learner.with_algorithm(with_inner_steps(algorithm, min(STEPS, algorithm.inner_steps)))
    theta, state = initial_theta(learner, seed), learner.initial(seed)
    few = TaskKey.of(seed, "train", 0, range(min(TASKS, learner.outer.meta_batch_size)))
    held_out = TaskKey.of(seed, "validation", 0, range(TASKS))

    def serve() -> None:
        task = alone(pytree.tree_map(torch.Tensor.cpu, learner.sample(held_out)), 0)
        phi = learner.adapt(state, task.support)
        learner.predict(state, phi, task.query.x, task.support)

    _try(learner, few, "trained", lambda: learner.contribute(theta, few, 0))
    _try(learner, held_out, "evaluated", lambda: learner.evaluate(theta, held_out, 0))
    if learner.device.type == "cpu":  # a service computes on the device of its own learner
        _try(learner, held_out, "served", serve)
    _try(learner, few, "trained", lambda: _refuse_state(learner, few))


def _try(learner: Tried, keys: TaskKey, path: str, compute: Callable[[], object]) -> None:
    try:
        compute()
    except NonFiniteError:
        return
    except MetadistError:
        raise
    except Exception as error:  # the user's own code
        if is_known(learner.model, error):
            raise ConfigError(refusal(learner.model, path, error)) from error
        one = pytree.tree_map(lambda t: t[0], learner.sample(keys))
        raise failed(learner, learner.initial(keys.seed), one, keys.split, error) from error


# What is said ---------------------------------------------------------------------------------------------------------

_CHANGES = ("in-place operation", "that would mutate a captured", "fallback path doesn't work on out=")


def refusal(model: Model, path: str, error: Exception) -> str:
    """Return one line: the module that fails when it is ``trained``, ``evaluated`` or ``served``, why, and a remedy.

    ValueError where ``error`` is not known.
    """
    name, module = _failing(model, error) or ("", model.module)
    known = _explanation(model, error)
    if known is None:
        raise ValueError(f"no reason is known for {first_line(error)}")
    of = f"'{name}' ({type(module).__name__})" if name else f"'{type(module).__name__}'"
    return f"model: {of} can't be {path}: {known[0]}; {known[1]}"


def is_known(model: Model, error: Exception) -> bool:
    """Return whether ``refusal`` knows the reason for ``error`` and a remedy."""
    return _explanation(model, error) is not None


def _explanation(model: Model, error: Exception) -> tuple[str, str] | None:
    """Return (reason, remedy)."""
    failing, text = _failing(model, error), str(error)
    if "scaled_dot_product" in text:
        return (
            "torch's fused attention has no second derivative",
            "state inner_steps in the algorithm, whose model then computes it from products, or call it within "
            "torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH)",
        )
    if "embedding_bag_backward" in text:
        return "EmbeddingBag has no second derivative", "use torch.nn.Embedding, and sum or average its rows in forward"
    if failing is None:
        return None
    if "forward AD" in text:
        return (
            f"the algorithm takes a derivative in forward mode, which an operator lacks ({first_line(error)})",
            "compute it from other operators of torch",
        )
    if text.startswith(PACKED):
        return (
            "its forward pass packs sequences, whose lengths would be read in Python",
            "pass them padded, and take the output at each one's last step by torch.gather, or mask the loss",
        )
    changes = any(sign in text for sign in _CHANGES)
    if changes and any(_is_spectral(m) for m in model.module.modules()):
        return (
            "spectral normalisation changes its own buffers in every forward pass",
            "use torch.nn.utils.parametrizations.weight_norm in its place",
        )
    if changes:
        return (
            "its forward pass changes a buffer or parameter in place, which tasks cannot share",
            "keep counters and averages out of forward",
        )
    if ".item()" in text or "data-dependent control flow" in text:
        return (
            "its forward pass reads the value of a tensor in Python, such as by if or .item()",
            "use torch.where or a mask",
        )
    if "Batching rule not implemented" in text:
        return f"vmap cannot compute several tasks together ({first_line(error)})", "use other operators of torch"
    return None


def _is_spectral(module: nn.Module) -> bool:
    parametrised = type(module).__name__ == "_SpectralNorm"
    hooks = module._forward_pre_hooks.values()
    return parametrised or any(type(hook).__name__ == "SpectralNorm" for hook in hooks)


def _failing(model: Model, error: Exception) -> tuple[str, nn.Module] | None:
    """Return the innermost module on the stack of ``error``, with its name; None for errors outside of ``forward``."""
    names, found = {id(m): n for n, m in model.module.named_modules()}, None
    for frame, _ in traceback.walk_tb(error.__traceback__):
        module = frame.f_locals.get("self")
        if isinstance(module, nn.Module) and id(module) in names:
            found = names[id(module)], module
    if found is None and "scaled_dot_product" in str(error):  # a derivative fails after all forward passes
        found = next(((n, m) for n, m in model.module.named_modules() if isinstance(m, nn.MultiheadAttention)), None)
    return found


# State in the module --------------------------------------------------------------------------------------------------


def _refuse_state(learner: Tried, keys: TaskKey) -> None:
    """Refuse a module that changes its buffers in ``forward``, or whose second call gives another result.

    θ holds all that a run learns: a change within the module would be lost, or would depend on the worker.
    """
    model = learner.model
    if not model.has_forward:
        return
    x = pytree.tree_map(lambda t: t[0], learner.sample(keys)).support.x
    theta = initial_theta(learner, keys.seed)
    bound = learner.bind(theta, keys.each()[0].to(learner.device), True)
    name = type(model.module).__name__
    with torch.no_grad():
        first, second = (pytree.tree_leaves(bound(theta["model"], x)) for _ in range(2))
        if not all(_same(a, b) for a, b in zip(first, second)):
            raise ConfigError(
                f"model: '{name}' gives two results for the same parameters, input and key: it draws random numbers of "
                "its own, or keeps state between calls; use torch.nn.Dropout (keyed by the task), and keep counters "
                "out of forward"
            )
        module = copy.deepcopy(model.module).train()
        before = {n: b.clone() for n, b in module.named_buffers()}
        called(module, x)
    changed = [n for n, b in module.named_buffers() if n in before and not _same(b, before[n])]
    if changed:
        raise ConfigError(
            f"model: the forward pass of '{name}' changes the buffer {', '.join(changed)}, and the change would be "
            "lost: a run learns parameters only; keep counters and averages out of forward, or make the buffer a "
            "parameter"
        )


def _same(a: object, b: object) -> bool:
    if not (isinstance(a, Tensor) and isinstance(b, Tensor)):
        return a == b
    return a.shape == b.shape and torch.allclose(a.double(), b.double(), rtol=1e-4, atol=1e-6, equal_nan=True)
