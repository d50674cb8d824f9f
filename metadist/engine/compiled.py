"""Functions of tensors as compiled graphs, each traced once per signature.

``make_fx`` runs the Python once and records what reaches the dispatcher, so that ``vmap``, ``grad``, dataclasses, function
modes and a user's own code need nothing but to be functions of tensors. Inductor then compiles the recorded graph whole;
its cache on disk lets the other processes of a node load what the first one compiled.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
import torch.utils._pytree as pytree
from torch import Tensor

from metadist.core.errors import ConfigError
from metadist.engine.block_sums import DECOMPOSITIONS
from metadist.engine.channels_last import channels_last

log = logging.getLogger(__name__)

#: shards of more shapes than this are no case for compiling
MAX_SIGNATURES = 16


class Compiled:
    """``run(name, function, *arguments)``, compiled once for every (name, shapes of the arguments' tensors).

    Whole numbers among the arguments become 0-d tensors, so that one graph serves every meta-step and inner step.
    ``around(name)`` surrounds each compilation: a node's lock, a message.
    """

    def __init__(
        self, device: torch.device, around: Callable[[str], AbstractContextManager[Any]] = lambda name: nullcontext()
    ) -> None:
        self.device, self.around = device, around
        self.seconds = 0.0
        self._functions: dict[tuple[Any, ...], tuple[Callable[..., Any], Any]] = {}

    def runner(self, *static: Any) -> Callable[..., Any]:
        """A run function whose functions also depend on ``static`` (hashable)."""

        def run(name: str, function: Callable[..., Any], *arguments: Any) -> Any:
            leaves, spec = pytree.tree_flatten(arguments)
            tensors = [t if isinstance(t, Tensor) else torch.tensor(t, device=self.device) for t in leaves]
            key = (name, *static, *((t.shape, t.dtype) for t in tensors))
            if key not in self._functions:
                self._functions[key] = self._compile(name, function, spec, tensors)
            compiled, returned = self._functions[key]
            results = compiled(*(t.contiguous() for t in tensors))
            if self.device.type == "cuda":  # a replayed CUDA graph writes its results where it wrote the last ones
                results = [t.clone() for t in results]
            return pytree.tree_unflatten(list(results), returned)

        return run

    def _compile(
        self, name: str, function: Callable[..., Any], spec: Any, tensors: list[Tensor]
    ) -> tuple[Callable[..., Any], Any]:
        if sum(key[0] == name for key in self._functions) >= MAX_SIGNATURES:
            raise ConfigError(
                f"engine.compile: this run has more than {MAX_SIGNATURES} different shapes of shards (tasks of unequal size?), each "
                "of which would be compiled; use engine.compile=never"
            )
        examples: list[Any] = [t.contiguous() for t in tensors]
        began = time.perf_counter()
        import torch._inductor.config  # takes a second

        with self.around(name):
            graph, returned = trace(function, spec, examples)
            if self.device.type == "cpu":
                channels_last(graph)
            _write_apart(graph)
            # The loop over kernels outside of Python: a CUDA graph, or C++, which saves a fifth of a small shard's time.
            settings = {"triton.cudagraphs": True} if self.device.type == "cuda" else {"cpp_wrapper": True}
            with torch.no_grad(), torch._inductor.config.patch(settings):
                compiled = torch._inductor.standalone_compile(graph, examples, dynamic_shapes="from_example_inputs")
                compiled(*examples)  # the kernels are compiled in the background and awaited here
        self.seconds += time.perf_counter() - began
        return compiled, returned


def trace(function: Callable[..., Any], spec: Any, examples: list[Tensor]) -> tuple[torch.fx.GraphModule, Any]:
    """``function`` of the flattened arguments as a graph of ATen operators, and the structure of what it returns."""
    from torch.fx.experimental.proxy_tensor import make_fx

    returned = None

    def flat(*tensors: Tensor) -> list[Tensor]:
        nonlocal returned
        leaves, returned = pytree.tree_flatten(function(*pytree.tree_unflatten(list(tensors), spec)))
        return leaves

    graph = make_fx(flat, decomposition_table=DECOMPOSITIONS)(*examples)
    return graph, returned


def _write_apart(graph: torch.fx.GraphModule) -> None:
    """Give what indexed writes go into memory of its own: Inductor would write in place, also where a tensor is expanded and
    all rows are one (pytorch#183986). Forward mode makes such zeros for the derivative of every indexing."""
    for node in list(graph.graph.nodes):
        name = getattr(getattr(node.target, "_schema", None), "name", "")
        if name not in _INDEXED_WRITES or all(node.args[0].meta["val"].stride()):
            continue
        with graph.graph.inserting_before(node):
            own = graph.graph.call_function(
                torch.ops.aten.clone.default, (node.args[0],), {"memory_format": torch.contiguous_format}
            )
        node.args = (own, *node.args[1:])
    graph.recompile()


_INDEXED_WRITES = {
    f"aten::{name}"
    for name in ("index_put", "_unsafe_index_put", "_index_put_impl", "index_add", "index_copy", "index_fill")
}
