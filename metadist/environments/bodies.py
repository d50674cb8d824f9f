"""Define Gymnasium's robots with the rewards of meta-learning tasks.

This module imports MuJoCo: import it only where a robot is built.
"""

from __future__ import annotations

from typing import Any

from gymnasium.envs.mujoco.ant_v5 import AntEnv
from gymnasium.envs.mujoco.half_cheetah_v5 import HalfCheetahEnv


class CheetahAtSpeed(HalfCheetahEnv):
    """A cheetah that runs at the speed ``task``, in metres a second."""

    task = 0.0

    def _get_rew(self, x_velocity: float, action: Any) -> Any:
        return super()._get_rew(-abs(x_velocity - self.task), action)


class CheetahInDirection(HalfCheetahEnv):
    """A cheetah that runs forwards where ``task`` is 1 and backwards where it is −1."""

    task = 1.0

    def _get_rew(self, x_velocity: float, action: Any) -> Any:
        return super()._get_rew(self.task * x_velocity, action)


class AntInDirection(AntEnv):
    """An ant that runs forwards where ``task`` is 1 and backwards where it is −1."""

    task = 1.0

    def _get_rew(self, x_velocity: float, action: Any) -> Any:
        return super()._get_rew(self.task * x_velocity, action)
