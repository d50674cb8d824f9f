"""Contributions in half the bytes: rounded to bfloat16, the error is added to the worker's next contribution."""

from __future__ import annotations

from collections.abc import Hashable, Mapping
from dataclasses import replace

import torch
from torch import Tensor

from metadist.core.state import Contribution, Slot, is_finite
from metadist.wire.memory import fresh

#: how contributions travel: bit for bit, or ``gradient`` slots in half precision
WIRES = ("exact", "bfloat16")


def wire_dtype(slot: Slot, wire: str) -> torch.dtype:
    """Return the dtype of a contribution to ``slot`` on the wire."""
    rounded = wire == "bfloat16" and slot.rule == "gradient" and slot.layout.dtype in (torch.float32, torch.float64)
    return torch.bfloat16 if rounded else slot.layout.dtype


class ErrorFeedback:
    """One worker's rounding errors: Σ sent + residual = Σ contributions, over the contributions that were counted.

    A single rounding is off by up to 0.4 %, and always in the same direction where gradients are alike. With error
    feedback, the error of a long sum stays that of its last term. Every worker has a residual of its own, so results
    depend on which worker computed which shard: this is for runs that gave up exactness.

    A contribution may be sent and not be counted, since a backup was faster. ``settle`` tells the sender, which then
    undoes its effect on the residual.
    """

    def __init__(self, slots: Mapping[str, Slot]) -> None:
        self._slots = slots
        self._residual: dict[str, Tensor] = {}
        self._errors: dict[Hashable, dict[str, Tensor]] = {}

    def round(self, key: Hashable, contribution: Contribution) -> Contribution:
        """Return ``contribution`` plus the residual, rounded for the wire. ``key`` names it to ``settle``.

        A contribution with NaN, Inf or values that overflow is rounded without the residual and does not change it:
        the driver will refuse the contribution.
        """
        vectors = {n: v for n, v in contribution.slots.items() if wire_dtype(self._slots[n], "bfloat16") != v.dtype}
        sent = self._carry(key, vectors) if contribution.is_finite() else None
        if sent is None:
            sent = {n: v.to(torch.bfloat16) for n, v in vectors.items()}
        return replace(contribution, slots={**contribution.slots, **sent})

    def _carry(self, key: Hashable, vectors: dict[str, Tensor]) -> dict[str, Tensor] | None:
        # Every pass over a large vector uses memory that was used before: fresh pages would cost more than the sums.
        sent, residual, error = {}, {}, {}
        for name, vector in vectors.items():
            total, back = _like(vector, vector.dtype), _like(vector, vector.dtype)
            torch.add(vector, self._residual[name], out=total) if name in self._residual else total.copy_(vector)
            sent[name] = _like(vector, torch.bfloat16).copy_(total)
            if not is_finite(sent[name]):
                return None
            back.copy_(sent[name])
            residual[name] = total.sub_(back)
            error[name] = torch.sub(vector, back, out=back)
        self._errors[key] = error
        self._residual.update(residual)
        return sent

    def settle(self, key: Hashable, counted: bool) -> None:
        """Tell whether the contribution ``key`` was summed. Until then its error is kept."""
        errors = self._errors.pop(key, {})
        if not counted:
            for name, error in errors.items():
                self._residual[name].sub_(error)

    def residual(self, name: str) -> Tensor:
        """Return the rounding error of slot ``name`` that has not been sent yet."""
        layout = self._slots[name].layout
        return self._residual[name] if name in self._residual else torch.zeros(layout.numel, dtype=layout.dtype)


def _like(vector: Tensor, dtype: torch.dtype) -> Tensor:
    return fresh(vector.numel() * dtype.itemsize).view(dtype)
