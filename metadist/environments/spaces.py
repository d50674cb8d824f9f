"""Convert between Gymnasium's spaces and arrays. This module imports Gymnasium only inside functions."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np

from metadist.core.errors import ConfigError
from metadist.rl.environment import Actions, Continuous, Discrete


class Misbehaved(ValueError):
    """An environment returned an invalid value; the message names the value and the expected ones."""


@dataclass(frozen=True)
class Spaces:
    """The spaces of the environment ``name``: observations become vectors [O], actions are one choice or a vector [A].

    The policy's action for a bounded space is in [−1, 1] and is clipped to it, then scaled to the bounds. An unbounded
    action reaches the environment unchanged.
    """

    name: str
    observation: Any
    action: Any

    def __post_init__(self) -> None:
        from gymnasium import spaces

        if isinstance(self.action, spaces.Box):
            if np.isfinite(self.action.low).any() != np.isfinite(self.action.high).all():
                raise ConfigError(
                    f"environment {self.name}: action space {self.action} is bounded in part; expected bounds "
                    "everywhere or nowhere"
                )
        elif not isinstance(self.action, spaces.Discrete):
            raise ConfigError(f"environment {self.name}: action space {self.action}; expected a Box or Discrete")
        if not isinstance(self.observation, spaces.Space) or not self.observation.is_np_flattenable:
            raise ConfigError(
                f"environment {self.name}: observation space {self.observation} can't become a vector; expected a "
                "space that Gymnasium can flatten, for example a Box"
            )

    @cached_property
    def observation_size(self) -> int:
        from gymnasium.spaces.utils import flatdim

        return int(flatdim(self.observation))

    @cached_property
    def actions(self) -> Actions:
        return Continuous(int(np.prod(self.action.shape))) if self._bounds is not None else Discrete(int(self.action.n))

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
    def _symmetric(self) -> bool:
        """Whether an action in [−1, 1] needs no scaling."""
        assert self._bounds is not None
        return bool((self._bounds[0] == -1).all() and (self._bounds[1] == 1).all())

    def observed(self, value: Any) -> Any:
        """Convert an observation to an array [O] of numbers. Raises Misbehaved where it is not in the space."""
        if self._box is None:
            return self._flattened(value)
        array = np.asarray(value)
        if array.dtype.kind not in "fiub":
            raise Misbehaved(f"the observation is of type {array.dtype}; expected numbers")
        if array.shape != self._box:
            raise Misbehaved(
                f"the observation has shape {list(array.shape)}; expected {list(self._box)}, as observation_space says"
            )
        return array.reshape(-1)

    def _flattened(self, value: Any) -> Any:
        from gymnasium.spaces.utils import flatten

        if value not in self.observation:
            raise Misbehaved(f"the observation {str(value)[:80]} is not in {self.observation}")
        return flatten(self.observation, value)

    def taken(self, actions: Any) -> Any:
        """Convert a policy's actions, [B] int64 or [B, A] float32, to actions of the environment's ``step``."""
        if self._bounds is None:
            return [action + int(self.action.start) for action in actions.tolist()]
        low, high = self._bounds
        actions = actions.reshape(-1, *self.action.shape)
        if not np.isfinite(low).all():
            return actions
        actions = np.clip(actions, -1.0, 1.0)
        return actions if self._symmetric else low + (actions + np.float32(1)) * np.float32(0.5) * (high - low)


def number(value: Any, what: str) -> float:
    """Return ``value`` as a float. Raises Misbehaved where it is not one number; ``what`` names it."""
    try:
        array = np.asarray(value)
        if array.size == 1 and array.dtype.kind in "fiub":
            return float(array.reshape(()))
    except (TypeError, ValueError):
        pass
    raise Misbehaved(f"{what} is {str(value)[:80]!r} ({type(value).__name__}); expected a number")
