"""The signature of a model: shapes and kinds of the inputs and targets that it was trained with.

Training makes it from sampled tasks and keeps it in the run. Every caller of ``adapt`` and ``predict`` is checked
against it: in Python, on the command line, over gRPC and HTTP, and as an MLflow model.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import TypeVar, Union

import torch
from torch import Tensor

from metadist.core.errors import CheckpointError, ConfigError, first_line
from metadist.core.task import Examples, Task, TaskFamily
from metadist.core.tree import Tree, first, named, of_names

T = TypeVar("T")
Shape = tuple[Union[int, None], ...]
"""The shape of one example, without its row; None for a size that varies between tasks."""


class InvalidInput(ConfigError):
    """Inputs or targets do not fit the model."""


class DivergedAdaptation(ConfigError):
    """The adaptation gave NaN or Inf."""

    def __init__(self) -> None:
        super().__init__("the adaptation gave NaN or Inf; are the inputs scaled as in training?")


@dataclass(frozen=True)
class TensorKind:
    """The shape of one example of a tensor [N, …], without its row, and its dtype. A shape of None is unknown."""

    shape: Shape | None
    dtype: torch.dtype

    @classmethod
    def of(cls, tensors: Sequence[Tensor], skipped: int) -> TensorKind:
        """Return the kind of ``tensors``; the first ``skipped`` dimensions are no example's. Other sizes vary."""
        return cls(_common([tuple(t.shape[skipped:]) for t in tensors]), tensors[0].dtype)

    def fits(self, sizes: Sequence[int]) -> bool:
        """Return whether an example may have these sizes."""
        return self.shape is None or (
            len(sizes) == len(self.shape) and all(known is None or known == n for n, known in zip(sizes, self.shape))
        )

    def shown(self, rows: str) -> str:
        """Return the shape for a message: [N, 2]."""
        return f"[{rows}, …]" if self.shape is None else _shown(rows, self.shape)

    def values(self, name: str, x: Tensor, finite: bool) -> Tensor:
        """Return ``x`` in this dtype. Raises ``InvalidInput`` where it cannot hold the values, or one is not finite."""
        dtype = self.dtype
        if dtype.is_floating_point or dtype.is_complex:
            if not (x.is_floating_point() or (dtype.is_complex and x.is_complex())):
                raise InvalidInput(
                    f"{name} holds {_kind(x.dtype)}; expected floating-point numbers as in training ({name}.float()), "
                    "for images in [0, 1]"
                )
            x = x.to(dtype)
            if finite and not bool(torch.isfinite(x).all()):
                raise InvalidInput(f"{name} holds NaN or Inf; every number must be finite (as {_short(dtype)})")
            return x
        if not _is_whole(x.dtype) and x.dtype != dtype:
            raise InvalidInput(
                f"{name} holds {_kind(x.dtype)}; expected whole numbers as in training, {_short(dtype)} ({name}.long())"
            )
        converted = x.to(dtype)
        if x.dtype != dtype and not bool((converted.to(x.dtype) == x).all()):
            raise InvalidInput(f"{name} holds numbers that {_short(dtype)} cannot hold")
        return converted


Kinds = Mapping[str, TensorKind]
"""The tensors of a tree by name (``core/tree.py``); "" for a single one."""


