"""The errors of ``metadist.testing``: the property that an object lacks, the values that show it, and the remedy."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from torch import nn

from metadist.core.errors import MetadistError, first_line
from metadist.learners.base import Learner
from metadist.learners.purity import ImpureConfigError

#: characters of an object's repr that a message shows
SHOWN = 120


class PropertyError(AssertionError):
    """``subject`` lacks ``property``. ``values`` were observed and show it; ``remedy`` is the change to make."""

    def __init__(self, subject: object, property: str, values: str, remedy: str) -> None:
        super().__init__(f"{title(subject)}: expected: {property}; found: {values}; remedy: {remedy}")
        self.subject, self.property, self.values, self.remedy = subject, property, values, remedy


class UnusableError(PropertyError):
    """The object raises an error, or its parts do not fit together."""


class ImpureError(PropertyError):
    """The same key gives different values."""


class InexactError(PropertyError):
    """A result depends on how the tasks are cut into shards."""


class SameTasksError(PropertyError):
    """Different keys give the same tasks."""


class ShapeError(PropertyError):
    """A tensor has another shape or dtype than the interface states, or a value out of range."""


class RowError(PropertyError):
    """The value of one row depends on other rows."""


class WrongGradientError(PropertyError):
    """A contribution differs from the gradient of the objective, or points uphill."""


class RoundTripError(PropertyError):
    """An object comes back changed from its config, from pickling, from a checkpoint or from the wire."""


def title(subject: object) -> str:
    """Return the name of ``subject`` in messages: its class name, with its fields where its repr is short."""
    if isinstance(subject, nn.Module):
        return type(subject).__name__
    if isinstance(subject, Learner):
        return f"{title(subject.algorithm)} on {title(subject.tasks)} with {title(subject.model.module)}"
    text = " ".join(repr(subject).split())
    return text if len(text) <= SHOWN and " object at 0x" not in text else type(subject).__name__


@contextmanager
def usable(subject: object, property: str, remedy: str = "") -> Iterator[None]:
    """Turn an error of the user's own code into UnusableError, and the dry run's finding of an impure value into
    ImpureError; PropertyErrors pass."""
    try:
        yield
    except PropertyError:
        raise
    except ImpureConfigError as error:
        raise ImpureError(subject, property, f"it {error.property}: {error.values}", error.remedy) from error
    except MetadistError as error:
        remedy = remedy or "change it as the message says"
        raise UnusableError(subject, property, f"metadist refuses it ({first_line(error)})", remedy) from error
    except Exception as error:
        remedy = remedy or "correct the error that its own code raises; the traceback above shows the place"
        raise UnusableError(subject, property, f"it raises {first_line(error)}", remedy) from error
