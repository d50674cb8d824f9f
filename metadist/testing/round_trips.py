"""Round trips through a config, pickling, a checkpoint and the wire, after which nothing may have changed."""

from __future__ import annotations

import copy
import json
import tempfile
from collections.abc import Mapping
from dataclasses import fields, is_dataclass
from typing import Any, TypeVar

import torch

from metadist.config.schema import as_plain, settings
from metadist.core.differences import difference
from metadist.core.errors import ConfigError, first_line
from metadist.core.round import Shard
from metadist.core.state import Contribution, Records, State
from metadist.learners.base import Learner
from metadist.storage.checkpoints import Checkpoints
from metadist.testing.failures import RoundTripError, ShapeError, usable
from metadist.wire import ResultHeader, ThetaHeader, decode_result, decode_theta, result_parts, theta_parts

T = TypeVar("T")

#: bytes of a pickle above which an object carries its data along
MOST_BYTES = 200_000


def config(subject: object) -> None:
    """Check that a dataclass comes back from its own config: ``as_plain``, then built again by the strict rules of
    YAML.

    An object with fields that YAML can't hold is only usable from Python; it passes.
    """
    if not is_dataclass(subject) or isinstance(subject, type) or not _is_plain(subject):
        return
    document = as_plain(subject)
    property = "its config builds the same object"
    try:
        again = settings(type(subject).__name__, document, type(subject))
    except ConfigError as error:
        raise RoundTripError(
            subject,
            property,
            f"it is refused ({first_line(error)})",
            "annotate every field with the type that it holds",
        ) from error
    for name, value in as_plain(again).items():
        if value != document[name]:
            raise RoundTripError(
                subject,
                property,
                f"{name} is {document[name]!r} and then {value!r}",
                "leave the fields as they are given; compute derived values in a property",
            )


def _is_plain(subject: Any) -> bool:
    try:
        json.dumps({f.name: getattr(subject, f.name) for f in fields(subject) if f.init})
    except TypeError:
        return False
    return True


def pickled(subject: T, owner: object) -> T:
    """Return ``subject`` as another process gets it. Raises where it carries its data along, or can't be pickled."""
    import cloudpickle

    remedy = "keep fields plain, and load data in prepare(device), not in __init__"
    with usable(owner, "it is sent to workers by pickling", remedy):
        data = cloudpickle.dumps(subject)
        there: T = cloudpickle.loads(data)
    if len(data) > MOST_BYTES:
        raise ShapeError(owner, "it is sent to workers without its data", f"its pickle has {len(data)} bytes", remedy)
    return there


def state(learner: Learner, before: State) -> None:
    """Check that a state comes back from its slots' layouts, from a checkpoint and from the wire."""
    for name, slot in learner.slots.items():
        vector = before.slots[name]
        again = slot.layout.flatten(dict(slot.layout.unflatten(vector.clone())))
        _equal(learner, "state → tensors → state", {name: vector}, {name: again})
    with tempfile.TemporaryDirectory() as folder:
        store = Checkpoints(folder)
        if not store.save(1, before, {}, slots=learner.slots):
            raise RoundTripError(learner, "a checkpoint holds every bit", "it can't be written", _FREE)
        loaded = store.latest(learner.slots)
    assert loaded is not None
    _equal(learner, "a checkpoint holds every bit", before.slots, loaded.state.slots)
    _equal(learner, "a checkpoint holds every bit", before.outer, loaded.state.outer)
    header = ThetaHeader("check", 2, 0)
    sent = decode_theta(theta_parts(before.slots, learner.slots, header), learner.slots, header)
    _equal(learner, "θ crosses the wire unchanged", before.slots, sent)


def result(learner: Learner, shard: Shard, found: Contribution | Records) -> None:
    """Check that a shard's result crosses the wire unchanged."""
    sent = result_parts(copy.deepcopy(found), learner.slots, ResultHeader(shard, 1, "check"))
    got, _ = decode_result(sent, shard, learner.slots)
    property = "a shard's result crosses the wire unchanged"
    if isinstance(found, Contribution) and isinstance(got, Contribution):
        _equal(learner, property, found.slots, got.slots)
        before, after = ((c.weight, c.tasks, dict(c.metrics)) for c in (found, got))
        if before != after:
            raise RoundTripError(learner, property, f"{before} arrive as {after}", _FREE)
    if isinstance(found, Records) and isinstance(got, Records):
        _equal(learner, property, found.columns, got.columns)


_FREE = "contribute plain tensors of the slot's dtype, and metrics that are floats"


def _equal(
    learner: Learner, property: str, before: Mapping[str, torch.Tensor], after: Mapping[str, torch.Tensor]
) -> None:
    if differs := difference(dict(before), dict(after)):
        raise RoundTripError(learner, property, differs, _FREE)
