"""Rewrite traced graphs so that images keep their channels last between convolutions.

Convolutions take and return images in channels-last memory. The operations between them (normalisation, ReLU, pooling
and all their derivatives) are written for [N, C, H, W], and Inductor chooses the layout of every intermediate result
itself: loops over operands of two layouts are strided or not vectorised, which took half of a conv4 shard's time. After
this rewrite these operations work on [N, H, W, C], where Inductor has nothing to choose.
"""

from __future__ import annotations

import operator
from collections.abc import Sequence
from typing import Any

import torch
from torch.fx import Graph, GraphModule, Node
from torch.fx.node import Argument, map_arg

#: PyTorch creates operators at run time and gives them no types.
aten: Any = torch.ops.aten

_VIEWS = {aten.view.default, aten._unsafe_view.default, aten._reshape_alias.default, aten.reshape.default}
_UNIT = {aten.unsqueeze.default, aten.select.int, aten.squeeze.dim, aten.squeeze.dims}
#: operators whose results have the shapes of images and are read channels last
_IMAGES = {
    aten.convolution.default,
    aten.convolution_backward.default,
    aten.max_pool2d_with_indices.default,
    aten.max_pool2d_with_indices_backward.default,
    aten.avg_pool2d.default,
    aten.avg_pool2d_backward.default,
}


def channels_last(module: GraphModule) -> None:
    """Rewrite pointwise operations on images, and sums over them, for [..., H, W, C] in place of [..., C, H, W]."""
    if _Rewriting(module.graph).run():
        module.graph.eliminate_dead_code()
        module.recompile()


def _to_last(rank: int) -> list[int]:
    """Return the permutation [..., C, H, W] → [..., H, W, C]."""
    return [*range(rank - 3), rank - 2, rank - 1, rank - 3]


def _to_first(rank: int) -> list[int]:
    """Return the permutation [..., H, W, C] → [..., C, H, W]."""
    return [*range(rank - 3), rank - 1, rank - 3, rank - 2]


def _node(node: Node, position: int) -> Node:
    argument = node.args[position]
    assert isinstance(argument, Node)
    return argument


def _integer(node: Node, position: int) -> int:
    argument = node.args[position]
    assert isinstance(argument, int)
    return argument


def _integers(node: Node, position: int) -> list[int]:
    argument = node.args[position]
    assert isinstance(argument, Sequence)
    return [int(d) for d in argument]  # type: ignore[arg-type]


class _Rewriting:
    """Rewrite one graph. ``last`` maps a node to the node that has the same values channels last."""

    def __init__(self, graph: Graph) -> None:
        self.graph = graph
        self.last: dict[Node, Node] = {}
        self.shapes: dict[Node, torch.Size | None] = {
            n: n.meta["val"].shape if isinstance(n.meta.get("val"), torch.Tensor) else None for n in graph.nodes
        }

    def run(self) -> bool:
        """Rewrite the graph; return whether it has images."""
        for node in list(self.graph.nodes):
            shape = self.shapes[node]
            if node.op == "call_function" and shape is not None:
                with self.graph.inserting_before(node.next):
                    self._rewrite(node, len(shape))
        if not self.last:
            return False
        for node in self.graph.nodes:
            if node.target in _VIEWS and node in self.shapes:  # the viewed memory may have another layout now
                node.target, node.args = aten.reshape.default, (node.args[0], list(self.shapes[node] or ()))
        return True

    def _rewrite(self, node: Node, rank: int) -> None:
        target = node.target
        if target is aten.permute.default and rank >= 4 and [d % rank for d in _integers(node, 1)] == _to_first(rank):
            self.last[node] = _node(node, 0)
        elif self._is_image(node, rank):
            self.last[node] = self.graph.call_function(aten.permute.default, (node, _to_last(rank)))
        elif target in _VIEWS or target in _UNIT:
            self._view(node, rank)
        elif target is aten.sum.dim_IntList:
            self._sum(node, rank)
        elif rank >= 4 and any(a in self.last and len(self.shapes[a] or ()) == rank for a in node.all_input_nodes):
            self._pointwise(node, rank)

    def _pointwise(self, node: Node, rank: int) -> None:
        target = node.target
        if target is aten.clone.default:  # a clone changes the layout alone, to the one that is here already
            self._call(node, rank, (self.last[_node(node, 0)],), {"memory_format": torch.contiguous_format})
        elif target is aten.expand.default:
            sizes = self.shapes[node]
            assert sizes is not None
            self._call(node, rank, (self._moved(_node(node, 0), rank), [sizes[d] for d in _to_last(rank)]), {})
        elif isinstance(target, torch._ops.OpOverload) and torch.Tag.pointwise in target.tags:
            arguments = map_arg(node.args, lambda a: self._moved(a, rank))
            self._call(node, rank, arguments, {k: v for k, v in node.kwargs.items() if k != "memory_format"})

    def _is_image(self, node: Node, rank: int) -> bool:
        """Return whether ``node`` is an operator of ``_IMAGES``, or the first result of one that has more than one."""
        if rank != 4:
            return False
        source = _node(node, 0) if node.target is operator.getitem and node.args[1] == 0 else node
        return source.target in _IMAGES and (
            source.target is aten.convolution.default or any(a in self.last for a in source.all_input_nodes)
        )

    def _view(self, node: Node, rank: int) -> None:
        """Rewrite a view that leaves the last three dimensions unchanged."""
        source = _node(node, 0)
        old, new = self.shapes.get(source), self.shapes[node]
        if source not in self.last or old is None or new is None or rank < 4 or old[-3:] != new[-3:]:
            return
        is_select = node.target is aten.select.int
        if is_select:
            if _integer(node, 1) % len(old) < len(old) - 3:
                self.last[node] = self.graph.call_function(aten.select.int, (self.last[source], *node.args[1:]))
        else:
            shape = [*new[:-3], new[-2], new[-1], new[-3]]
            self.last[node] = self.graph.call_function(aten.reshape.default, (self.last[source], shape))

    def _sum(self, node: Node, rank: int) -> None:
        source = _node(node, 0)
        if source not in self.last or len(node.args) < 3 or not node.args[2] or not node.args[1]:
            return
        order = _to_last(rank)
        dims = [order.index(d % rank) for d in _integers(node, 1)]
        self._call(node, rank, (self.last[source], dims, True), dict(node.kwargs))

    def _moved(self, node: Node, rank: int) -> Node:
        """Return ``node`` channels last, with ``rank`` dimensions."""
        shape = self.shapes.get(node)
        if node in self.last and len(shape or ()) == rank:
            return self.last[node]
        if not shape:
            return node
        if len(shape) < rank:
            node = self.graph.call_function(aten.reshape.default, (node, [1] * (rank - len(shape)) + list(shape)))
        return self.graph.call_function(aten.permute.default, (node, _to_last(rank)))

    def _call(self, node: Node, rank: int, arguments: tuple[Argument, ...], keywords: dict[str, Argument]) -> None:
        """Replace ``node`` by the same operator on channels-last arguments, permuted back for all other users."""
        target = node.target
        assert not isinstance(target, str)
        last = self.graph.call_function(target, arguments, keywords)
        first = self.graph.call_function(aten.permute.default, (last, _to_first(rank)))
        self.shapes[first] = self.shapes[node]
        self.last[first] = last
        node.replace_all_uses_with(first)
        self.graph.erase_node(node)
