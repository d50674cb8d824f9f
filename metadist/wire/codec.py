"""Encode θ and the results of shards as framed Arrow buffers, and check them when they arrive.

A vector is a one-row column, so that slots of unequal length share a record batch; records keep their rows. Floats in
the header are hexadecimal strings: exact, and valid JSON even where the float is not finite.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import pyarrow as pa
import torch
from torch import Tensor

from metadist.core.round import Result, Shard
from metadist.core.state import Contribution, Records, Slot
from metadist.wire.error_feedback import wire_dtype
from metadist.wire.memory import fresh
from metadist.wire.stream import RejectedError, decode, dtype_name, encode_parts, short

__all__ = [
    "RejectedError",
    "ResultHeader",
    "ThetaHeader",
    "decode_output",
    "decode_result",
    "decode_theta",
    "output_parts",
    "result_parts",
    "theta_parts",
]

_IDENTITY = ("run", "meta_step", "round", "function", "split", "start", "count", "leaf", "seed", "key_step")
Vectors = Mapping[str, Tensor]
Slots = Mapping[str, Slot]


@dataclass(frozen=True)
class ThetaHeader:
    """Name the θ of one round."""

    run: str
    meta_step: int
    round: int

    def fields(self) -> dict[str, Any]:
        """Return the header of the frame."""
        return {"kind": "theta", "run": self.run, "meta_step": self.meta_step, "round": self.round}


@dataclass(frozen=True)
class ResultHeader:
    """Name the attempt that a result or a kept output comes from. ``stats`` are the worker's measurements."""

    shard: Shard
    attempt: int
    worker: str
    stats: Mapping[str, float] = field(default_factory=dict)

    def fields(self) -> dict[str, Any]:
        """Return the part of the frame's header that results and outputs share."""
        return {**_identity(self.shard), "attempt": self.attempt, "worker": self.worker}


# θ --------------------------------------------------------------------------------------------------------------------


def theta_parts(vectors: Vectors, slots: Slots, header: ThetaHeader) -> list[pa.Buffer]:
    """Encode θ (slot → vector [numel], any device) as a frame in parts.

    Pass a part of both mappings to publish a part of θ. A large vector on the CPU is not copied: it is a part as it
    lies, and must not change before the transport has copied it (the receiver would refuse the frame). Raises
    ``ValueError`` where the vectors are not those that ``slots`` declares.
    """
    if vectors.keys() != slots.keys():
        raise ValueError(f"slots are {sorted(vectors)}, declared are {sorted(slots)}")
    return _encode_vectors(header.fields(), vectors, slots)


def decode_theta(
    buffer: Any, slots: Slots, header: ThetaHeader, device: torch.device | str = "cpu"
) -> dict[str, Tensor]:
    """Return slot → vector [numel] in fresh, aligned, writable memory on ``device``, with one copy.

    ``buffer`` is a frame or the list of its parts. Raises ``RejectedError`` for damage, for other slots or layouts
    than ``slots``, and for the θ of another round than ``header``.
    """
    own = torch.device(device).type == "cpu"
    found, columns = decode(buffer, own=own)
    _check_header(found, header.fields())
    if columns.keys() != slots.keys():
        raise RejectedError(f"slots are {short(sorted(columns))}, expected {short(sorted(slots))}")
    _check_vectors(found, columns, slots, "exact")
    return {n: _landed(c[0], slots[n].layout.dtype, device, own) for n, c in columns.items()}


# Results --------------------------------------------------------------------------------------------------------------


def result_parts(result: Result, slots: Slots, header: ResultHeader, wire: str = "exact") -> list[pa.Buffer]:
    """Encode a shard's result as a frame in parts, like ``theta_parts``. The columns of records are [rows, …].

    With ``wire="bfloat16"`` gradient slots must have been rounded by ``ErrorFeedback.round``. Raises ``ValueError``
    where a contribution doesn't fit the declared slots, or where a dtype doesn't travel.
    """
    fields = {**header.fields(), "stats": _hex(header.stats)}
    if isinstance(result, Records):
        return encode_parts({"kind": "records", **fields}, result.columns)
    fields |= {"kind": "contribution", "weight": float(result.weight).hex(), "tasks": int(result.tasks)}
    return _encode_vectors({**fields, "metrics": _hex(result.metrics)}, result.slots, slots, wire)


def decode_result(buffer: Any, shard: Shard, slots: Slots, wire: str = "exact") -> tuple[Result, ResultHeader]:
    """Return the result of ``shard`` in fresh memory, and the header that its sender wrote.

    ``buffer`` is a frame or the list of its parts. ``wire`` is how gradient slots must have travelled; the vectors
    have the dtypes of their layouts again. A contribution may be of fewer tasks than the shard has (of none, with
    weight 0), and its values may be NaN or Inf: the scheduler judges both.

    Raises ``RejectedError`` for damage; for another run, meta-step, round, shard, function or task range, or a sum of
    other shards; for slots that are unknown, constant, or of another layout, dtype or length; for a weight that isn't
    finite and positive; for more tasks than the shard has, or records of another number of rows.
    """
    found, columns = decode(buffer, own=True)
    kind = found.get("kind")
    if kind not in ("contribution", "records"):
        raise RejectedError(f"kind is {short(kind)}, expected contribution or records")
    _check_header(found, _identity(shard))
    attempt, worker = _field(found, "attempt", int), _field(found, "worker", str)
    header = ResultHeader(shard, attempt, worker, _floats(found, "stats"))
    if kind == "contribution":
        return _contribution(found, columns, shard, slots, wire), header
    for column in columns.values():
        if column.shape[0] != shard.count:
            raise RejectedError(f"records have {column.shape[0]} rows, expected {shard.count}")
    return _records(columns), header


