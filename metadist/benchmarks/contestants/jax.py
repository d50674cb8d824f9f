"""Compute the gradient of the same network in JAX: jitted, with the arrays on its device before the call."""

from __future__ import annotations

import os
from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor, nn

from metadist.core.errors import ConfigError
from metadist.models.conv4 import SpatialMean

if TYPE_CHECKING:
    from metadist.benchmarks.contestants.base import Contestant, Problem


def limit_threads(threads: int) -> None:
    """Limit XLA's CPU threads. This works only before JAX's first computation in a process."""
    if "xla_cpu_multi_thread_eigen" in os.environ.get("XLA_FLAGS", ""):
        return
    flags = f"--xla_cpu_multi_thread_eigen={'true' if threads > 1 else 'false'} intra_op_parallelism_threads={threads}"
    os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} {flags}".strip()
    os.environ["NPROC"] = str(threads)  # the size of XLA's own thread pool


def contestant(problem: Problem) -> Contestant:
    """Return the contestant. Raises ConfigError where JAX lacks the device or the network has an unknown layer."""
    import jax
    import jax.numpy as jnp

    from metadist.benchmarks.contestants.base import Contestant

    if problem.device.type == "cuda" and jax.default_backend() != "gpu":
        raise ConfigError("--against jax --device cuda: this JAX has no GPU backend; pip install 'jax[cuda12]'")
    jax.config.update("jax_default_matmul_precision", "highest")
    network, layout = _network(problem.module()), _Layout(problem)

    def loss(parameters: dict[str, Any], x: Any, y: Any) -> Any:
        output = network(parameters, x)
        if problem.classification:
            return -jnp.mean(jnp.take_along_axis(jax.nn.log_softmax(output), y[:, None], axis=1))
        return jnp.mean((output - y) ** 2)

    def objective(theta: dict[str, Any], support_x: Any, support_y: Any, query_x: Any, query_y: Any) -> Any:
        phi = theta
        for _ in range(problem.inner_steps):
            gradient = jax.grad(loss)(phi, support_x, support_y)
            phi = jax.tree.map(lambda p, g: p - problem.inner_lr * g, phi, gradient)
        return loss(phi, query_x, query_y)

    with _precision(problem):
        whole = _over_tasks(objective, problem, *jax.device_put((layout.theta, layout.tasks)))

    def call() -> Any:
        with _precision(problem):
            return jax.block_until_ready(whole())

    return Contestant(call, layout.read)


def _over_tasks(objective: Callable[..., Any], problem: Problem, theta: Any, tasks: Any) -> Callable[[], Any]:
    """Return a function that computes Σ over tasks of ∇θ in the fastest way that we found for JAX."""
    import jax
    import jax.numpy as jnp

    batched: dict[str, Any] = {"in_axes": (None, 0, 0, 0, 0)}
    if not any(isinstance(layer, nn.Conv2d) for layer in problem.module().modules()):
        gradient_of_sum = jax.jit(jax.grad(lambda theta, tasks: jax.vmap(objective, **batched)(theta, *tasks).sum()))
        return lambda: gradient_of_sum(theta, tasks)
    if problem.device.type != "cpu":
        gradients = jax.vmap(jax.grad(objective), **batched)
        sum_of_gradients = jax.jit(lambda theta, tasks: jax.tree.map(lambda g: g.sum(0), gradients(theta, *tasks)))
        return lambda: sum_of_gradients(theta, tasks)
    # On a CPU the grouped convolutions of vmap take twice as long as one task after the other, and convolutions inside
    # ``lax.scan`` six times as long.
    add = jax.jit(
        lambda total, theta, task: jax.tree.map(jnp.add, total, jax.grad(objective)(theta, *task)), donate_argnums=0
    )
    zeros, each = jax.jit(lambda theta: jax.tree.map(jnp.zeros_like, theta)), list(zip(*tasks))

    def one_by_one() -> Any:
        total = zeros(theta)
        for task in each:
            total = add(total, theta, task)
        return total

    return one_by_one


def _precision(problem: Problem) -> AbstractContextManager[Any]:
    import jax

    return jax.enable_x64(problem.learner.model.dtype == torch.float64)


