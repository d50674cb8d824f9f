"""Inputs, targets and predictions: one tensor, or a dict or tuple of such, nested at will.

A tensor within has a name: keys and places joined by dots ("ids", "0", "image.mask"); a single tensor's name is "".
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
import torch.utils._pytree as pytree
from torch import Tensor

from metadist.core.errors import ConfigError, first_line

Tree = Any
"""A tensor, or a dict, tuple or list of trees. A dict's keys are names of parameters of the model's ``forward``."""


def named(tree: Tree, where: str = "") -> dict[str, Tensor]:
    """Return the tensors of ``tree`` by name. ConfigError, which says ``where``, for anything else within it."""
    if isinstance(tree, Tensor):
        return {"": tree}
    if isinstance(tree, Mapping):
        for key in tree:
            if not isinstance(key, str) or not key.isidentifier():
                raise ConfigError(f"{where or 'a dict'} has the key {key!r}; expected names such as 'ids'")
        parts = dict(tree)
    elif type(tree) in (tuple, list):  # a named tuple is an object of its own
        parts = {str(place): part for place, part in enumerate(tree)}
    else:
        raise ConfigError(f"{where or 'a tree'} is {type(tree).__name__}; expected a tensor, dict or tuple of tensors")
    if not parts:
        raise ConfigError(f"{where or 'a tree'} is an empty {type(tree).__name__}; expected tensors in it")
    return {
        f"{name}.{rest}" if rest else name: tensor
        for name, part in parts.items()
        for rest, tensor in named(part, f"{where}.{name}" if where else name).items()
    }


def arrays(tree: Tree) -> Tree:
    """Return ``tree`` with tensors in place of arrays, and of whatever else ``torch.as_tensor`` takes.

    ConfigError for anything else within it.
    """
    if isinstance(tree, Mapping):
        return {name: arrays(part) for name, part in tree.items()}
    if type(tree) is tuple:
        return tuple(map(arrays, tree))
    try:
        return torch.as_tensor(tree)
    except (TypeError, ValueError, RuntimeError) as error:
        raise ConfigError(
            f"expected a tensor, an array of numbers, or a dict or tuple of such, got {type(tree).__name__} "
            f"({first_line(error)})"
        ) from None


def of_names(tensors: Mapping[str, Any]) -> Tree:
    """Return the tree of which ``named`` returns ``tensors``. ValueError where there is none."""
    if list(tensors) == [""]:
        return tensors[""]
    parts: dict[str, dict[str, Any]] = {}
    for name, tensor in tensors.items():
        first, _, rest = name.partition(".")
        parts.setdefault(first, {})[rest] = tensor
    if not parts or "" in parts:
        raise ValueError(f"no tree has the names {', '.join(map(repr, tensors))}")
    trees = {name: of_names(part) for name, part in parts.items()}
    if all(name.isdecimal() for name in trees):
        if trees.keys() != {str(place) for place in range(len(trees))}:
            raise ValueError(f"places {', '.join(trees)} of a tuple")
        return tuple(trees[str(place)] for place in range(len(trees)))
    return trees


def as_lists(tree: Tree) -> Any:
    """Return tensors as nested lists of numbers, in a dict for a dict and in a list for a tuple."""
    if isinstance(tree, Tensor):
        return tree.tolist()
    if isinstance(tree, Mapping):
        return {name: as_lists(part) for name, part in tree.items()}
    return [as_lists(part) for part in tree]


def mapped(function: Callable[[Tensor], Any], tree: Tree) -> Tree:
    """Apply ``function`` to every tensor."""
    return pytree.tree_map(function, tree)


def at(tree: Tree, index: int) -> Tree:
    """Return row ``index`` of every tensor."""
    return mapped(lambda t: t[index], tree)


def column(tree: Tree, index: int) -> Tree:
    """Return column ``index`` of every tensor [rows, columns, …], contiguous in memory."""
    return mapped(lambda t: t[:, index].contiguous(), tree)


def joined(function: Callable[[list[Tensor]], Tensor], trees: Sequence[Tree]) -> Tree:
    """Apply ``function`` to the lists of corresponding tensors of trees of one structure."""
    return pytree.tree_map(lambda *tensors: function(list(tensors)), *trees)


def stacked(trees: Sequence[Tree]) -> Tree:
    """Stack trees of one structure along a new first dimension."""
    return joined(torch.stack, trees)


def first(tree: Tree) -> Tensor:
    """Return the first tensor; all have the same rows."""
    found: Tensor = pytree.tree_leaves(tree)[0]
    return found


def shapes(tree: Tree) -> tuple[tuple[int, ...], ...]:
    """Return the shapes of all tensors."""
    return tuple(tuple(t.shape) for t in pytree.tree_leaves(tree))


def shown(tree: Tree) -> str:
    """Return the shapes for a message: [4, 2], or {ids: [4, 7], mask: [4, 7]}."""
    if isinstance(tree, Tensor):
        return str(list(tree.shape))
    try:
        tensors = named(tree)
    except ConfigError:
        return type(tree).__name__
    return "{" + ", ".join(f"{name}: {list(t.shape)}" for name, t in tensors.items()) + "}"