def _contribution(
    header: dict[str, Any], columns: Mapping[str, Tensor], shard: Shard, slots: Slots, wire: str
) -> Contribution:
    tasks, weight, metrics = _field(header, "tasks", int), _float(header, "weight"), _floats(header, "metrics")
    if not 0 <= tasks <= shard.count:
        raise RejectedError(f"tasks is {tasks}, expected 0 to {shard.count}")
    if not (math.isfinite(weight) and (weight > 0 if tasks else weight == 0)):
        raise RejectedError(f"weight is {weight}, expected a finite positive number (0 for no tasks)")
    for name in columns:
        if name not in slots:
            raise RejectedError(f"unknown slot {short(name)}; there are {', '.join(slots)}")
        if slots[name].rule == "constant":
            raise RejectedError(f"slot {name} is constant and takes no contribution")
    _check_vectors(header, columns, slots, wire)
    return Contribution(
        {n: _landed(c[0], slots[n].layout.dtype, "cpu", True) for n, c in columns.items()}, weight, tasks, metrics
    )


# Kept outputs ---------------------------------------------------------------------------------------------------------


def output_parts(output: Records, header: ResultHeader) -> list[pa.Buffer]:
    """Encode the output that a shard keeps for later rounds (trials: columns [rows, …]) as a frame in parts.

    The meta-step and the round in the header tell under which θ the output was computed.
    """
    return encode_parts({"kind": "output", **header.fields()}, output.columns)


def decode_output(buffer: Any, shard: Shard, device: torch.device | str = "cpu") -> Records:
    """Return the output that ``shard`` kept, in fresh memory on ``device``.

    Raises ``RejectedError`` for damage, and for the output of another shard.
    """
    own = torch.device(device).type == "cpu"
    header, columns = decode(buffer, own=own)
    _check_header(header, {"kind": "output", **_identity(shard)})
    return _records(columns, device, own)


# Pieces ---------------------------------------------------------------------------------------------------------------


def _identity(shard: Shard) -> dict[str, Any]:
    return {"shard": shard.index, **{name: getattr(shard, name) for name in _IDENTITY}}


def _encode_vectors(header: dict[str, Any], vectors: Vectors, slots: Slots, wire: str = "exact") -> list[pa.Buffer]:
    for name, vector in vectors.items():
        if name not in slots:
            raise ValueError(f"unknown slot {name!r}; there are {', '.join(slots)}")
        got = (vector.dtype, tuple(vector.shape))
        expected = (wire_dtype(slots[name], wire), (slots[name].layout.numel,))
        if got != expected:
            raise ValueError(f"slot {name} is {got[0]} {got[1]}, its layout {expected[0]} {expected[1]}")
    layouts = {name: slots[name].layout.fingerprint for name in vectors}
    return encode_parts({**header, "layouts": layouts}, {n: v.unsqueeze(0) for n, v in vectors.items()})


def _check_vectors(header: dict[str, Any], columns: Mapping[str, Tensor], slots: Slots, wire: str) -> None:
    layouts = _field(header, "layouts", dict)
    for name, column in columns.items():
        layout, dtype = slots[name].layout, wire_dtype(slots[name], wire)
        if column.dtype != dtype:
            raise RejectedError(f"slot {name} is {dtype_name(column.dtype)}, expected {dtype_name(dtype)}")
        if tuple(column.shape) != (1, layout.numel):
            raise RejectedError(f"slot {name} has shape {tuple(column.shape)}, expected (1, {layout.numel})")
        if layouts.get(name) != layout.fingerprint:
            raise RejectedError(f"slot {name} has layout {short(layouts.get(name))}, expected {layout.fingerprint}")


def _records(columns: Mapping[str, Tensor], device: torch.device | str = "cpu", own: bool = True) -> Records:
    return Records({n: _landed(c, c.dtype, device, own) for n, c in columns.items()})


def _landed(column: Tensor, dtype: torch.dtype, device: torch.device | str, own: bool) -> Tensor:
    """Return ``column`` on ``device`` in aligned memory.

    Where we ``own`` the memory and it is aligned, this is the column itself, else a copy.
    """
    if not own:
        return column.to(device, copy=True).to(dtype)
    if column.dtype == dtype and column.data_ptr() % 64 == 0:
        return column
    return fresh(column.numel() * dtype.itemsize).view(dtype).view(column.shape).copy_(column)


def _check_header(header: dict[str, Any], expected: Mapping[str, Any]) -> None:
    for name, value in expected.items():
        got = header.get(name)
        if type(got) is not type(value) or got != value:
            raise RejectedError(f"{name} is {short(got)}, expected {short(value)}")


def _field(header: dict[str, Any], name: str, kind: type) -> Any:
    value = header.get(name)
    if type(value) is not kind:
        raise RejectedError(f"{name} is {short(value)}, expected {kind.__name__}")
    return value


def _hex(values: Mapping[str, float]) -> dict[str, str]:
    return {name: float(value).hex() for name, value in values.items()}


def _float(header: dict[str, Any], name: str) -> float:
    text = _field(header, name, str)
    try:
        return float.fromhex(text)
    except (ValueError, OverflowError):
        raise RejectedError(f"{name} is {short(text)}, expected a hexadecimal float") from None


def _floats(header: dict[str, Any], name: str) -> dict[str, float]:
    values = _field(header, name, dict)
    return {key: _float(values, key) for key in values}