class _Layout:
    """Convert between PyTorch's layout and the fastest one in JAX.

    In JAX, images are [N, H, W, C], kernels [h, w, in, out], and weights [in, out].
    """

    def __init__(self, problem: Problem) -> None:
        self._names = list(problem.parameters())
        self.theta = {n: self._there(t.detach()) for n, t in problem.parameters().items()}
        support, query = problem.tasks.support, problem.tasks.query
        self.tasks = tuple(self._examples(t) for t in (support.x, support.y, query.x, query.y))

    @staticmethod
    def _there(weight: Tensor) -> np.ndarray:
        order = {4: (2, 3, 1, 0), 2: (1, 0)}.get(weight.dim())
        return (weight if order is None else weight.permute(order)).contiguous().cpu().numpy()

    @staticmethod
    def _examples(t: Tensor) -> np.ndarray:
        if not t.is_floating_point():
            return t.to(torch.int32).cpu().numpy()
        return (t.permute(0, 1, 3, 4, 2) if t.dim() == 5 else t).contiguous().cpu().numpy()

    def read(self, gradient: dict[str, Any]) -> dict[str, Tensor]:
        """Return JAX's gradient in PyTorch's layout."""
        tensors = {n: torch.from_numpy(np.array(gradient[n])) for n in self._names}
        orders = {4: (3, 2, 0, 1), 2: (1, 0)}
        return {n: t.permute(orders[t.dim()]) if t.dim() in orders else t for n, t in tensors.items()}


def _network(module: nn.Module) -> Callable[[dict[str, Any], Any], Any]:
    """Return a sequential module as a function of its parameters; the loop over layers runs only in ``jit``'s trace."""
    if not isinstance(module, nn.Sequential):
        raise ConfigError(f"--against jax: expected a sequential network; the model is a {type(module).__name__}")
    layers = list(module.named_children())
    for name, layer in layers:
        if type(layer) not in _LAYERS:
            raise ConfigError(
                f"--against jax: layer '{name}' is a {type(layer).__name__}; expected one of "
                f"{', '.join(t.__name__ for t in _LAYERS)}"
            )

    def forward(parameters: dict[str, Any], x: Any) -> Any:
        for name, layer in layers:
            own = {leaf: parameters[f"{name}.{leaf}"] for leaf, _ in layer.named_parameters()}
            x = _LAYERS[type(layer)](layer, own, x)
        return x

    return forward


def _convolution(layer: Any, own: dict[str, Any], x: Any) -> Any:
    from jax import lax

    padding = [(p, p) for p in layer.padding]
    return (
        lax.conv_general_dilated(x, own["weight"], layer.stride, padding, dimension_numbers=("NHWC", "HWIO", "NHWC"))
        + own["bias"]
    )


def _batch_norm(layer: Any, own: dict[str, Any], x: Any) -> Any:
    from jax import lax

    mean, variance = x.mean((0, 1, 2)), x.var((0, 1, 2))
    return (x - mean) * (lax.rsqrt(variance + layer.eps) * own["weight"]) + own["bias"]


def _max_pool(layer: Any, own: dict[str, Any], x: Any) -> Any:
    from jax import lax

    window = (1, layer.kernel_size, layer.kernel_size, 1)
    return lax.reduce_window(x, -np.inf, lax.max, window, window, "VALID")


def _relu(layer: Any, own: dict[str, Any], x: Any) -> Any:
    import jax

    return jax.nn.relu(x)


def _flatten(layer: Any, own: dict[str, Any], x: Any) -> Any:
    # PyTorch flattens channels first.
    return (x.transpose(0, 3, 1, 2) if x.ndim == 4 else x).reshape(len(x), -1)


_LAYERS: dict[type[nn.Module], Callable[[Any, dict[str, Any], Any], Any]] = {
    nn.Linear: lambda layer, own, x: x @ own["weight"] + own["bias"],
    nn.Conv2d: _convolution,
    nn.BatchNorm2d: _batch_norm,
    nn.ReLU: _relu,
    nn.MaxPool2d: _max_pool,
    SpatialMean: lambda layer, own, x: x.mean((1, 2)),
    nn.Flatten: _flatten,
}
