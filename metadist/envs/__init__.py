"""Meta-environments by name. A new one is one file and one line here; a user's own is named by its import path instead."""

from metadist.core.meta_environment import MetaEnvironment
from metadist.envs.bandit import Bandit
from metadist.envs.correlated_bandit import CorrelatedBandit
from metadist.envs.gridworld import Gridworld
from metadist.envs.gymnasium_adapter import Gymnasium
from metadist.envs.locomotion import AntDir, HalfCheetahDir, HalfCheetahVel
from metadist.envs.meta_world import MetaWorld
from metadist.envs.navigation import Navigation
from metadist.envs.tabular_mdp import TabularMDP

ENVIRONMENTS: dict[str, type[MetaEnvironment]] = {
    "bandit": Bandit,
    "correlated_bandit": CorrelatedBandit,
    "tabular_mdp": TabularMDP,
    "gridworld": Gridworld,
    "navigation": Navigation,
    "gymnasium": Gymnasium,
    "half_cheetah_vel": HalfCheetahVel,
    "half_cheetah_dir": HalfCheetahDir,
    "ant_dir": AntDir,
    "meta_world": MetaWorld,
}
