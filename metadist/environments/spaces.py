"""Convert between Gymnasium's spaces and arrays. This module imports Gymnasium only inside functions."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np

from metadist.core.errors import ConfigError
from metadist.rl.environment import Actions, Continuous, Discrete


class Misbehaved(ValueError):
    """An environment returned an invalid value; the message names the value and the expected ones."""


#: the largest number of joint actions of a MultiDiscrete or MultiBinary space
MOST_CHOICES = 1024


@dataclass(frozen=True)
class Spaces:
    """The spaces of the environment ``name``: observations become vectors [O], actions are one choice or a vector [A].

    The policy's action for a bounded space is clipped to [−1, 1], scaled to the bounds, and clipped to them, because
    scaling rounds. An unbounded action reaches the environment unchanged. An action of several choices
    (MultiDiscrete, MultiBinary) is one choice among all their combinations.
    """

    name: str
    observation: Any
    action: Any

    def __post_init__(self) -> None:
        from gymnasium import spaces

        if isinstance(self.action, spaces.Box):
            self._check_box()
        elif isinstance(self.action, (spaces.MultiDiscrete, spaces.MultiBinary)):
            if self._combinations > MOST_CHOICES:
                raise ConfigError(
                    f"environment {self.name}: action space {self.action} has {self._combinations} combinations; "
                    f"expected {MOST_CHOICES} or less. Wrap the environment to offer fewer, or a Box"
                )
        elif not isinstance(self.action, spaces.Discrete):
            raise ConfigError(
                f"environment {self.name}: action space {self.action}; expected a Box, Discrete, MultiDiscrete or "
                "MultiBinary"
            )
        if not isinstance(self.observation, spaces.Space) or not self.observation.is_np_flattenable:
            raise ConfigError(
                f"environment {self.name}: observation space {self.observation} can't become a vector; expected a "
                "space that Gymnasium can flatten, for example a Box"
            )

    def _check_box(self) -> None:
        """Refuse a Box of actions that a Gaussian policy cannot fill."""
        low, high, named = self.action.low, self.action.high, f"environment {self.name}: action space {self.action}"
        if self.action.dtype.kind != "f":
            raise ConfigError(
                f"{named} has dtype {self.action.dtype}; expected floats (for integers, Discrete or MultiDiscrete)"
            )
        bounded = np.isfinite(np.stack([low, high]))
        if bounded.any() != bounded.all():
            raise ConfigError(f"{named} is bounded in part; expected bounds everywhere or nowhere")
        with np.errstate(over="ignore"):
            if bounded.all() and not np.isfinite(high.astype(np.float32) - low.astype(np.float32)).all():
                raise ConfigError(f"{named} is wider than float32 can express; use -inf and inf for no bounds")

    @cached_property
    def observation_size(self) -> int:
        from gymnasium.spaces.utils import flatdim

        return int(flatdim(self.observation))

    @cached_property
    def actions(self) -> Actions:
        if self._bounds is not None:
            return Continuous(int(np.prod(self.action.shape)))
        return Discrete(int(self.action.n) if self._choices is None else self._combinations)

    @cached_property
    def _box(self) -> tuple[int, ...] | None:
        """Return the shape of an observation that is one array, or None."""
        from gymnasium import spaces

        return self.observation.shape if isinstance(self.observation, spaces.Box) else None

    @cached_property
    def _bounds(self) -> tuple[Any, Any] | None:
        from gymnasium import spaces

        if not isinstance(self.action, spaces.Box):
            return None
        return self.action.low.astype(np.float32), self.action.high.astype(np.float32)

    @cached_property
    def _allowed(self) -> tuple[Any, Any]:
        """Return the least and the greatest action within the bounds, in the dtype of the environment's actions."""
        return _inwards(self.action.low, self._dtype, 1), _inwards(self.action.high, self._dtype, -1)

    @cached_property
    def _dtype(self) -> Any:
        """Return float32, or the dtype of the action space where float32 would be none of its values."""
        return np.dtype(np.float32) if np.can_cast(np.float32, self.action.dtype) else self.action.dtype

    @cached_property
    def _symmetric(self) -> bool:
        """Whether an action in [−1, 1] needs no scaling."""
        assert self._bounds is not None
        return bool((self._bounds[0] == -1).all() and (self._bounds[1] == 1).all())

    @cached_property
    def _choices(self) -> Any:
        """Return the number of values of each part of an action with several parts, or None."""
        from gymnasium import spaces

        if isinstance(self.action, spaces.MultiDiscrete):
            return self.action.nvec
        return np.full(self.action.shape, 2) if isinstance(self.action, spaces.MultiBinary) else None

    @cached_property
    def _first(self) -> Any:
        """Return the first value of each part of an action with several parts."""
        from gymnasium import spaces

        return self.action.start if isinstance(self.action, spaces.MultiDiscrete) else self.action.dtype.type(0)

    @property
    def _combinations(self) -> int:
        return math.prod(self._choices.flatten().tolist())

    def observed(self, value: Any) -> Any:
        """Convert an observation to an array [O] of numbers. Raises Misbehaved where it does not suit the space.

        Numbers of a Box may have another dtype and exceed the bounds: the policy reads them as float32.
        """
        if self._box is None:
            return _vector(self.observation, value, "the observation")
        return _numbers(value, self._box, "the observation")

    def taken(self, actions: Any) -> Any:
        """Convert a policy's actions, [B] int64 or [B, A] float32, to actions of the environment's ``step``."""
        if self._choices is not None:
            parts = np.unravel_index(actions, self._choices.flatten())
            return np.stack(parts, -1).reshape(-1, *self._choices.shape).astype(self.action.dtype) + self._first
        if self._bounds is None:
            return [action + int(self.action.start) for action in actions.tolist()]
        low, high = self._bounds
        actions = actions.reshape(-1, *self.action.shape)
        if not np.isfinite(low).all():
            return actions.astype(self._dtype, copy=False)
        actions = np.clip(actions, -1.0, 1.0)
        if not self._symmetric:
            actions = low + (actions + np.float32(1)) * np.float32(0.5) * (high - low)
        return np.clip(actions.astype(self._dtype, copy=False), *self._allowed)