@dataclass(frozen=True)
class Signature:
    """Shapes, dtypes and classes of a model's inputs x [N, …] and targets y [N, …].

    ``classes`` is the number of classes, which are 0 … classes − 1; None where targets are values. With ``any_classes``
    a support set may have more classes than the tasks in training. With ``fewer_classes`` it may have fewer, as tasks
    in training have, and predictions then are for these alone. ``finite`` is false where the tasks in training have NaN
    or Inf themselves, which the model then handles. ``predicted`` holds the tensors of a prediction where they are
    neither logits nor like the targets.
    """

    x: Kinds
    y: Kinds
    classes: int | None = None
    any_classes: bool = False
    finite: bool = True
    fewer_classes: bool = False
    predicted: Kinds | None = None

    @property
    def prediction(self) -> Kinds:
        """The tensors of a prediction; a size of None varies."""
        if self.predicted is not None:
            return self.predicted
        if self.classes is None:
            return {
                name: replace(kind, shape=(None,) if kind.shape is None else kind.shape)
                for name, kind in self.y.items()
            }
        logits = None if self.any_classes or self.fewer_classes else self.classes
        return {"": TensorKind((logits,), torch.get_default_dtype())}

    # Checks -----------------------------------------------------------------------------------------------------------

    def check_input_shape(self, name: str, shape: Sequence[int], part: str = "") -> None:
        """Check the shape of the tensor ``part`` of inputs x [N, …]. Raises ``InvalidInput``."""
        if not shape or not self.x[part].fits(shape[1:]):
            raise InvalidInput(
                f"{_joined(name, part)} has shape {list(shape)}; the model takes {self.shown_input_shape(part)}"
            )

    def shown_input_shape(self, part: str = "") -> str:
        """Return the shape of inputs for a message: [N, 2]."""
        return self.x[part].shown("N")

    def check_target_shape(self, shape: Sequence[int], rows: int, part: str = "") -> None:
        """Check the shape of the targets of ``rows`` inputs. Raises ``InvalidInput``."""
        if tuple(shape[:1]) != (rows,) or not self.y[part].fits(shape[1:]):
            expected = self.y[part].shown(str(rows))
            name = _joined("y", part)
            raise InvalidInput(f"{name} has shape {list(shape)}; with {rows} rows of x it must be {expected}")

    def parts(self, name: str, x: Tree) -> dict[str, Tensor]:
        """Return the tensors of inputs x by name. Raises ``InvalidInput`` where the model takes others."""
        return parts_of(name, _named(name, x), self.x)

    def inputs(self, name: str, x: Tree) -> Tree:
        """Return inputs x [N, …] in the dtypes of the training. Raises ``InvalidInput`` where they do not fit."""
        tensors = self.parts(name, x)
        for part, tensor in tensors.items():
            self.check_input_shape(name, tuple(tensor.shape), part)
        rows = {part: len(tensor) for part, tensor in tensors.items()}
        if len(set(rows.values())) > 1:
            shown = ", ".join(f"{_joined(name, part)} {n}" for part, n in rows.items())
            raise InvalidInput(f"the tensors of {name} differ in rows: {shown}")
        return self._converted(name, tensors, self.x)

    def targets(self, y: Tree, rows: int) -> Tree:
        """Return the targets of ``rows`` inputs in the dtypes of the training.

        Raises ``InvalidInput`` for another shape or dtype, and for unknown classes.
        """
        tensors = parts_of("y", _named("y", y), self.y)
        for part, tensor in tensors.items():
            self.check_target_shape(tuple(tensor.shape), rows, part)
        if self.classes is None:
            return self._converted("y", tensors, self.y)
        if not _is_whole(tensors[""].dtype):
            raise InvalidInput(f"y holds {_kind(y.dtype)}; expected classes as whole numbers (y.long())")
        refuse_classes(y, self.classes, self.any_classes)
        if self.fewer_classes and y.numel() and len(y.unique()) <= int(y.max()):
            raise InvalidInput(
                f"y holds class {int(y.max())}, and not every class below it; number the classes of the support set "
                "from 0 on, each with an example"
            )
        return y.to(self.y[""].dtype)

    def support(self, x: Tree, y: Tree) -> Examples:
        """Return a support set x [N, …], y [N, …]. Raises ``InvalidInput`` where it does not fit the model."""
        x = self.inputs("x", x)
        if not len(first(x)):
            raise InvalidInput("x has no rows; a support set needs at least one")
        return Examples(x, self.targets(y, len(first(x))))

    def ways(self, y: Tree) -> int | None:
        """Return the number of classes of a support set with targets ``y``; None where targets are values."""
        if self.classes is None or not (self.any_classes or self.fewer_classes):
            return self.classes
        found = int(y.max()) + 1
        return found if self.fewer_classes else max(self.classes, found)

    def logits(self, prediction: Tensor, ways: int | None) -> Tensor:
        """Return the logits [N, ways] of the classes of a support set; ``prediction`` itself where it has no others."""
        return prediction if ways is None or not self.fewer_classes else prediction[..., :ways]

    @contextmanager
    def judged_by_model(self) -> Iterator[None]:
        """Convert errors inside the block into ``InvalidInput`` where only the model itself can judge the inputs.

        These are sizes that vary or are unknown, and whole numbers without a place in an embedding.
        """
        try:
            yield
        except (RuntimeError, IndexError, ValueError) as error:
            if self.whole_inputs and "out of range" in str(error):
                raise InvalidInput(f"x holds a number that the model does not know: {first_line(error)}") from error
            if all(kind.shape is not None and None not in kind.shape for kind in self.x.values()):
                raise
            raise InvalidInput("the model cannot compute on inputs of this shape") from error

    @property
    def whole_inputs(self) -> bool:
        """Whether a tensor of x holds whole numbers, such as token ids."""
        return any(_is_whole(kind.dtype) for kind in self.x.values())

    def _converted(self, name: str, tensors: Mapping[str, Tensor], kinds: Kinds) -> Tree:
        return of_names(
            {part: kind.values(_joined(name, part), tensors[part], self.finite) for part, kind in kinds.items()}
        )

    # As plain data ----------------------------------------------------------------------------------------------------

    def as_dict(self) -> dict[str, object]:
        """Return plain data for JSON."""
        more = {} if self.predicted is None else {"prediction": _written(self.predicted)}
        return {
            "input": _written(self.x),
            "target": _written(self.y),
            "classes": self.classes,
            "any_classes": self.any_classes,
            "finite": self.finite,
            **({"fewer_classes": True} if self.fewer_classes else {}),
            **more,
        }

    @classmethod
    def of_dict(cls, recorded: object) -> Signature:
        """Return the signature that ``as_dict`` wrote. Raises ``CheckpointError`` for other data."""
        try:
            assert isinstance(recorded, Mapping)
            x, y = _read(recorded["input"]), _read(recorded["target"])
            classes, any_classes, finite = recorded["classes"], recorded["any_classes"], recorded["finite"]
            assert classes is None or (type(classes) is int and classes >= 0)
            fewer_classes = recorded.get("fewer_classes", False)  # an earlier version has no such key
            assert type(any_classes) is bool and type(finite) is bool and type(fewer_classes) is bool
            predicted = _read(recorded["prediction"]) if "prediction" in recorded else None
        except (AssertionError, KeyError, TypeError, ValueError):
            raise CheckpointError(f"the signature of the model is damaged: {str(recorded)[:200]!r}") from None
        return cls(x, y, classes, any_classes, finite, fewer_classes, predicted)

    # Where it comes from ----------------------------------------------------------------------------------------------

    @classmethod
    def of_tasks(cls, tasks: Sequence[Task], classes: int | None, any_classes: bool) -> Signature:
        """Return the signature of stacked ``tasks``: a size in which they differ varies."""
        inputs = [named(e.x, "x") for task in tasks for e in (task.support, task.query)]
        targets = [named(task.support.y, "y") for task in tasks]
        return cls(
            _kinds(inputs, 2),
            _kinds(targets, 2),
            classes,
            any_classes and classes is not None,
            all(bool(torch.isfinite(t).all()) for tensors in [*inputs, *targets] for t in tensors.values()),
            classes is not None and any(task.ways is not None for task in tasks),
        )

    def predicting(self, prediction: Tree, target: Tree) -> Signature:
        """Return the signature with the kinds of a ``prediction`` [N, …] for ``target``, where they are unlike it."""
        tensors, targets = named(prediction, "the prediction"), named(target, "y")
        alike = {n: t.shape for n, t in tensors.items()} == {n: t.shape for n, t in targets.items()}
        if self.classes is not None or (alike and all(t.is_floating_point() for t in targets.values())):
            return self
        kinds = _kinds([tensors], 1)
        if any(k.shape is None or None in k.shape for k in [*self.x.values(), *self.y.values()]):
            kinds = {n: replace(k, shape=(None,) * len(k.shape or ())) for n, k in kinds.items()}
        return replace(self, predicted=kinds)

    @classmethod
    def declared(cls, family: TaskFamily, dtype: torch.dtype, any_classes: bool) -> Signature:
        """Return what ``family`` states without sampling, for a run of an earlier version."""
        shape = None if family.input_shape is None else tuple(family.input_shape)
        x = {"": TensorKind(shape, dtype)}
        if family.kind == "classification":
            return cls(x, {"": TensorKind((), torch.int64)}, family.ways("test"), any_classes)
        return cls(x, {"": TensorKind((family.outputs,), dtype)})


