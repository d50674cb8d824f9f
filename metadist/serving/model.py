"""A trained learner for the service: it checks inputs, and computes several adaptations or predictions together."""

from __future__ import annotations

import copy
import logging
import math
import threading
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple, Union

import safetensors.torch
import torch
import torch.utils._pytree as pytree
from torch import Tensor

from metadist.core.model import called
from metadist.core.signature import DivergedAdaptation, InvalidInput, Kinds, Signature, TensorKind
from metadist.core.state import State
from metadist.core.task import Examples
from metadist.core.tree import Tree, at, mapped, named, of_names, stacked
from metadist.learners.few_shot import FewShotLearner

log = logging.getLogger(__name__)


class ServedAdaptation(NamedTuple):
    """φ for one support set, with everything that ``ServedModel.predict`` needs."""

    phi: Any
    #: the support inputs [N, …] if predictions need them
    support: Tree | None
    #: the memory of both
    bytes: int
    #: a hash of the structure of φ; ``predict`` stacks parameters with equal hashes
    structure: int
    #: inner steps, shapes of x and y, classes: the arguments of an adaptation that gives the same structure
    made_by: tuple[Any, ...]


Shapes = Mapping[str, tuple[int, ...]]
"""The shapes of the tensors of a tree by name."""
How = tuple[Union[int, None], Union[int, None]]
"""Inner steps, and classes of the support set; None: as in training."""


@dataclass(frozen=True)
class Limits:
    """The limits of one request: rows of x, queries, inner steps.

    ``batch_elements`` bounds the number of input elements that are computed together.
    """

    support: int = 1000
    queries: int = 1000
    inner_steps: int = 100
    batch_elements: int = 16 << 20


