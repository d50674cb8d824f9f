"""How much memory a shard takes: read off the traced graphs of one task, before anything large is allocated."""

from __future__ import annotations

import weakref
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.utils._pytree as pytree
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from metadist.core.compiled import trace
from metadist.core.engine import Engine
from metadist.core.learner import Learner, with_inner_steps
from metadist.core.metagradient import directly
from metadist.core.random import TaskKey


@dataclass(frozen=True)
class Footprint:
    """Bytes of one task: ``first`` at one inner step, ``further`` for every other, ``state`` of one φ with its moments;
    ``shared`` is θ, whatever the number of tasks."""

    shared: int
    first: int
    further: int
    inner_steps: int
    state: int

    def peak(self, tasks: int) -> int:
        """Predicted for ``tasks`` at once, beside what the process held before."""
        return self.shared + tasks * (self.first + self.further * max(0, self.inner_steps - 1))


def footprint(learner: Learner, engine: Engine) -> Footprint:
    """Of one task's contribution under ``engine``, from graphs of one and of two inner steps. An upper bound where shards
    are compiled: a fused operator keeps in registers what is counted here."""
    steps = getattr(learner.algorithm, "inner_steps", 0)
    one, two = (_peak(learner, engine, min(k, steps)) for k in (1, 2))
    theta = learner.initial(0).theta(learner.slots)
    state = sum(_bytes(t) for n in learner.meta_gradient.learned for t in theta[n].values())
    shared = 2 * sum(_bytes(t) for p in theta.values() for t in p.values())
    return Footprint(shared, one, max(0, two - one), steps, state)


class _Allocated(TorchDispatchMode):
    """Adds up the bytes of every tensor that an operator makes."""

    def __init__(self) -> None:
        super().__init__()
        self.bytes = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if not func.is_view:
            self.bytes += sum(_bytes(t) for t in pytree.tree_leaves(result) if isinstance(t, Tensor))
        return result


def allocated_bytes(learner: Learner) -> int:
    """All that one task's unrolled contribution ever allocates: more than its peak, and quick to know."""
    gradient = replace(learner.meta_gradient, engine=Engine())
    theta, tasks, keys, keep = _one_task(learner)
    with _Allocated() as allocated:
        gradient.sums(directly, theta, tasks, keys, 0, keep)
    return allocated.bytes


def _one_task(learner: Learner) -> tuple[Any, Any, TaskKey, Tensor]:
    keys = TaskKey.of(0, "train", 0, [0])
    theta = {n: p.map(lambda t: t.to(learner.device)) for n, p in learner.initial(0).theta(learner.slots).items()}
    return theta, learner.sample(keys), keys.to(learner.device), torch.ones(1, dtype=torch.bool, device=learner.device)


def _peak(learner: Learner, engine: Engine, steps: int) -> int:
    algorithm: Any = with_inner_steps(learner.algorithm, steps)
    gradient = replace(learner.meta_gradient, algorithm=algorithm, engine=engine)
    theta, tasks, keys, keep = _one_task(learner)
    most = 0
    held: list[tuple[weakref.ref[Tensor], int]] = []

    def run(name: str, function: Callable[..., Any], *arguments: Any) -> Any:
        """Called piece by piece: what lies between the pieces is alive while one of them runs."""
        nonlocal most
        leaves, spec = pytree.tree_flatten(arguments)
        tensors = [t if isinstance(t, Tensor) else torch.tensor(t, device=learner.device) for t in leaves]
        given = set(map(id, tensors))
        graph, returned = trace(function, spec, tensors)
        between = sum(size for ref, size in held if (t := ref()) is not None and id(t) not in given)
        most = max(most, between + peak_bytes(graph, skip=_count(arguments[:5])))
        with torch.no_grad():
            result = function(*arguments)
        held.extend((weakref.ref(t), _bytes(t)) for t in pytree.tree_leaves(result))
        return result

    gradient.sums(run, theta, tasks, keys, 0, keep)
    return most


def _count(arguments: Any) -> int:
    return len(pytree.tree_leaves(arguments))


def _bytes(tensor: Any) -> int:
    return tensor.numel() * tensor.element_size()


def peak_bytes(graph: torch.fx.GraphModule, skip: int = 0) -> int:
    """The most bytes that are alive at once while ``graph`` runs in order, each tensor until its last use; its first
    ``skip`` inputs are the caller's and not counted."""
    nodes = list(graph.graph.nodes)
    owner: dict[Any, Any] = {}
    for node in nodes:
        source = _viewed(node)
        owner[node] = owner[source] if source is not None else node
    last: dict[Any, int] = {}
    for position, node in enumerate(nodes):
        for used in (node, *node.all_input_nodes):
            last[owner[used]] = position
    ending: dict[int, list[Any]] = {}
    for node, position in last.items():
        ending.setdefault(position, []).append(node)
    inputs = [n for n in nodes if n.op == "placeholder"]
    free = set(inputs[:skip])
    alive = most = 0
    sizes: dict[Any, int] = {}
    for position, node in enumerate(nodes):
        if owner[node] is node and node not in free and node.op in ("placeholder", "call_function"):
            sizes[node] = sum(_bytes(t) for t in pytree.tree_leaves(node.meta.get("val")) if isinstance(t, Tensor))
            alive += sizes[node]
            most = max(most, alive)
        for gone in ending.get(position, ()):
            alive -= sizes.get(gone, 0)
    return most


def _viewed(node: Any) -> Any:
    """The input whose memory ``node`` shows, if it is a view or picks one of several results."""
    if node.op != "call_function" or not node.all_input_nodes:
        return None
    schema = getattr(node.target, "_schema", None)
    if schema is None:  # getitem
        return node.all_input_nodes[0]
    aliased = any(r.alias_info is not None for r in schema.returns)
    return node.all_input_nodes[0] if aliased or schema.name in ("aten::_unsafe_view", "aten::_reshape_alias") else None


