"""The signature of a model: shapes and kinds of the inputs and targets that it was trained with.

Training makes it from sampled tasks and keeps it in the run. Every caller of ``adapt`` and ``predict`` is checked
against it: in Python, on the command line, over gRPC and HTTP, and as an MLflow model.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Union

import torch
from torch import Tensor

from metadist.core.errors import CheckpointError, ConfigError, first_line
from metadist.core.task import Examples, Task, TaskFamily

Shape = tuple[Union[int, None], ...]
"""The shape of one example, without its row; None for a size that varies between tasks."""


class InvalidInput(ConfigError):
    """Inputs or targets do not fit the model."""


class DivergedAdaptation(ConfigError):
    """The adaptation gave NaN or Inf."""

    def __init__(self) -> None:
        super().__init__("the adaptation gave NaN or Inf; are the inputs scaled as in training?")


@dataclass(frozen=True)
class Signature:
    """Shapes, dtypes and classes of a model's inputs x [N, …] and targets y [N, …].

    A shape of None is unknown, and is not checked. ``classes`` is the number of classes, which are 0 … classes − 1;
    None where targets are values. With ``any_classes`` a support set may have more classes than the tasks in training.
    With ``fewer_classes`` it may have fewer, as tasks in training have, and predictions then are for these alone.
    ``finite`` is false where the tasks in training have NaN or Inf themselves, which the model then handles.
    """

    input_shape: Shape | None
    input_dtype: torch.dtype
    target_shape: Shape | None
    target_dtype: torch.dtype
    classes: int | None = None
    any_classes: bool = False
    finite: bool = True
    fewer_classes: bool = False

    @property
    def prediction_shape(self) -> Shape:
        """The shape of one prediction; a size of None varies."""
        if self.classes is not None:
            return (None if self.any_classes or self.fewer_classes else self.classes,)
        return (None,) if self.target_shape is None else self.target_shape

    # Checks -----------------------------------------------------------------------------------------------------------

    def check_input_shape(self, name: str, shape: Sequence[int]) -> None:
        """Check the shape of inputs x [N, …]. Raises ``InvalidInput``."""
        if not shape or (self.input_shape is not None and not _fits(shape[1:], self.input_shape)):
            raise InvalidInput(f"{name} has shape {list(shape)}; the model takes {self.shown_input_shape()}")

    def shown_input_shape(self) -> str:
        """Return the shape of inputs for a message: [N, 2]."""
        return "[N, …]" if self.input_shape is None else _shown("N", self.input_shape)

    def check_target_shape(self, shape: Sequence[int], rows: int) -> None:
        """Check the shape of the targets of ``rows`` inputs. Raises ``InvalidInput``."""
        known = self.target_shape is not None
        if tuple(shape[:1]) != (rows,) or (self.target_shape is not None and not _fits(shape[1:], self.target_shape)):
            expected = _shown(str(rows), self.target_shape or ()) if known else f"[{rows}, …]"
            raise InvalidInput(f"y has shape {list(shape)}; with {rows} rows of x it must be {expected}")

    def inputs(self, name: str, x: Tensor) -> Tensor:
        """Return inputs x [N, …] in the dtype of the training. Raises ``InvalidInput`` where they do not fit."""
        self.check_input_shape(name, tuple(x.shape))
        return self._values(name, x, self.input_dtype)

    def targets(self, y: Tensor, rows: int) -> Tensor:
        """Return the targets of ``rows`` inputs in the dtype of the training.

        Raises ``InvalidInput`` for another shape or dtype, and for unknown classes.
        """
        self.check_target_shape(tuple(y.shape), rows)
        if self.classes is None:
            return self._values("y", y, self.target_dtype)
        if not _is_whole(y.dtype):
            raise InvalidInput(f"y holds {_kind(y.dtype)}; expected classes as whole numbers (y.long())")
        refuse_classes(y, self.classes, self.any_classes)
        if self.fewer_classes and y.numel() and len(y.unique()) <= int(y.max()):
            raise InvalidInput(
                f"y holds class {int(y.max())}, and not every class below it; number the classes of the support set "
                "from 0 on, each with an example"
            )
        return y.to(self.target_dtype)

    def support(self, x: Tensor, y: Tensor) -> Examples:
        """Return a support set x [N, …], y [N, …]. Raises ``InvalidInput`` where it does not fit the model."""
        x = self.inputs("x", x)
        if not len(x):
            raise InvalidInput("x has no rows; a support set needs at least one")
        return Examples(x, self.targets(y, len(x)))

    def ways(self, y: Tensor) -> int | None:
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
            if _is_whole(self.input_dtype) and "out of range" in str(error):
                raise InvalidInput(f"x holds a number that the model does not know: {first_line(error)}") from error
            if self.input_shape is not None and None not in self.input_shape:
                raise
            raise InvalidInput("the model cannot compute on inputs of this shape") from error

    def _values(self, name: str, x: Tensor, dtype: torch.dtype) -> Tensor:
        if dtype.is_floating_point or dtype.is_complex:
            if not (x.is_floating_point() or (dtype.is_complex and x.is_complex())):
                raise InvalidInput(
                    f"{name} holds {_kind(x.dtype)}; expected floating-point numbers as in training ({name}.float()), "
                    "for images in [0, 1]"
                )
            x = x.to(dtype)
            if self.finite and not bool(torch.isfinite(x).all()):
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

    # As plain data ----------------------------------------------------------------------------------------------------

    def as_dict(self) -> dict[str, object]:
        """Return plain data for JSON."""
        return {
            "input": {"shape": _listed(self.input_shape), "dtype": _short(self.input_dtype)},
            "target": {"shape": _listed(self.target_shape), "dtype": _short(self.target_dtype)},
            "classes": self.classes,
            "any_classes": self.any_classes,
            "finite": self.finite,
            "fewer_classes": self.fewer_classes,
        }

    @classmethod
    def of_dict(cls, recorded: object) -> Signature:
        """Return the signature that ``as_dict`` wrote. Raises ``CheckpointError`` for other data."""
        try:
            assert isinstance(recorded, Mapping)
            (x, x_dtype), (y, y_dtype) = _read(recorded["input"]), _read(recorded["target"])
            classes, any_classes, finite = recorded["classes"], recorded["any_classes"], recorded["finite"]
            assert classes is None or (type(classes) is int and classes >= 0)
            fewer_classes = recorded.get("fewer_classes", False)  # an earlier version has no such key
            assert type(any_classes) is bool and type(finite) is bool and type(fewer_classes) is bool
        except (AssertionError, KeyError, TypeError, ValueError):
            raise CheckpointError(f"the signature of the model is damaged: {str(recorded)[:200]!r}") from None
        return cls(x, x_dtype, y, y_dtype, classes, any_classes, finite, fewer_classes)

    # Where it comes from ----------------------------------------------------------------------------------------------

    @classmethod
    def of_tasks(cls, tasks: Sequence[Task], classes: int | None, any_classes: bool) -> Signature:
        """Return the signature of stacked ``tasks``: a size in which they differ varies."""
        inputs = [e.x for task in tasks for e in (task.support, task.query)]
        targets = [task.support.y for task in tasks]
        return cls(
            _common([tuple(x.shape[2:]) for x in inputs]),
            inputs[0].dtype,
            _common([tuple(y.shape[2:]) for y in targets]),
            targets[0].dtype,
            classes,
            any_classes and classes is not None,
            all(bool(torch.isfinite(t).all()) for t in [*inputs, *targets]),
            classes is not None and any(task.ways is not None for task in tasks),
        )

    @classmethod
    def declared(cls, family: TaskFamily, dtype: torch.dtype, any_classes: bool) -> Signature:
        """Return what ``family`` states without sampling, for a run of an earlier version."""
        shape = None if family.input_shape is None else tuple(family.input_shape)
        if family.kind == "classification":
            return cls(shape, dtype, (), torch.int64, family.ways("test"), any_classes)
        return cls(shape, dtype, (family.outputs,), dtype)


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


def _fits(sizes: Sequence[int], shape: Shape) -> bool:
    return len(sizes) == len(shape) and all(known is None or known == n for n, known in zip(sizes, shape))


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


def _listed(shape: Shape | None) -> list[int | None] | None:
    return None if shape is None else list(shape)


def _read(part: object) -> tuple[Shape | None, torch.dtype]:
    assert isinstance(part, Mapping)
    shape, dtype = part["shape"], getattr(torch, str(part["dtype"]), None)
    assert isinstance(dtype, torch.dtype)
    assert shape is None or (isinstance(shape, list) and all(n is None or (type(n) is int and n >= 0) for n in shape))
    return None if shape is None else tuple(shape), dtype
