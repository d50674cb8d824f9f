"""Define robots whose task is a speed or a direction (Finn, Abbeel & Levine 2017, §5.3), on Gymnasium's v5 robots."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

from metadist.core.errors import ConfigError
from metadist.core.random import TaskKey
from metadist.environments.simulated import OnError, SimulatedEnvironment, TaskValues
from metadist.rl.environment import Tasks


@dataclass(frozen=True, kw_only=True)
class Locomotion(SimulatedEnvironment):
    """The base of all robots. ``control_cost`` weighs |action|² in the reward; published code has .05, Gymnasium .1.

    Joints turn at ten radians a second and more, while all other observations are about 1: the observation has joint
    speeds times ``joint_speed_scale``. ``x_velocity``, the body's speed in metres a second, is measured for reports.
    """

    episodes: int = 2
    horizon: int = 200
    control_cost: float = 0.05
    joint_speed_scale: float = 0.1
    on_error: OnError = "retry"

    measures = ("x_velocity",)
    needs = ("gymnasium", "mujoco")
    #: the joint speeds in an observation
    joint_speeds: ClassVar[slice] = slice(11, 17)

    def __post_init__(self) -> None:
        self.check_settings()
        for name in ("control_cost", "joint_speed_scale"):
            if not getattr(self, name) >= 0:
                raise ConfigError(f"environment.{name}: {getattr(self, name)}; expected 0 or more")

    def set_task(self, simulator: Any, task: TaskValues) -> None:
        (simulator.task,) = task.values()

    def observed(self, observation: Any) -> Any:
        found = super().observed(observation).copy()
        found[self.joint_speeds] *= self.joint_speed_scale
        return found

    def protocol(self, split: str) -> dict[str, Any]:
        return {
            **super().protocol(split),
            "control_cost": self.control_cost,
            "joint_speed_scale": self.joint_speed_scale,
        }


@dataclass(frozen=True, kw_only=True)
class HalfCheetahVel(Locomotion):
    """Run at a hidden speed: reward −|v − target| − cost, target uniform in [``slowest``, ``fastest``].

    The range is [0, 3] in some published code and [0, 2] in other. A task is ``target`` [B], metres a second.
    """

    slowest: float = 0.0
    fastest: float = 3.0

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.slowest < self.fastest:
            raise ConfigError(f"environment.fastest: {self.fastest} is not above environment.slowest, {self.slowest}")

    def sample(self, keys: TaskKey) -> Tasks:
        return {"target": keys.stream("target").uniform(1, low=self.slowest, high=self.fastest).squeeze(-1)}

    def build(self, kind: int) -> Any:
        from metadist.environments.bodies import CheetahAtSpeed

        return CheetahAtSpeed(ctrl_cost_weight=self.control_cost)

    def protocol(self, split: str) -> dict[str, Any]:
        return {**super().protocol(split), "targets": [self.slowest, self.fastest]}


@dataclass(frozen=True, kw_only=True)
class HalfCheetahDir(Locomotion):
    """Run forwards or backwards: reward direction · v − cost.

    A task is ``direction`` [B], 1 or −1; all splits have both.
    """

    def sample(self, keys: TaskKey) -> Tasks:
        return {"direction": keys.stream("direction").integers(2, 1).squeeze(-1) * 2.0 - 1.0}

    def build(self, kind: int) -> Any:
        from metadist.environments.bodies import CheetahInDirection

        return CheetahInDirection(ctrl_cost_weight=self.control_cost)


@dataclass(frozen=True, kw_only=True)
class AntDir(HalfCheetahDir):
    """HalfCheetahDir's task for an ant, a robot with four legs.

    Gymnasium's healthy reward and contact cost are part of the reward, and an episode ends where the ant falls or
    jumps. With ``contact_forces`` the observation has them, and 105 numbers in place of 27.
    """

    control_cost: float = 0.5
    contact_forces: bool = False

    joint_speeds = slice(19, 27)

    def build(self, kind: int) -> Any:
        from metadist.environments.bodies import AntInDirection

        return AntInDirection(ctrl_cost_weight=self.control_cost, include_cfrc_ext_in_observation=self.contact_forces)
