"""Compute one shard's second-order MAML gradient, Σ over tasks of ∇θ L_query(φ_k), with several libraries.

Each contestant is written like the examples of its library.
"""

from __future__ import annotations

import copy
import importlib.util
import math
from collections.abc import Callable
from importlib.metadata import version
from typing import Any

import torch
from torch import nn
from torch.func import functional_call

from metadist.benchmarks.contestants.base import Contestant, Gradient, Problem
from metadist.core.errors import ConfigError, one_of


def loop(problem: Problem) -> Contestant:
    """Use PyTorch only: one task after the other, ``torch.autograd.grad(create_graph=True)``."""
    module, theta = problem.module(), problem.parameters()

    def compute() -> Gradient:
        total = [torch.zeros_like(t) for t in theta.values()]
        for support_x, support_y, query_x, query_y in problem.each():
            phi = theta
            for _ in range(problem.inner_steps):
                inner = problem.loss(functional_call(module, phi, (support_x,)), support_y)
                gradients = torch.autograd.grad(inner, list(phi.values()), create_graph=True)
                phi = {n: p - problem.inner_lr * g for (n, p), g in zip(phi.items(), gradients)}
            outer = problem.loss(functional_call(module, phi, (query_x,)), query_y)
            torch._foreach_add_(total, torch.autograd.grad(outer, list(theta.values())))
        return dict(zip(theta, total))

    return Contestant(waiting(compute, problem.device), dict)


def higher(problem: Problem) -> Contestant:
    """Use ``higher.innerloop_ctx``, as in its Omniglot example."""
    import higher as library

    module = problem.module()
    inner = torch.optim.SGD(module.parameters(), lr=problem.inner_lr)

    def compute() -> Gradient:
        module.zero_grad()
        for support_x, support_y, query_x, query_y in problem.each():
            with library.innerloop_ctx(module, inner, copy_initial_weights=False) as (functional, optimizer):
                for _ in range(problem.inner_steps):
                    optimizer.step(problem.loss(functional(support_x), support_y))
                problem.loss(functional(query_x), query_y).backward()
        return _grads(module)

    return Contestant(waiting(compute, problem.device), dict)


def torchopt(problem: Problem) -> Contestant:
    """Use ``torchopt.MetaSGD``; extract the state before and recover it after each task, as in its MAML example."""
    import torchopt as library

    module = problem.module()
    inner = library.MetaSGD(module, lr=problem.inner_lr)
    initial = library.extract_state_dict(module, by="reference", detach_buffers=True)
    initial_inner = library.extract_state_dict(inner, by="reference")
    theta = dict(module.named_parameters())

    def compute() -> Gradient:
        for parameter in theta.values():
            parameter.grad = None
        for support_x, support_y, query_x, query_y in problem.each():
            for _ in range(problem.inner_steps):
                inner.step(problem.loss(module(support_x), support_y))
            problem.loss(module(query_x), query_y).backward()
            library.recover_state_dict(module, initial)
            library.recover_state_dict(inner, initial_inner)
        return {n: p.grad for n, p in theta.items() if p.grad is not None}

    return Contestant(waiting(compute, problem.device), dict)


def jax(problem: Problem) -> Contestant:
    """Use JAX."""
    from metadist.benchmarks.contestants.jax import contestant

    return contestant(problem)


def metadist(problem: Problem) -> Contestant:
    """Use metadist's engine without compilation."""
    return _ours(problem, compiled=False)


def metadist_compiled(problem: Problem) -> Contestant:
    """Use metadist's compiled engine."""
    return _ours(problem, compiled=True)


def _ours(problem: Problem, compiled: bool) -> Contestant:
    """Set the engine of a copy of the learner, and contribute tasks that are sampled already."""
    from metadist.config.engine import EngineSettings
    from metadist.workers.plan import device_facts

    learner = copy.copy(problem.learner)
    settings = EngineSettings(compile="always" if compiled else "never", differentiation="unrolled")
    learner.set_engine(learner.plan(settings, device_facts(problem.device, "this machine")).engine)
    theta = {n: p.map(lambda t: t.to(problem.device)) for n, p in problem.state.theta(learner.slots).items()}
    return Contestant(
        lambda: learner.contribute_tasks(theta, problem.tasks, problem.keys, 0),
        lambda contribution: dict(learner.slots["model"].layout.unflatten(contribution.slots["model"])),
    )


def waiting(compute: Callable[[], Any], device: torch.device) -> Callable[[], Any]:
    """Return ``compute`` such that it waits for the GPU's result."""
    if device.type != "cuda":
        return compute

    def compute_and_wait() -> Any:
        result = compute()
        torch.cuda.synchronize()
        return result

    return compute_and_wait


def _grads(module: nn.Module) -> Gradient:
    return {n: p.grad.clone() for n, p in module.named_parameters() if p.grad is not None}


#: metadist's contestants, and the peers by the names of their distributions on PyPI.
OURS: dict[str, Callable[[Problem], Contestant]] = {"metadist": metadist, "metadist compiled": metadist_compiled}
PEERS: dict[str, Callable[[Problem], Contestant]] = {"loop": loop, "higher": higher, "torchopt": torchopt, "jax": jax}


def chosen_peers(names: str) -> list[str]:
    """Return ``loop,jax`` as a list. It always has the loop, with which all are compared. Raises ConfigError."""
    chosen = [name.strip() for name in names.split(",") if name.strip()]
    for name in chosen:
        one_of("--against", name, PEERS)
        if name != "loop" and importlib.util.find_spec(name) is None:
            raise ConfigError(f"--against {name}: {name} is not installed; pip install 'metadist[bench]' brings it")
    return list(dict.fromkeys(["loop", *chosen]))


def versions(peers: list[str]) -> dict[str, str]:
    """Return the versions of the compared libraries."""
    return {name: version(name) for name in ("metadist", "torch", *peers) if name != "loop"}


def relative_error(gradient: Gradient, reference: Gradient) -> float:
    """Return ‖g − r‖ / ‖r‖ over all parameters, in float64; infinity where a parameter is missing."""
    if gradient.keys() != reference.keys():
        return math.inf
    difference = sum(
        float((gradient[n].double().cpu() - r.double().cpu()).square().sum()) for n, r in reference.items()
    )
    error = math.sqrt(difference / sum(float(r.double().square().sum()) for r in reference.values()))
    return math.inf if math.isnan(error) else error
