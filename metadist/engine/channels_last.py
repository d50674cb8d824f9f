"""Memory layout of traced graphs: images with their channels last, all the way.

Convolutions take and give images channels last. Whatever lies between them (normalisation, ReLU, pooling, all their
derivatives) is written for [N, C, H, W], and Inductor gives every intermediate result a layout of its own choosing: loops
over operands of two layouts are strided or not vectorised at all, which took half of a conv4 shard's time. Here these
operations are rewritten for [N, H, W, C], where there is nothing to choose.
"""

from __future__ import annotations

import operator
from typing import Any

import torch
from torch.fx import Graph, GraphModule, Node

aten: Any = torch.ops.aten

_VIEWS = {aten.view.default, aten._unsafe_view.default, aten._reshape_alias.default, aten.reshape.default}
_UNIT = {aten.unsqueeze.default, aten.select.int, aten.squeeze.dim, aten.squeeze.dims}
#: their results have images' shapes, and are read channels last
_IMAGES = {
    aten.convolution.default,
    aten.convolution_backward.default,
    aten.max_pool2d_with_indices.default,
    aten.max_pool2d_with_indices_backward.default,
    aten.avg_pool2d.default,
    aten.avg_pool2d_backward.default,
}


def channels_last(module: GraphModule) -> None:
    """Rewrite what is done to images, one element at a time or summed, for [..., H, W, C] in place of [..., C, H, W]."""
    if _Rewriting(module.graph).run():
        module.graph.eliminate_dead_code()
        module.recompile()


def _there(rank: int) -> list[int]:
    return [*range(rank - 3), rank - 2, rank - 1, rank - 3]


def _back(rank: int) -> list[int]:
    return [*range(rank - 3), rank - 1, rank - 3, rank - 2]


class _Rewriting:
    """``held``: by node, the node that is the same channels last."""

    def __init__(self, graph: Graph) -> None:
        self.graph = graph
        self.held: dict[Node, Node] = {}
        self.shapes: dict[Node, torch.Size | None] = {
            n: n.meta["val"].shape if isinstance(n.meta.get("val"), torch.Tensor) else None for n in graph.nodes
        }

    def run(self) -> bool:
        """Whether there were images at all."""
        for node in list(self.graph.nodes):
            shape = self.shapes[node]
            if node.op == "call_function" and shape is not None:
                with self.graph.inserting_before(node.next):
                    self._hold(node, len(shape))
        if not self.held:
            return False
        for node in self.graph.nodes:
            if node.target in _VIEWS and node in self.shapes:  # of memory that may lie otherwise now
                node.target, node.args = aten.reshape.default, (node.args[0], list(self.shapes[node] or ()))
        return True

    def _hold(self, node: Any, rank: int) -> None:
        target = node.target
        if target is aten.permute.default and rank >= 4 and [d % rank for d in node.args[1]] == _back(rank):
            self.held[node] = node.args[0]
        elif self._is_image(node, rank):
            self.held[node] = self.graph.call_function(aten.permute.default, (node, _there(rank)))
        elif target in _VIEWS or target in _UNIT:
            self._view(node, rank)
        elif target is aten.sum.dim_IntList:
            self._sum(node, rank)
        elif rank >= 4 and any(a in self.held and len(self.shapes[a] or ()) == rank for a in node.all_input_nodes):
            if target is aten.clone.default:  # for the sake of a layout, which is this one
                self._call(node, rank, (self.held[node.args[0]],), {"memory_format": torch.contiguous_format})
            elif target is aten.expand.default:
                sizes = self.shapes[node]
                assert sizes is not None
                self._call(node, rank, (self._moved(node.args[0], rank), [sizes[d] for d in _there(rank)]), {})
            elif isinstance(target, torch._ops.OpOverload) and torch.Tag.pointwise in target.tags:
                arguments = torch.fx.node.map_arg(node.args, lambda a: self._moved(a, rank))
                self._call(node, rank, arguments, {k: v for k, v in node.kwargs.items() if k != "memory_format"})

    def _is_image(self, node: Any, rank: int) -> bool:
        """Of a convolution that gives more than one result, the first."""
        if rank != 4:
            return False
        source = node.args[0] if node.target is operator.getitem and node.args[1] == 0 else node
        target = getattr(source, "target", None)
        return target in _IMAGES and (
            target is aten.convolution.default or any(a in self.held for a in source.all_input_nodes)
        )

    def _view(self, node: Any, rank: int) -> None:
        """One that leaves the images themselves as they are."""
        source = node.args[0]
        old, new = self.shapes.get(source), self.shapes[node]
        if source not in self.held or old is None or new is None or rank < 4 or old[-3:] != new[-3:]:
            return
        if node.target is aten.select.int:
            if node.args[1] % len(old) < len(old) - 3:
                self.held[node] = self.graph.call_function(aten.select.int, (self.held[source], *node.args[1:]))
        else:
            shape = [*new[:-3], new[-2], new[-1], new[-3]]
            self.held[node] = self.graph.call_function(aten.reshape.default, (self.held[source], shape))

    def _sum(self, node: Any, rank: int) -> None:
        source = node.args[0]
        if source not in self.held or len(node.args) < 3 or not node.args[2] or not node.args[1]:
            return
        order = _there(rank)
        dims = [order.index(d % rank) for d in node.args[1]]
        self._call(node, rank, (self.held[source], dims, True), dict(node.kwargs))

    def _moved(self, node: Any, rank: int) -> Any:
        """``node`` channels last, with as many dimensions as it is combined with."""
        shape = self.shapes.get(node)
        if node in self.held and len(shape or ()) == rank:
            return self.held[node]
        if not shape:
            return node
        if len(shape) < rank:
            node = self.graph.call_function(aten.reshape.default, (node, [1] * (rank - len(shape)) + list(shape)))
        return self.graph.call_function(aten.permute.default, (node, _there(rank)))

    def _call(self, node: Any, rank: int, arguments: Any, keywords: dict[str, Any]) -> None:
        self._replace(node, self.graph.call_function(node.target, arguments, keywords), rank)

    def _replace(self, node: Node, last: Node, rank: int) -> None:
        first = self.graph.call_function(aten.permute.default, (last, _back(rank)))
        self.shapes[first] = self.shapes[node]
        self.held[first] = last
        node.replace_all_uses_with(first)
        self.graph.erase_node(node)
