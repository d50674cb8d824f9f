"""Gymnasium's bodies with rewards of our own. Imports MuJoCo: to be imported by whoever builds one."""

from __future__ import annotations

from typing import Any

from gymnasium.envs.mujoco.ant_v5 import AntEnv
from gymnasium.envs.mujoco.half_cheetah_v5 import HalfCheetahEnv


class CheetahAtSpeed(HalfCheetahEnv):
    """``task``: the speed to run at."""

    task = 0.0

    def _get_rew(self, x_velocity: float, action: Any) -> Any:
        return super()._get_rew(-abs(x_velocity - self.task), action)


class CheetahInDirection(HalfCheetahEnv):
    """``task``: 1 to run forwards, −1 to run backwards."""

    task = 1.0

    def _get_rew(self, x_velocity: float, action: Any) -> Any:
        return super()._get_rew(self.task * x_velocity, action)


class AntInDirection(AntEnv):
    """As ``CheetahInDirection``."""

    task = 1.0

    def _get_rew(self, x_velocity: float, action: Any) -> Any:
        return super()._get_rew(self.task * x_velocity, action)
