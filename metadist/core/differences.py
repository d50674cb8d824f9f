"""Compare named tensors bit for bit, and say in words where they differ."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from metadist.core.task import Task
from metadist.core.tree import Tree, named


def by_name(task: Task) -> dict[str, Tensor]:
    """Return the tensors of a task: ``support.x``, ``support.y``, …; masks and ways only where there are some.

    A tensor in a dict or tuple x is ``support.x.ids``, ``support.x.0``.
    """
    sets = {"support": task.support, "query": task.query}
    found = {f"{name}.{part}": getattr(e, part) for name, e in sets.items() for part in ("x", "y", "mask")}
    return flat({name: tree for name, tree in {**found, "ways": task.ways}.items() if tree is not None})


def flat(trees: Mapping[str, Tree]) -> dict[str, Tensor]:
    """Return the tensors of ``trees`` by the name of the tree and their own within it."""
    return {
        f"{name}.{rest}" if rest else name: tensor
        for name, tree in trees.items()
        for rest, tensor in named(tree, name).items()
    }


def difference(first: Mapping[str, Tensor], second: Mapping[str, Tensor], rounding: float = 0.0) -> str | None:
    """Return where two sets of tensors differ in a bit, dtype, shape or name; None where they are the same. NaN equals
    NaN. Floating-point values may differ by ``rounding`` times the largest one of their tensor."""
    if first.keys() != second.keys():
        return f"there is {', '.join(sorted(first.keys() ^ second.keys()))} in one of two results only"
    for name, a in first.items():
        b = second[name]
        if (a.dtype, a.shape) != (b.dtype, b.shape):
            return f"{name} is {a.dtype} {list(a.shape)} in one result and {b.dtype} {list(b.shape)} in the other"
        differs = (a != b) & ~((a != a) & (b != b))
        if rounding and a.is_floating_point() and a.numel():
            differs &= ~((a - b).abs() <= rounding * a.abs().nan_to_num().amax())
        if bool(differs.any()):
            index = tuple(differs.nonzero()[0].tolist())
            place = f"[{', '.join(map(str, index))}]" if index else ""
            return f"{name}{place} is {a[index].item():.9g} in one result and {b[index].item():.9g} in the other"
    return None


def relative_error(found: Tensor, expected: Tensor) -> float:
    """Return ‖found − expected‖ / ‖expected‖; ‖found‖ where ``expected`` is zero."""
    size = float(expected.double().norm())
    return float((found.double() - expected.double()).norm()) / (size or 1.0)


def apart_by(found: Mapping[str, Tensor], expected: Mapping[str, Tensor], limit: float) -> str | None:
    """Return the name and relative error of the first slot whose error is above ``limit``, in words, or None."""
    for name, vector in expected.items():
        error = relative_error(found[name], vector)
        if not error <= limit:
            return f"slot '{name}' differs in float64 by {error:.1e} of the norm {float(vector.norm()):.3g}"
    return None


def not_finite(tensors: Mapping[str, Tensor]) -> str | None:
    """Return the name of the first tensor that has NaN or Inf, or None."""
    found = [name for name, t in tensors.items() if t.is_floating_point() and not bool(torch.isfinite(t).all())]
    return found[0] if found else None
