"""Predict the memory of a shard from one task with one and with two inner steps, before any large allocation.

Eager: compute the task and count the bytes that are alive as tensors are created and freed, because autograd keeps more
than its graph still needs. Compiled: read the bytes off the traced graph, where each tensor lives until its last use.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import TypeVar

import torch
import torch.utils._pytree as pytree
from torch import Tensor
from torch._ops import OpOverload
from torch.fx import GraphModule, Node
from torch.utils._python_dispatch import TorchDispatchMode

from metadist.core.algorithm import Theta, with_inner_steps
from metadist.core.engine import Engine
from metadist.core.random import TaskKey
from metadist.core.task import Task
from metadist.engine.compiled import trace
from metadist.engine.functions import directly
from metadist.engine.meta_gradient import MetaGradient
from metadist.engine.subject import Subject, initial_theta

T = TypeVar("T")


@dataclass(frozen=True)
class Footprint:
    """The bytes of one task: ``first`` with one inner step, ``further`` for each other step.

    ``state`` counts the bytes of one φ with its moments. ``shared`` counts those of the sum over tasks, which do not
    grow with the number of tasks.
    """

    shared: int
    first: int
    further: int
    inner_steps: int
    state: int

    def peak(self, tasks: int) -> int:
        """Predict the bytes that ``tasks`` tasks add to those of the process when they are computed together."""
        return self.shared + tasks * (self.first + self.further * max(0, self.inner_steps - 1))


def footprint(subject: Subject, engine: Engine) -> Footprint:
    """Measure one task's contribution under ``engine``.

    The result is an upper bound where shards are compiled: a fused operator keeps in registers some of the tensors that
    count here. The workspaces that libraries allocate (for convolutions) do not count.
    """
    steps = subject.algorithm.inner_steps
    peak = _traced_peak if engine.compile else _measured_peak
    one, two = (peak(subject, engine, min(k, steps)) for k in (1, 2))
    received = {*subject.meta_gradient.learned, *subject.meta_gradient.given}
    shared = sum(_bytes(v) for n, v in subject.initial(0).slots.items() if n in received)
    return Footprint(shared, one, max(0, two - one), steps, _state_bytes(subject))


def peak_while(call: Callable[[], object], given: object) -> int:
    """Return the most bytes of tensors alive at a time during ``call``, without those of the tree ``given``."""
    alive = _Alive([t for t in pytree.tree_leaves(given) if isinstance(t, Tensor)])
    with alive:
        call()
    return alive.most


def allocated_bytes(subject: Subject) -> int:
    """Return all bytes that one task's unrolled contribution allocates, more than its peak."""
    return _measured(subject, Engine(), subject.algorithm.inner_steps).total