def parts_of(name: str, tensors: Mapping[str, T], kinds: Mapping[str, object]) -> dict[str, T]:
    """Return ``tensors`` in the order of ``kinds``. Raises ``InvalidInput`` where they have other names."""
    if tensors.keys() != kinds.keys():
        raise InvalidInput(f"{name} is {_tensors(tensors)}; the model takes {_tensors(kinds)}")
    return {part: tensors[part] for part in kinds}


def _named(name: str, tree: Tree) -> dict[str, Tensor]:
    try:
        return named(tree, name)
    except ConfigError as error:
        raise InvalidInput(str(error)) from None


def _tensors(names: Mapping[str, object]) -> str:
    return "one tensor" if list(names) == [""] else f"tensors {', '.join(sorted(names))[:200]}"


def refuse_classes(y: Tensor, classes: int, any_classes: bool = False) -> None:
    """Raise ``InvalidInput`` for a label outside 0 … classes − 1.

    With ``any_classes``, more classes are allowed where each of them from 0 on has an example.
    """
    if not y.numel():
        return
    low, high = int(y.min()), int(y.max())
    if low >= 0 and (high < classes or (any_classes and len(y.unique()) == high + 1)):
        return
    from_one = "; number them from 0 (y - 1)" if low == 1 and high == len(y.unique()) else ""
    more = ", or more if each of them has an example" if any_classes else ""
    raise InvalidInput(
        f"y holds class {low if low < 0 else high}; expected {classes} classes, 0 to {classes - 1}{more}{from_one}"
    )