@dataclass
class ServedModel:
    """A learner with its trained state.

    ``adapt`` and ``predict`` take lists of tensors of one shape. Their results equal those of the learner's methods for
    each element, up to rounding; a list of one element gives the same bits. One thread at a time computes.
    """

    name: str
    learner: FewShotLearner
    state: State
    source: str = ""
    limits: Limits = field(default_factory=Limits)
    #: (size, channels, invert, white): the conversion of images to inputs; None where inputs are not images
    images: tuple[int, int, bool, float | None] | None = None
    #: the conversion of a table's rows to inputs and targets (JSON); None where inputs are no rows of a table
    table: str | None = None
    #: what requests are checked against; None where the run does not record it
    recorded: Signature | None = None
    #: the kind of the state's weights: trained or averaged
    weights: str = "trained"

    def __post_init__(self) -> None:
        self.algorithm = type(self.learner.algorithm).__name__
        self.signature = self.recorded or self.learner.describe_earlier(0)
        self.classification = self.signature.classes is not None
        self.dtype = self.learner.model.dtype
        self.params_sha256 = self.state.sha256()
        self.state = State({n: t.to(self.learner.device) for n, t in self.state.slots.items()})
        self._theta_memory = {t.untyped_storage().data_ptr() for t in self.state.slots.values()}
        module = self.learner.model.module
        tried = self.signature.whole_inputs and self.learner.device.type != "cpu" and self.learner.model.has_forward
        self._on_cpu = copy.deepcopy(module).to("cpu") if tried else None
        self._stackable, self._lock = True, threading.Lock()
        self._needs_support = self.learner.normalization == "inductive"

    def describe(self) -> dict[str, Any]:
        """Return the fields of the message ``Model``: name, algorithm, shapes, limits, hash and kind of weights."""
        signature = self.signature
        x, y = _single(signature.x), _single(signature.y)
        values = sum(math.prod(n or 1 for n in kind.shape or ()) for kind in signature.y.values())
        return {
            "name": self.name,
            "algorithm": self.algorithm,
            "kind": self.learner.tasks.kind,
            "input_shape": _sizes(x),
            "target_shape": _sizes(y),
            "outputs": values if signature.classes is None else signature.classes,
            "dtype": str(self.dtype).removeprefix("torch."),
            "params_sha256": self.params_sha256,
            "source": self.source,
            "max_support": self.limits.support,
            "max_inner_steps": self.limits.inner_steps,
            "max_queries": self.limits.queries,
            "normalization": self.learner.normalization if self.learner.model.normalises_over_batch else "none",
            "input_dtype": str(x.dtype).removeprefix("torch."),
            "target_dtype": str(y.dtype).removeprefix("torch."),
            "inputs": _described(signature.x),
            "targets": _described(signature.y),
            "predictions": _described(signature.prediction),
            "any_classes": signature.any_classes,
            "weights": self.weights,
            **({} if self.images is None else {"images": self._conversion(*self.images)}),
            **({} if self.table is None else {"table": self.table}),
        }

    @staticmethod
    def _conversion(size: int, channels: int, invert: bool, white: float | None) -> dict[str, Any]:
        about = {"size": size, "channels": channels, "invert": invert}
        return about if white is None else {**about, "white": white}

    # Checks of a request ----------------------------------------------------------------------------------------------

    def check_shape(self, name: str, shape: Sequence[int], max_rows: int, part: str = "") -> None:
        """Check the shape of the tensor ``part`` of x [N, …] before its data is copied. Raises ``InvalidInput``."""
        if len(shape) < 1 or not 1 <= shape[0] <= max_rows:
            raise InvalidInput(
                f"{name} has {shape[0] if shape else 'no'} rows; expected 1 to {max_rows}, shape "
                f"{self.signature.shown_input_shape(part)}"
            )
        self.signature.check_input_shape(name, shape, part)

    def inputs(self, name: str, x: Tree) -> Tree:
        """Return x on the model's device, in its dtypes. Raises ``InvalidInput``."""
        return self._moved(self._known(self.signature.inputs(name, x)))

    def support(self, x: Tree, y: Tree) -> Examples:
        """Return a support set on the model's device. Raises ``InvalidInput``."""
        support = self.signature.support(x, y)
        return Examples(self._moved(self._known(support.x)), self._moved(support.y))

    def _moved(self, tree: Tree) -> Tree:
        return mapped(lambda t: t.to(self.learner.device), tree)

    def _known(self, x: Tree) -> Tree:
        """Refuse whole numbers that the model does not know, where a GPU would stop the process at one of them."""
        if self._on_cpu is not None:
            with torch.no_grad(), self.signature.judged_by_model():
                called(self._on_cpu, mapped(Tensor.cpu, x))
        return x

    def check_steps(self, inner_steps: int | None) -> int | None:
        """Return ``inner_steps`` (None: as in training). Raises ``InvalidInput`` outside of the limit."""
        if inner_steps is not None and not 0 <= inner_steps <= self.limits.inner_steps:
            raise InvalidInput(f"inner_steps = {inner_steps}: expected 0 to {self.limits.inner_steps}")
        return inner_steps

    # Several requests together ----------------------------------------------------------------------------------------

    def together(self, elements: int) -> int:
        """Return how many requests with ``elements`` input elements each are computed together at most."""
        return max(1, self.limits.batch_elements // max(1, elements))

    def adapt(self, supports: Sequence[Examples], inner_steps: int | None) -> list[ServedAdaptation | Exception]:
        """Adapt to each support set; a support set that fails has its exception in the list.

        All have one shape and, where the algorithm takes any number of classes, one number of classes.
        """
        parts = _parts(supports, self.together(_elements(supports[0].x)))
        how = (inner_steps, self.signature.ways(supports[0].y))
        with self._lock:
            return [adapted for some in parts for adapted in self._adapt(some, how)]

    def adapt_predict(self, x: Tree, y: Tree, query: Tree, inner_steps: int | None = None) -> Tree:
        """Adapt to one support set and predict, with the checks and limits of a request.

        Raises ``InvalidInput``, or ``DivergedAdaptation``.
        """
        for name, tree, most in (("x", x, self.limits.support), ("query", query, self.limits.queries)):
            for part, tensor in self.signature.parts(name, tree).items():
                self.check_shape(name, tuple(tensor.shape), most, part)
        support, queries = self.support(x, y), self.inputs("query", query)
        (adapted,) = self.adapt([support], self.check_steps(inner_steps))
        if isinstance(adapted, Exception):
            raise adapted
        return self.predict([adapted], [queries])[0]

    def _adapt(self, supports: Sequence[Examples], how: How) -> list[ServedAdaptation | Exception]:
        if len(supports) > 1 and self._stackable:
            together = Examples(stacked([s.x for s in supports]), stacked([s.y for s in supports]))
            try:
                many = torch.func.vmap(lambda s: self.learner.adapt(self.state, s, *how))(together)
                return self._split(many, supports, how)
            except Exception as error:  # of one support set; or φ may hold other objects than tensors
                alone = [self._alone(support, how) for support in supports]
                if not any(isinstance(adapted, Exception) for adapted in alone):
                    log.warning(
                        "model '%s': adaptations cannot be computed together (%s); they are computed one by one",
                        self.name,
                        error,
                    )
                    self._stackable = False
                return alone
        return [self._alone(support, how) for support in supports]

    def _alone(self, support: Examples, how: How) -> ServedAdaptation | Exception:
        try:
            phi = self._compute(lambda: self.learner.adapt(self.state, support, *how))
            return self._split(
                pytree.tree_map(lambda t: t.unsqueeze(0) if isinstance(t, Tensor) else t, phi), [support], how
            )[0]
        except Exception as error:
            return error

    def _split(self, many: Any, supports: Sequence[Examples], how: How) -> list[ServedAdaptation | Exception]:
        """Split a stacked φ into one for each support set, in memory of its own; tensors of θ stay shared."""
        leaves, spec = pytree.tree_flatten(many)
        adapted = [self._is_adapted(t) for t in leaves]
        finite = torch.ones(len(supports), dtype=torch.bool, device=self.learner.device)
        for t in (t for t, own in zip(leaves, adapted) if own and t.is_floating_point()):
            finite &= torch.isfinite(t).reshape(len(supports), -1).all(1)
        rows = [t.unbind() if isinstance(t, Tensor) else [t] * len(supports) for t in leaves]
        structure = hash((str(spec), *(tuple(t.shape[1:]) if isinstance(t, Tensor) else t for t in leaves)))
        size = sum(row[0].numel() * row[0].element_size() for row, own in zip(rows, adapted) if own)
        split: list[ServedAdaptation | Exception] = []
        for i, (support, good) in enumerate(zip(supports, finite.tolist())):
            if not good:
                split.append(DivergedAdaptation())
                continue
            phi = pytree.tree_unflatten(
                [row[i].detach().clone() if own else row[i] for row, own in zip(rows, adapted)], spec
            )
            inputs = support.x if self._needs_support else None
            total = size + sum(t.nbytes for t in pytree.tree_leaves(inputs) if isinstance(t, Tensor))
            made_by = (how, *({n: tuple(t.shape) for n, t in named(part).items()} for part in (support.x, support.y)))
            split.append(ServedAdaptation(phi, inputs, total, structure, made_by))
        return split

    # Transfer to another replica --------------------------------------------------------------------------------------

    def pack(self, adapted: ServedAdaptation) -> tuple[Any, ...]:
        """Return the tensors that are not θ's as safetensors, and the arguments that restore the rest."""
        leaves = [t for t in pytree.tree_leaves(adapted.phi) if self._is_adapted(t)]
        tensors = {f"phi/{i}": t.cpu().contiguous() for i, t in enumerate(leaves)}
        if adapted.support is not None:
            tensors |= {f"support/{n}": t.cpu().contiguous() for n, t in named(adapted.support).items()}
        return safetensors.torch.save(tensors), adapted.made_by

    def unpack(self, packed: tuple[Any, ...]) -> ServedAdaptation:
        """Return the adapted parameters that another replica's ``pack`` packed."""
        data, (how, x, y) = packed
        tensors = {n: t.clone().to(self.learner.device) for n, t in safetensors.torch.load(data).items()}
        with self._lock:
            zeros = self._zeros(x, y)
            empty = self.learner.adapt(self.state, zeros, *how)
        leaves, spec = pytree.tree_flatten(empty)
        own = iter(range(len(leaves)))
        phi = pytree.tree_unflatten([tensors[f"phi/{next(own)}"] if self._is_adapted(t) else t for t in leaves], spec)
        total = sum(t.numel() * t.element_size() for t in tensors.values())
        structure = hash((str(spec), *(tuple(t.shape) if isinstance(t, Tensor) else t for t in leaves)))
        support = {n.removeprefix("support/"): t for n, t in tensors.items() if n.startswith("support/")}
        return ServedAdaptation(phi, of_names(support) if support else None, total, structure, (how, x, y))

    def _is_adapted(self, leaf: Any) -> bool:
        """Return whether a leaf of φ is a tensor that does not share θ's memory."""
        return isinstance(leaf, Tensor) and leaf.untyped_storage().data_ptr() not in self._theta_memory

    def predict(self, adapted: Sequence[ServedAdaptation], queries: Sequence[Tree]) -> list[Tree]:
        """Return predictions for queries [N, …], each with its adapted parameters of one structure.

        Of several, one that fails has its exception in the list.
        """
        parts = _parts(list(zip(adapted, queries)), self.together(_elements(queries[0])))
        with self._lock:
            if len(adapted) == 1:
                found = [self._predict_alone(*parts[0][0])]
            else:
                found = [prediction for some in parts for prediction in self._predict(some)]
        ways = [how[1] for how, *_ in (a.made_by for a in adapted)]
        return [p if isinstance(p, Exception) else self.signature.logits(p, n) for p, n in zip(found, ways)]

    def _predict(self, pairs: Sequence[tuple[ServedAdaptation, Tree]]) -> list[Tree]:
        if len(pairs) > 1:
            try:
                return self._predict_together(pairs)
            except Exception as error:  # of one query set: the others have an answer
                log.debug("model '%s': predictions are computed one by one (%s)", self.name, error)
        found = list[Tree]()
        for adapted, x in pairs:
            try:
                found.append(self._predict_alone(adapted, x))
            except Exception as error:
                found.append(error)
        return found

    def _predict_alone(self, adapted: ServedAdaptation, x: Tree) -> Tree:
        support = x if adapted.support is None else adapted.support
        return self._compute(lambda: self.learner.predict(self.state, adapted.phi, x, Examples(support, support)))

    def _predict_together(self, pairs: Sequence[tuple[ServedAdaptation, Tree]]) -> list[Tree]:
        x = stacked([x for _, x in pairs])
        support = stacked([x if a.support is None else a.support for a, x in pairs])
        leaves, specs = zip(*(pytree.tree_flatten(a.phi) for a, _ in pairs))
        shared = [isinstance(t, Tensor) and t.untyped_storage().data_ptr() in self._theta_memory for t in leaves[0]]
        columns = [
            column[0] if s or not isinstance(column[0], Tensor) else torch.stack(column)
            for s, column in zip(shared, zip(*leaves))
        ]
        dims = [None if s or not isinstance(t, Tensor) else 0 for s, t in zip(shared, leaves[0])]

        def single(columns: list[Any], x: Tree, support: Tree) -> Tree:
            return self.learner.predict(
                self.state, pytree.tree_unflatten(columns, specs[0]), x, Examples(support, support)
            )

        many = self._compute(lambda: torch.func.vmap(single, in_dims=(dims, 0, 0))(columns, x, support))
        return [at(many, i) for i in range(len(pairs))]

    def _compute(self, compute: Any) -> Any:
        with self.signature.judged_by_model():
            return compute()

    def _zeros(self, x: Shapes, y: Shapes) -> Examples:
        def zeros(shapes: Shapes, kinds: Kinds) -> Tree:
            device = self.learner.device
            return of_names({n: torch.zeros(shapes[n], dtype=k.dtype, device=device) for n, k in kinds.items()})

        return Examples(zeros(x, self.signature.x), zeros(y, self.signature.y))

    def warm_up(self) -> None:
        """Compute one adaptation and prediction: PyTorch's one-time work would delay the first caller."""
        kinds = [*self.signature.x.values(), *self.signature.y.values()]
        if any(kind.shape is None or None in kind.shape for kind in kinds):
            return
        rows = self.signature.classes or 2
        x, y = ({n: (rows, *k.shape) for n, k in part.items()} for part in (self.signature.x, self.signature.y))  # type: ignore[misc]
        support = self._zeros(x, y)
        if self.classification:
            support.y.copy_(torch.arange(rows))
        adapted = self.adapt([support], None)[0]
        if isinstance(adapted, ServedAdaptation):
            self.predict([adapted], [support.x])


def _elements(tree: Tree) -> int:
    return sum(t.numel() for t in pytree.tree_leaves(tree))


def _single(kinds: Kinds) -> TensorKind:
    """Return the kind of a single tensor; of several, one without a shape that clients of a single one can use."""
    return kinds.get("") or TensorKind((), next(iter(kinds.values())).dtype)


def _sizes(kind: TensorKind) -> list[int]:
    return [-1 if n is None else n for n in kind.shape or ()]


def _described(kinds: Kinds) -> list[dict[str, Any]]:
    """Return the fields of the messages ``TensorKind``."""
    return [
        {"name": name, "shape": _sizes(kind), "dtype": str(kind.dtype).removeprefix("torch.")}
        for name, kind in kinds.items()
    ]


def _parts(items: Sequence[Any], size: int) -> list[Sequence[Any]]:
    return [items[i : i + size] for i in range(0, len(items), size)]