def float64_within(subject: Subject, budget: int | None) -> tuple[int, int | None]:
    """Return how many inner steps, and how many tasks at once, unrolled float64 gradients may have in ``budget`` bytes.

    All steps, and None for all tasks of a shard, where these fit or ``budget`` is None; else at least two steps of one
    task. The number of tasks is a power of two.
    """
    steps, shard = subject.algorithm.inner_steps, subject.outer.shard_size
    if budget is None:
        return steps, None
    bytes_of = replace(footprint(subject, Engine()), shared=0)  # of the model's dtype: float64 may take twice as many
    if 2 * bytes_of.peak(shard) <= budget:
        return steps, None
    chunk = max(1, budget // max(1, 2 * bytes_of.peak(1)))
    while steps > 2 and 2 * replace(bytes_of, inner_steps=steps).peak(1) > budget:
        steps -= 1
    return steps, 1 << chunk.bit_length() - 1


def _one_task(subject: Subject) -> tuple[Theta, Task, TaskKey, Tensor]:
    keys = TaskKey.of(0, "train", 0, [0])
    return (
        initial_theta(subject, 0),
        subject.sample_largest(keys),
        keys.to(subject.device),
        torch.ones(1, dtype=torch.bool, device=subject.device),
    )


def _with_steps(subject: Subject, engine: Engine, steps: int) -> MetaGradient:
    return replace(subject.meta_gradient_under(engine), algorithm=with_inner_steps(subject.algorithm, steps))


def _state_bytes(subject: Subject) -> int:
    gradient = subject.meta_gradient
    if gradient.cannot_walk_back:
        return 0
    theta, tasks, keys, _ = _one_task(subject)
    task = pytree.tree_map(lambda t: t[0], tasks)
    start = gradient.descent(gradient.context(keys, keys.tasks[0], 0, task), theta, task).start
    return sum(_bytes(t) for t in pytree.tree_leaves(start) if isinstance(t, Tensor))


class _Alive(TorchDispatchMode):
    """Count the bytes of storages from the operator that creates them to the end of their last tensor.

    ``alive`` counts those that exist now, ``most`` is the maximum of ``alive``, ``total`` counts all that ever existed.
    """

    def __init__(self, given: Iterable[Tensor]) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.alive = self.most = self.total = 0
        self._known: dict[int, weakref.ref[torch.UntypedStorage] | None] = {
            t.untyped_storage()._cdata: None for t in given
        }

    def __torch_dispatch__(
        self,
        func: OpOverload[..., T],
        types: Sequence[type],
        args: Sequence[object] = (),
        kwargs: Mapping[str, object] | None = None,
    ) -> T:
        result = func(*args, **(kwargs or {}))
        for t in pytree.tree_leaves(result):
            if isinstance(t, Tensor) and t.device.type != "meta" and not t._is_zerotensor():
                self._count(t.untyped_storage())
        self.most = max(self.most, self.alive)
        return result

    def _count(self, storage: torch.UntypedStorage) -> None:
        name, size = storage._cdata, storage.nbytes()
        if name not in self._known:
            self._known[name] = weakref.ref(storage, partial(self._gone, name, size))
            self.alive += size
            self.total += size

    def _gone(self, name: int, size: int, _: object) -> None:
        self.alive -= size
        del self._known[name]


def _measured(subject: Subject, engine: Engine, steps: int) -> _Alive:
    gradient = _with_steps(subject, engine, steps)
    theta, tasks, keys, keep = _one_task(subject)
    alive = _Alive(pytree.tree_leaves((theta, tasks, keep)))
    with alive:
        gradient.sums(directly, theta, tasks, keys, 0, keep)
    return alive


def _measured_peak(subject: Subject, engine: Engine, steps: int) -> int:
    return _measured(subject, engine, steps).most


def _bytes(tensor: Tensor) -> int:
    return tensor.numel() * tensor.element_size()


# Compiled graphs ------------------------------------------------------------------------------------------------------


def _traced_peak(subject: Subject, engine: Engine, steps: int) -> int:
    gradient = _with_steps(subject, engine, steps)
    theta, tasks, keys, keep = _one_task(subject)
    most = 0
    held: list[tuple[weakref.ref[Tensor], int]] = []
    peaks: dict[tuple[str, pytree.TreeSpec], int] = {}  # all inner steps share the graph of a piece

    def run(name: str, function: Callable[..., T], *arguments: object) -> T:
        """Trace one piece; the results of earlier pieces that later ones need are alive while this one runs."""
        nonlocal most
        leaves, spec = pytree.tree_flatten(arguments)
        tensors = [t if isinstance(t, Tensor) else torch.tensor(t, device=subject.device) for t in leaves]
        given = set(map(id, tensors))
        if (name, spec) not in peaks:
            graph, _ = trace(function, spec, tensors)
            peaks[name, spec] = peak_bytes(graph, skip=_count(arguments[:5]))
        between = sum(size for ref, size in held if (t := ref()) is not None and id(t) not in given)
        most = max(most, between + peaks[name, spec])
        with torch.no_grad():
            result = function(*arguments)
        held.extend((weakref.ref(t), _bytes(t)) for t in pytree.tree_leaves(result))
        return result

    gradient.sums(run, theta, tasks, keys, 0, keep)
    return most


def _count(arguments: object) -> int:
    return len(pytree.tree_leaves(arguments))


def peak_bytes(graph: GraphModule, skip: int = 0) -> int:
    """Return the most bytes that are alive together while ``graph`` runs in order, each tensor until its last use.

    The first ``skip`` inputs belong to the caller and do not count.
    """
    nodes = list(graph.graph.nodes)
    owner: dict[Node, Node] = {}
    for node in nodes:
        source = _viewed(node)
        owner[node] = owner[source] if source is not None else node
    last: dict[Node, int] = {}
    for position, node in enumerate(nodes):
        for used in (node, *node.all_input_nodes):
            last[owner[used]] = position
    ending: dict[int, list[Node]] = {}
    for node, position in last.items():
        ending.setdefault(position, []).append(node)
    inputs = [n for n in nodes if n.op == "placeholder"]
    free = set(inputs[:skip])
    alive = most = 0
    sizes: dict[Node, int] = {}
    for position, node in enumerate(nodes):
        if owner[node] is node and node not in free and node.op in ("placeholder", "call_function"):
            sizes[node] = sum(_bytes(t) for t in pytree.tree_leaves(node.meta.get("val")) if isinstance(t, Tensor))
            alive += sizes[node]
            most = max(most, alive)
        for gone in ending.get(position, ()):
            alive -= sizes.get(gone, 0)
    return most


def _viewed(node: Node) -> Node | None:
    """Return the input whose memory ``node`` shares, if ``node`` is a view or one of several results."""
    if node.op != "call_function" or not node.all_input_nodes:
        return None
    if not isinstance(node.target, OpOverload):  # operator.getitem
        return node.all_input_nodes[0]
    schema = node.target._schema
    aliased = any(r.alias_info is not None for r in schema.returns)
    return node.all_input_nodes[0] if aliased or schema.name in ("aten::_unsafe_view", "aten::_reshape_alias") else None