def _inwards(bound: Any, dtype: Any, direction: int) -> Any:
    """Round a finite bound to ``dtype``, upwards (``direction`` 1) or downwards (−1)."""
    rounded = bound.astype(dtype)
    outside = (rounded.astype(bound.dtype) - bound) * direction < 0
    return np.where(outside, np.nextafter(rounded, np.array(direction * np.inf, dtype)), rounded)


def _vector(space: Any, value: Any, what: str) -> Any:
    """Convert a value of ``space`` to an array [n], in the order of Gymnasium's ``flatten``; ``what`` names it."""
    from gymnasium import spaces
    from gymnasium.spaces.utils import flatten

    if isinstance(space, spaces.Box):
        return _numbers(value, space.shape, what)
    if isinstance(space, spaces.Dict):
        if not isinstance(value, Mapping) or value.keys() != space.spaces.keys():
            found = ", ".join(map(str, value)) if isinstance(value, Mapping) else f"a {type(value).__name__}"
            raise Misbehaved(f"{what} has the parts {found}; expected {', '.join(space.spaces)}")
        parts = {f"{what}'s part '{name}'": (part, value[name]) for name, part in space.spaces.items()}
        return np.concatenate([_vector(part, v, named) for named, (part, v) in parts.items()])
    if isinstance(space, spaces.Tuple):
        if not isinstance(value, (tuple, list)) or len(value) != len(space.spaces):
            raise Misbehaved(f"{what} is {str(value)[:80]}; expected a tuple of {len(space.spaces)} parts")
        pairs = zip(space.spaces, value)
        return np.concatenate([_vector(part, v, f"{what}'s part {i}") for i, (part, v) in enumerate(pairs)])
    if isinstance(space, (spaces.Discrete, spaces.MultiDiscrete, spaces.MultiBinary)):
        value = _integers(value, space.dtype)
    if value not in space:
        raise Misbehaved(f"{what} is {str(value)[:80]}; expected a value of {space}")
    return flatten(space, value)


def _numbers(value: Any, shape: tuple[int, ...], what: str) -> Any:
    """Return numbers of ``shape`` as an array [n]."""
    array = np.asarray(value)
    if array.dtype.kind not in "fiub":
        raise Misbehaved(f"{what} is of type {array.dtype}; expected numbers")
    if array.shape != shape:
        raise Misbehaved(f"{what} has shape {list(array.shape)}; expected {list(shape)}, as observation_space says")
    return array.reshape(-1)


def _integers(value: Any, dtype: Any) -> Any:
    """Return whole numbers of any type, also in lists, as ``dtype``; anything else unchanged."""
    array = np.asarray(value)
    if array.dtype.kind not in "fiub" or not np.isfinite(array).all():
        return value
    whole = array.astype(dtype)
    return whole if np.array_equal(whole, array) else value


def number(value: Any, what: str) -> float:
    """Return ``value`` as a float. Raises Misbehaved where it is not one number; ``what`` names it."""
    try:
        array = np.asarray(value)
        if array.size == 1 and array.dtype.kind in "fiub":
            return float(array.reshape(()))
    except (TypeError, ValueError):
        pass
    raise Misbehaved(f"{what} is {str(value)[:80]!r} ({type(value).__name__}); expected a number")
