"""Compile functions of tensors to graphs, each function once per signature.

``make_fx`` runs the Python code once and records the operators that reach the dispatcher, so ``vmap``, ``grad``,
dataclasses, function modes and a user's own code need only be functions of tensors. Inductor then compiles the whole
graph; its cache on disk lets the other processes of a node load the code that the first process compiled.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Hashable, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import TypeVar

import torch
import torch.utils._pytree as pytree
from torch import Tensor
from torch.fx import GraphModule, Node

from metadist.core.errors import ConfigError
from metadist.engine.block_sums import DECOMPOSITIONS
from metadist.engine.channels_last import channels_last
from metadist.engine.functions import TensorCall

T = TypeVar("T")

#: more shapes of shards than this are not worth compiling
MAX_SIGNATURES = 16


class Compiled:
    """Run functions of tensors as compiled graphs, one for every (name, structure and shapes of the arguments).

    Whole numbers among the arguments become 0-d tensors, so that one graph serves every meta-step and inner step.
    Each compilation runs inside ``around(name)``: a lock of the node, a log message. ``seconds`` is the time that
    compilation took.
    """

    def __init__(
        self,
        device: torch.device,
        around: Callable[[str], AbstractContextManager[object]] = lambda name: nullcontext(),
    ) -> None:
        self.device, self.around = device, around
        self.seconds = 0.0
        self._functions: dict[tuple[Hashable, ...], tuple[_Graph, pytree.TreeSpec]] = {}

    def runner(self, *static: Hashable) -> TensorCall:
        """Return a ``TensorCall`` for functions that depend on ``static`` as well as on their arguments."""

        def run(name: str, function: Callable[..., T], *arguments: object) -> T:
            leaves, spec = pytree.tree_flatten(arguments)
            tensors = [t if isinstance(t, Tensor) else torch.tensor(t, device=self.device) for t in leaves]
            key = (name, *static, spec, *((t.shape, t.dtype) for t in tensors))
            if key not in self._functions:
                self._functions[key] = self._compile(name, function, spec, tensors)
            compiled, returned = self._functions[key]
            results = compiled(*(t.contiguous() for t in tensors))
            if self.device.type == "cuda":  # a replay of a CUDA graph overwrites the results of the last replay
                results = [t.clone() for t in results]
            result: T = pytree.tree_unflatten(list(results), returned)
            return result

        return run

    def _compile(
        self, name: str, function: Callable[..., object], spec: pytree.TreeSpec, tensors: list[Tensor]
    ) -> tuple[_Graph, pytree.TreeSpec]:
        if sum(key[0] == name for key in self._functions) >= MAX_SIGNATURES:
            raise ConfigError(
                f"engine.compile: this run has more than {MAX_SIGNATURES} different shapes of shards (tasks of unequal "
                "size?), and each would be compiled; use engine.compile=never"
            )
        examples = [t.contiguous() for t in tensors]
        began = time.perf_counter()
        import torch._inductor.config  # takes a second

        with self.around(name):
            graph, returned = trace(function, spec, examples)
            if self.device.type == "cpu":
                channels_last(graph)
            _write_apart(graph)
            # The loop over kernels runs outside Python, as a CUDA graph or in C++: a fifth of a small shard's time.
            settings = {"triton.cudagraphs": True} if self.device.type == "cuda" else {"cpp_wrapper": True}
            with torch.no_grad(), torch._inductor.config.patch(settings):
                compiled = torch._inductor.standalone_compile(graph, [*examples], dynamic_shapes="from_example_inputs")
                compiled(*examples)  # Inductor compiles the kernels in the background; this call waits for them
        self.seconds += time.perf_counter() - began
        return compiled, returned


_Graph = Callable[..., Sequence[Tensor]]


def trace(
    function: Callable[..., object], spec: pytree.TreeSpec, examples: list[Tensor]
) -> tuple[GraphModule, pytree.TreeSpec]:
    """Trace ``function`` to a graph of ATen operators on flat arguments; return the graph and its results' structure.

    ``examples`` are the leaves of the arguments, ``spec`` is their structure.
    """
    from torch.fx.experimental.proxy_tensor import make_fx

    returned: pytree.TreeSpec | None = None

    def flat(*tensors: Tensor) -> list[Tensor]:
        nonlocal returned
        leaves, returned = pytree.tree_flatten(function(*pytree.tree_unflatten(list(tensors), spec)))
        return leaves

    graph = make_fx(flat, decomposition_table=DECOMPOSITIONS)(*examples)
    assert isinstance(graph, GraphModule) and returned is not None
    return graph, returned


_INDEXED_WRITES = {
    f"aten::{name}"
    for name in ("index_put", "_unsafe_index_put", "_index_put_impl", "index_add", "index_copy", "index_fill")
}


def _write_apart(module: GraphModule) -> None:
    """Clone the destination of every indexed write whose rows share memory.

    Inductor writes in place, also into an expanded tensor, whose rows are all the same memory (pytorch#183986). Forward
    mode makes such zeros for the derivative of every indexing.
    """
    for node in list(module.graph.nodes):
        if not isinstance(node.target, torch._ops.OpOverload) or node.target._schema.name not in _INDEXED_WRITES:
            continue
        written = node.args[0]
        assert isinstance(written, Node)
        if all(written.meta["val"].stride()):
            continue
        with module.graph.inserting_before(node):
            own = module.graph.call_function(
                torch.ops.aten.clone.default, (written,), {"memory_format": torch.contiguous_format}
            )
        node.args = (own, *node.args[1:])
    module.recompile()