def _common(shapes: Sequence[tuple[int, ...]]) -> Shape | None:
    """Return the sizes that all ``shapes`` share, with None for the others; None for different ranks."""
    if len({len(shape) for shape in shapes}) > 1:
        return None
    return tuple(sizes[0] if len(set(sizes)) == 1 else None for sizes in zip(*shapes))


def _shown(rows: str, shape: Shape) -> str:
    return f"[{', '.join([rows, *('any' if n is None else str(n) for n in shape)])}]"


def _is_whole(dtype: torch.dtype) -> bool:
    return not (dtype.is_floating_point or dtype.is_complex or dtype == torch.bool)


def _short(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _kind(dtype: torch.dtype) -> str:
    return f"floating-point numbers ({_short(dtype)})" if dtype.is_floating_point else _short(dtype)


def _joined(name: str, part: str) -> str:
    return f"{name}.{part}" if part else name


def _kinds(trees: Sequence[Mapping[str, Tensor]], skipped: int) -> Kinds:
    """Return the kinds of trees of one structure. ConfigError where they differ in it."""
    if any(tree.keys() != trees[0].keys() for tree in trees):
        shown = " and ".join(sorted({_tensors(tree) for tree in trees}))
        raise ConfigError(f"tasks: some have {shown}; give all of them the same")
    return {name: TensorKind.of([tree[name] for tree in trees], skipped) for name in trees[0]}


def _written(kinds: Kinds) -> dict[str, object]:
    """Return plain data: one tensor as it is, as in earlier versions, others by name under ``tensors``."""
    plain: dict[str, object] = {
        name: {"shape": None if k.shape is None else list(k.shape), "dtype": _short(k.dtype)}
        for name, k in kinds.items()
    }
    return plain[""] if list(plain) == [""] else {"tensors": plain}  # type: ignore[return-value]


def _read(part: object) -> Kinds:
    assert isinstance(part, Mapping)
    if "tensors" not in part:
        return {"": _read_kind(part)}
    kinds = {str(name): _read_kind(kind) for name, kind in part["tensors"].items()}
    of_names(kinds)  # ValueError where they make no tree
    return kinds


def _read_kind(part: object) -> TensorKind:
    assert isinstance(part, Mapping)
    shape, dtype = part["shape"], getattr(torch, str(part["dtype"]), None)
    assert isinstance(dtype, torch.dtype)
    assert shape is None or (isinstance(shape, list) and all(n is None or (type(n) is int and n >= 0) for n in shape))
    return TensorKind(None if shape is None else tuple(shape), dtype)
