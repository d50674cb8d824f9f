"""θ and the results of shards as framed Arrow buffers, and the checks at the border.

A vector is a one-row column, so that slots of unequal length share a record batch; records keep their rows. Floats in
the header are hexadecimal strings: exact, and JSON even where they are not finite.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import pyarrow as pa
import torch
from torch import Tensor

from metadist.core.round import Result, Shard
from metadist.core.state import Contribution, Records, Slot, is_finite
from metadist.wire.error_feedback import wire_dtype
from metadist.wire.frame import join
from metadist.wire.memory import fresh
from metadist.wire.stream import RejectedError, decode, dtype_name, encode_parts, short

__all__ = [
    "RejectedError",
    "decode_output",
    "decode_result",
    "decode_theta",
    "encode_result",
    "encode_theta",
    "output_parts",
    "result_parts",
    "theta_parts",
]

_IDENTITY = ("run", "meta_step", "round", "function", "split", "start", "count", "leaf", "seed", "key_step")


def encode_theta(
    state_slots: Mapping[str, Tensor], slots: Mapping[str, Slot], *, run: str, meta_step: int, round: int
) -> pa.Buffer:
    """θ (slot → vector [numel], any device) as one framed buffer, copied once. Pass a part of both to publish a part.

    Raises ``ValueError`` where the vectors are not those that ``slots`` declares.
    """
    return join(theta_parts(state_slots, slots, run=run, meta_step=meta_step, round=round))


def theta_parts(
    state_slots: Mapping[str, Tensor], slots: Mapping[str, Slot], *, run: str, meta_step: int, round: int
) -> list[pa.Buffer]:
    """The frame of ``encode_theta`` in parts, for a transport that copies them itself. A large vector on the CPU is a part
    as it lies, and must not change before it was copied (the receiver would refuse the frame)."""
    if state_slots.keys() != slots.keys():
        raise ValueError(f"slots are {sorted(state_slots)}, declared are {sorted(slots)}")
    header = {"kind": "theta", "run": run, "meta_step": meta_step, "round": round}
    return _encode_vectors(header, state_slots, slots)


def decode_theta(
    buffer: Any,
    slots: Mapping[str, Slot],
    *,
    device: torch.device | str = "cpu",
    run: str | None = None,
    meta_step: int | None = None,
    round: int | None = None,
) -> dict[str, Tensor]:
    """Slot → vector [numel] in fresh, aligned memory on ``device``: one copy. Writable, independent of ``buffer``, which
    is a frame or the list of its parts.

    Raises ``RejectedError`` for damage, for other slots or layouts than ``slots``, and for another ``run``,
    ``meta_step`` or ``round`` where these are given.
    """
    own = torch.device(device).type == "cpu"
    header, columns = decode(buffer, own=own)
    expected = {"kind": "theta", "run": run, "meta_step": meta_step, "round": round}
    _check_header(header, {k: v for k, v in expected.items() if v is not None})
    if columns.keys() != slots.keys():
        raise RejectedError(f"slots are {short(sorted(columns))}, expected {short(sorted(slots))}")
    return _vectors(header, columns, slots, device, own)


def encode_result(
    result: Result,
    shard: Shard,
    slots: Mapping[str, Slot],
    *,
    attempt: int,
    worker: str,
    stats: Mapping[str, float] | None = None,
    wire: str = "exact",
) -> pa.Buffer:
    """A shard's result as one framed buffer, copied once. Records' columns are [rows, …].

    Raises ``ValueError`` where a contribution doesn't fit the declared slots or a dtype doesn't travel.
    """
    return join(result_parts(result, shard, slots, attempt=attempt, worker=worker, stats=stats, wire=wire))


def result_parts(
    result: Result,
    shard: Shard,
    slots: Mapping[str, Slot],
    *,
    attempt: int,
    worker: str,
    stats: Mapping[str, float] | None = None,
    wire: str = "exact",
) -> list[pa.Buffer]:
    """The frame of ``encode_result`` in parts, as ``theta_parts``. With ``wire="bfloat16"`` gradient slots must have been
    rounded (by ``ErrorFeedback.round``)."""
    header: dict[str, Any] = {**_identity(shard), "attempt": attempt, "worker": worker, "stats": _hex(stats or {})}
    if isinstance(result, Records):
        return encode_parts({"kind": "records", **header}, result.columns)
    header |= {"kind": "contribution", "weight": float(result.weight).hex(), "tasks": int(result.tasks)}
    return _encode_vectors({**header, "metrics": _hex(result.metrics)}, result.slots, slots, wire)


def decode_result(
    buffer: Any,
    shard: Shard,
    slots: Mapping[str, Slot],
    *,
    reduce: bool | None = None,
    finite: bool = True,
    partial: bool = False,
    rows: int | None = None,
    wire: str = "exact",
    device: torch.device | str = "cpu",
) -> tuple[Result, dict[str, Any]]:
    """The result of ``shard``, in fresh memory on ``device``, and ``{kind, attempt, worker, stats}`` of its sender.
    ``buffer`` is a frame or the list of its parts.

    ``reduce``: a contribution (True) or records (False) are expected; None takes either.
    ``finite``: refuse contributions whose slots hold NaN or Inf. Metrics may hold them: they don't enter θ.
    ``partial``: a contribution may be of fewer tasks than the shard has (dropped ones), even of none, with weight 0.
    ``rows``: how many rows records must have, if known.
    ``wire``: what gradient slots must have travelled as; they are restored to their layout's dtype.

    Raises ``RejectedError`` for damage; another run, meta-step, round, shard, function or task range, or a sum of other
    shards; slots that are unknown, constant, or of another layout, dtype or length; a weight that isn't finite and
    positive; a wrong number of tasks.
    """
    own = torch.device(device).type == "cpu"
    header, columns = decode(buffer, own=own)
    kind = header.get("kind")
    allowed = {None: ("contribution", "records"), True: ("contribution",), False: ("records",)}[reduce]
    if kind not in allowed:
        raise RejectedError(f"kind is {short(kind)}, expected {' or '.join(allowed)}")
    _check_header(header, _identity(shard))
    sender = {
        "kind": kind,
        "attempt": _field(header, "attempt", int),
        "worker": _field(header, "worker", str),
        "stats": _floats(header, "stats"),
    }
    if kind == "records":
        if rows is not None and any(c.shape[0] != rows for c in columns.values()):
            raise RejectedError(f"records have {next(iter(columns.values())).shape[0]} rows, expected {rows}")
        return Records({n: _landed(c, c.dtype, device, own) for n, c in columns.items()}), sender
    tasks, weight, metrics = _field(header, "tasks", int), _float(header, "weight"), _floats(header, "metrics")
    if tasks != shard.count and not (partial and 0 <= tasks < shard.count):
        raise RejectedError(f"tasks is {tasks}, expected {shard.count}")
    if not (math.isfinite(weight) and (weight > 0 if tasks else weight == 0)):
        raise RejectedError(f"weight is {weight}, expected a finite positive number (0 for no tasks)")
    for name in columns:
        if name not in slots:
            raise RejectedError(f"unknown slot {short(name)}; there are {', '.join(slots)}")
        if slots[name].rule == "constant":
            raise RejectedError(f"slot {name} is constant and takes no contribution")
    vectors = _vectors(header, columns, slots, device, own, wire)
    if finite and (bad := [n for n, v in vectors.items() if not is_finite(v)]):
        raise RejectedError(f"NaN or Inf in slot {', '.join(bad)}")
    return Contribution(vectors, weight, tasks, metrics), sender


def output_parts(output: Records, shard: Shard, *, attempt: int, worker: str) -> list[pa.Buffer]:
    """What ``shard`` keeps for later rounds (trials, say: [rows, …] columns), as a frame in parts. Its meta-step and round say
    under which θ it came about."""
    return encode_parts({"kind": "output", **_identity(shard), "attempt": attempt, "worker": worker}, output.columns)


def decode_output(buffer: Any, shard: Shard, *, device: torch.device | str = "cpu") -> Records:
    """The output that ``shard`` kept, in fresh memory on ``device``. Raises ``RejectedError`` for damage, and for the output
    of another shard."""
    own = torch.device(device).type == "cpu"
    header, columns = decode(buffer, own=own)
    _check_header(header, {"kind": "output", **_identity(shard)})
    return Records({n: _landed(c, c.dtype, device, own) for n, c in columns.items()})


def _identity(shard: Shard) -> dict[str, Any]:
    return {"shard": shard.index, **{name: getattr(shard, name) for name in _IDENTITY}}


def _encode_vectors(
    header: dict[str, Any], vectors: Mapping[str, Tensor], slots: Mapping[str, Slot], wire: str = "exact"
) -> list[pa.Buffer]:
    for name, vector in vectors.items():
        if name not in slots:
            raise ValueError(f"unknown slot {name!r}; there are {', '.join(slots)}")
        got, expected = (
            (vector.dtype, tuple(vector.shape)),
            (wire_dtype(slots[name], wire), (slots[name].layout.numel,)),
        )
        if got != expected:
            raise ValueError(f"slot {name} is {got[0]} {got[1]}, its layout {expected[0]} {expected[1]}")
    layouts = {name: slots[name].layout.fingerprint for name in vectors}
    return encode_parts({**header, "layouts": layouts}, {n: v.unsqueeze(0) for n, v in vectors.items()})


def _vectors(
    header: dict[str, Any],
    columns: Mapping[str, Tensor],
    slots: Mapping[str, Slot],
    device: torch.device | str,
    own: bool,
    wire: str = "exact",
) -> dict[str, Tensor]:
    layouts = _field(header, "layouts", dict)
    for name, column in columns.items():
        layout, dtype = slots[name].layout, wire_dtype(slots[name], wire)
        if column.dtype != dtype:
            raise RejectedError(f"slot {name} is {dtype_name(column.dtype)}, expected {dtype_name(dtype)}")
        if tuple(column.shape) != (1, layout.numel):
            raise RejectedError(f"slot {name} has shape {tuple(column.shape)}, expected (1, {layout.numel})")
        if layouts.get(name) != layout.fingerprint:
            raise RejectedError(f"slot {name} has layout {short(layouts.get(name))}, expected {layout.fingerprint}")
    return {n: _landed(c[0], slots[n].layout.dtype, device, own) for n, c in columns.items()}


def _landed(column: Tensor, dtype: torch.dtype, device: torch.device | str, own: bool) -> Tensor:
    """``column`` on ``device`` in aligned memory: itself, where it lies so in a copy that we ``own``; else a copy."""
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
