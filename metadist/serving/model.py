"""A trained learner for the service: it checks inputs, and computes several adaptations or predictions together."""

from __future__ import annotations

import logging
import threading
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import safetensors.torch
import torch
import torch.utils._pytree as pytree
from torch import Tensor

from metadist.core.errors import ConfigError
from metadist.core.state import State
from metadist.core.task import Examples
from metadist.learners.few_shot import FewShotLearner

log = logging.getLogger(__name__)


class InvalidInput(ConfigError):
    """The tensors of a request do not fit the model."""


class DivergedAdaptation(ConfigError):
    """The adaptation gave NaN or Inf."""


class ServedAdaptation(NamedTuple):
    """φ for one support set, with everything that ``ServedModel.predict`` needs."""

    phi: Any
    #: the support inputs [N, …] if predictions need them
    support: Tensor | None
    #: the memory of both
    bytes: int
    #: a hash of the structure of φ; ``predict`` stacks parameters with equal hashes
    structure: int
    #: inner steps, shape of x, shape of y: the arguments of an adaptation that gives the same structure
    made_by: tuple[Any, ...]


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

    def __post_init__(self) -> None:
        family, self.algorithm = self.learner.tasks, type(self.learner.algorithm).__name__
        self.classification = family.kind == "classification"
        self.input_shape = None if family.input_shape is None else tuple(family.input_shape)
        self.outputs = family.ways("test") if self.classification else family.outputs
        self.target_shape: tuple[int, ...] = () if self.classification else (family.outputs,)
        self.dtype = self.learner.model.dtype
        self.params_sha256 = self.state.sha256()
        self.state = State({n: t.to(self.learner.device) for n, t in self.state.slots.items()})
        self._theta_memory = {t.untyped_storage().data_ptr() for t in self.state.slots.values()}
        self._stackable, self._lock = True, threading.Lock()
        self._needs_support = self.learner.normalization == "inductive"

    def describe(self) -> dict[str, Any]:
        """Return the fields of the message ``Model``: name, algorithm, shapes, limits, hash of the parameters."""
        return {
            "name": self.name,
            "algorithm": self.algorithm,
            "kind": self.learner.tasks.kind,
            "input_shape": list(self.input_shape or ()),
            "target_shape": list(self.target_shape),
            "outputs": self.outputs,
            "dtype": str(self.dtype).removeprefix("torch."),
            "params_sha256": self.params_sha256,
            "source": self.source,
            "max_support": self.limits.support,
            "max_inner_steps": self.limits.inner_steps,
            "max_queries": self.limits.queries,
            "normalization": self.learner.normalization if self.learner.model.normalises_over_batch else "none",
            **({} if self.images is None else {"images": self._conversion(*self.images)}),
        }

    @staticmethod
    def _conversion(size: int, channels: int, invert: bool, white: float | None) -> dict[str, Any]:
        about = {"size": size, "channels": channels, "invert": invert}
        return about if white is None else {**about, "white": white}

    # Checks of a request ----------------------------------------------------------------------------------------------

    def check_shape(self, name: str, shape: Sequence[int], max_rows: int) -> None:
        """Check the shape of the inputs x [N, …] before their data is copied. Raises ``InvalidInput``."""
        expected = "" if self.input_shape is None else "".join(f", {n}" for n in self.input_shape)
        if len(shape) < 1 or not 1 <= shape[0] <= max_rows:
            raise InvalidInput(
                f"{name} has {shape[0] if shape else 'no'} rows; expected 1 to {max_rows}, shape [N{expected}]"
            )
        if self.input_shape is not None and tuple(shape[1:]) != self.input_shape:
            raise InvalidInput(f"{name} has shape {list(shape)}; model '{self.name}' takes [N{expected}]")

    def check_values(self, name: str, x: Tensor) -> Tensor:
        """Return x with the model's dtype and device. Raises ``InvalidInput`` for integers, NaN and Inf."""
        if not x.is_floating_point():
            raise InvalidInput(
                f"{name} holds {str(x.dtype).removeprefix('torch.')}; expected floating-point numbers, "
                "for images in [0, 1]"
            )
        x = x.to(self.learner.device, self.dtype)
        if not bool(torch.isfinite(x).all()):
            raise InvalidInput(
                f"{name} holds NaN or Inf; every input must be finite (as {str(self.dtype).removeprefix('torch.')})"
            )
        return x

    def check_target_shape(self, shape: Sequence[int], rows: int) -> None:
        """Check the shape of the targets of ``rows`` inputs. Raises ``InvalidInput``."""
        if tuple(shape) != (rows, *self.target_shape):
            raise InvalidInput(
                f"y has shape {list(shape)}; with {rows} rows of x it must be {[rows, *self.target_shape]}"
            )

    def check_targets(self, y: Tensor, rows: int) -> Tensor:
        """Return the targets, classes as int64. Raises ``InvalidInput`` for wrong shapes and unknown classes."""
        self.check_target_shape(tuple(y.shape), rows)
        if not self.classification:
            return self.check_values("y", y)
        if y.is_floating_point():
            raise InvalidInput("y holds floating-point numbers; expected classes as whole numbers")
        low, high = int(y.min()), int(y.max())
        if low < 0 or high >= self.outputs:
            raise InvalidInput(
                f"y holds class {low if low < 0 else high}; model '{self.name}' has {self.outputs} classes, "
                f"0 to {self.outputs - 1}"
            )
        return y.to(self.learner.device, torch.int64)

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
        """Adapt to each support set; a support set that fails has its exception in the list."""
        parts = _parts(supports, self.together(supports[0].x.numel()))
        with self._lock:
            return [adapted for some in parts for adapted in self._adapt(some, inner_steps)]

    def _adapt(self, supports: Sequence[Examples], inner_steps: int | None) -> list[ServedAdaptation | Exception]:
        if len(supports) > 1 and self._stackable:
            stacked = Examples(torch.stack([s.x for s in supports]), torch.stack([s.y for s in supports]))
            try:
                many = torch.func.vmap(lambda s: self.learner.adapt(self.state, s, inner_steps))(stacked)
                return self._split(many, supports, inner_steps)
            except (
                RuntimeError,
                TypeError,
                ValueError,
            ) as error:  # the φ of an algorithm may hold other objects than tensors
                log.warning(
                    "model '%s': adaptations cannot be computed together (%s); they are computed one by one",
                    self.name,
                    error,
                )
                self._stackable = False
        return [self._alone(support, inner_steps) for support in supports]

    def _alone(self, support: Examples, inner_steps: int | None) -> ServedAdaptation | Exception:
        try:
            phi = self._compute(lambda: self.learner.adapt(self.state, support, inner_steps))
            return self._split(
                pytree.tree_map(lambda t: t.unsqueeze(0) if isinstance(t, Tensor) else t, phi), [support], inner_steps
            )[0]
        except Exception as error:
            return error

    def _split(
        self, many: Any, supports: Sequence[Examples], inner_steps: int | None
    ) -> list[ServedAdaptation | Exception]:
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
                split.append(
                    DivergedAdaptation("the adaptation gave NaN or Inf; are the inputs scaled as in training?")
                )
                continue
            phi = pytree.tree_unflatten(
                [row[i].detach().clone() if own else row[i] for row, own in zip(rows, adapted)], spec
            )
            inputs = support.x if self._needs_support else None
            total = size + (0 if inputs is None else inputs.numel() * inputs.element_size())
            made_by = (inner_steps, tuple(support.x.shape), tuple(support.y.shape))
            split.append(ServedAdaptation(phi, inputs, total, structure, made_by))
        return split

    # Transfer to another replica --------------------------------------------------------------------------------------

    def pack(self, adapted: ServedAdaptation) -> tuple[Any, ...]:
        """Return the tensors that are not θ's as safetensors, and the arguments that restore the rest."""
        leaves = [t for t in pytree.tree_leaves(adapted.phi) if self._is_adapted(t)]
        tensors = {f"phi/{i}": t.cpu().contiguous() for i, t in enumerate(leaves)}
        if adapted.support is not None:
            tensors["support"] = adapted.support.cpu().contiguous()
        return safetensors.torch.save(tensors), adapted.made_by

    def unpack(self, packed: tuple[Any, ...]) -> ServedAdaptation:
        """Return the adapted parameters that another replica's ``pack`` packed."""
        data, (inner_steps, x, y) = packed
        tensors = {n: t.clone().to(self.learner.device) for n, t in safetensors.torch.load(data).items()}
        with self._lock:
            targets = torch.zeros(
                y, dtype=torch.int64 if self.classification else self.dtype, device=self.learner.device
            )
            empty = self.learner.adapt(
                self.state, Examples(torch.zeros(x, dtype=self.dtype, device=self.learner.device), targets), inner_steps
            )
        leaves, spec = pytree.tree_flatten(empty)
        own = iter(range(len(leaves)))
        phi = pytree.tree_unflatten([tensors[f"phi/{next(own)}"] if self._is_adapted(t) else t for t in leaves], spec)
        total = sum(t.numel() * t.element_size() for t in tensors.values())
        structure = hash((str(spec), *(tuple(t.shape) if isinstance(t, Tensor) else t for t in leaves)))
        return ServedAdaptation(phi, tensors.get("support"), total, structure, (inner_steps, x, y))

    def _is_adapted(self, leaf: Any) -> bool:
        """Return whether a leaf of φ is a tensor that does not share θ's memory."""
        return isinstance(leaf, Tensor) and leaf.untyped_storage().data_ptr() not in self._theta_memory

    def predict(self, adapted: Sequence[ServedAdaptation], queries: Sequence[Tensor]) -> list[Tensor]:
        """Return predictions for queries [N, …], each with its adapted parameters of one structure."""
        parts = _parts(list(zip(adapted, queries)), self.together(queries[0].numel()))
        with self._lock:
            return [prediction for some in parts for prediction in self._predict(some)]

    def _predict(self, pairs: Sequence[tuple[ServedAdaptation, Tensor]]) -> list[Tensor]:
        if len(pairs) == 1:
            ((adapted, x),) = pairs
            support = x if adapted.support is None else adapted.support
            return [self._compute(lambda: self.learner.predict(self.state, adapted.phi, x, Examples(support, support)))]
        x = torch.stack([x for _, x in pairs])
        support = torch.stack([x if a.support is None else a.support for a, x in pairs])
        leaves, specs = zip(*(pytree.tree_flatten(a.phi) for a, _ in pairs))
        shared = [isinstance(t, Tensor) and t.untyped_storage().data_ptr() in self._theta_memory for t in leaves[0]]
        stacked = [
            column[0] if s or not isinstance(column[0], Tensor) else torch.stack(column)
            for s, column in zip(shared, zip(*leaves))
        ]
        dims = [None if s or not isinstance(t, Tensor) else 0 for s, t in zip(shared, leaves[0])]

        def single(columns: list[Any], x: Tensor, support: Tensor) -> Tensor:
            return self.learner.predict(
                self.state, pytree.tree_unflatten(columns, specs[0]), x, Examples(support, support)
            )

        return list(self._compute(lambda: torch.func.vmap(single, in_dims=(dims, 0, 0))(stacked, x, support)).unbind())

    def _compute(self, compute: Any) -> Any:
        """Compute; convert errors into ``InvalidInput`` if only the model itself can judge the input's shape."""
        try:
            return compute()
        except (RuntimeError, IndexError, ValueError) as error:
            if self.input_shape is not None:
                raise
            raise InvalidInput(f"model '{self.name}' cannot compute on inputs of this shape") from error

    def warm_up(self) -> None:
        """Compute one adaptation and prediction: PyTorch's one-time work would delay the first caller."""
        if self.input_shape is None:
            return
        rows = self.outputs if self.classification else 2
        x = torch.zeros(rows, *self.input_shape, dtype=self.dtype, device=self.learner.device)
        y = torch.arange(rows) if self.classification else torch.zeros(rows, *self.target_shape, dtype=self.dtype)
        adapted = self.adapt([Examples(x, y.to(self.learner.device))], None)[0]
        if isinstance(adapted, ServedAdaptation):
            self.predict([adapted], [x])


def _parts(items: Sequence[Any], size: int) -> list[Sequence[Any]]:
    return [items[i : i + size] for i in range(0, len(items), size)]
