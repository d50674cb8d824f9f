"""Find the slots that an algorithm contributes to itself, besides the gradient of its objective."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from metadist.core.algorithm import Algorithm, TaskContext, Theta
from metadist.core.errors import ConfigError
from metadist.core.model import BoundModel
from metadist.core.parameters import Layout
from metadist.core.state import Slot
from metadist.core.task import Task


def receivers(algorithm: Algorithm, slots: Mapping[str, Slot]) -> frozenset[str]:
    """Return the slots that the contributions of ``algorithm`` go to. ConfigError for slots that cannot receive any."""
    open_slots = frozenset(name for name, slot in slots.items() if slot.rule != "constant")
    chosen = open_slots if algorithm.receivers is None else frozenset(algorithm.receivers)
    if closed := sorted(chosen - open_slots):
        raise ConfigError(
            f"algorithm '{type(algorithm).__name__}' names '{closed[0]}' in receivers, which is no slot that takes "
            f"contributions; expected some of {', '.join(sorted(open_slots))}"
        )
    return chosen


def given_slots(
    algorithm: Algorithm, slots: Mapping[str, Slot], model: BoundModel, theta: Theta, task: Task, context: TaskContext
) -> frozenset[str]:
    """Return the names that ``contribute`` gives for one ``task``; those of all tasks are the same.

    ConfigError where it gives another slot than a receiver or tensors of another layout, or leaves out an average.
    """
    receiving = receivers(algorithm, slots)
    found: Mapping[str, Mapping[str, Tensor]] = {}
    if algorithm.contribution != "gradient":
        with torch.no_grad():
            trajectory = algorithm.adapt(model, theta, task.support, context)
            found = algorithm.contribute(model, theta, trajectory, task, context)
    named = f"algorithm: {'delta' if algorithm.contribution == 'delta' else 'contribute'} of "
    named += f"'{type(algorithm).__name__}'"
    for name, values in found.items():
        if name not in receiving:
            raise ConfigError(
                f"{named} gives slot '{name}', which takes no contribution; expected some of "
                f"{', '.join(sorted(receiving))}"
            )
        if (given := _shapes(Layout.of(values))) != (wanted := _shapes(slots[name].layout)):
            odd = next(n for n in (*wanted, *given) if given.get(n) != wanted.get(n))
            raise ConfigError(
                f"{named} gives {_shown(given, odd)} of slot '{name}', which has {_shown(wanted, odd)}; contribute one "
                "tensor for each parameter of a slot, under its name and of its shape"
            )
    missing = sorted(n for n in receiving - found.keys() if slots[n].rule == "average")
    if missing:
        raise ConfigError(f"{named} leaves out slot '{missing[0]}' with rule average, which nothing else changes")
    return frozenset(found)


def _shapes(layout: Layout) -> dict[str, tuple[int, ...]]:
    return dict(zip(layout.names, layout.shapes))


def _shown(shapes: Mapping[str, tuple[int, ...]], name: str) -> str:
    return f"'{name}' {list(shapes[name])}" if name in shapes else f"no '{name}'"
