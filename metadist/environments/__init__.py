"""List the meta-environments by name.

A new one needs one file and one line here. A config names a user's own meta-environment by its import path.
"""

from metadist.environments.bandit import Bandit
from metadist.environments.correlated_bandit import CorrelatedBandit
from metadist.environments.gridworld import Gridworld
from metadist.environments.gymnasium_adapter import Gymnasium
from metadist.environments.locomotion import AntDir, HalfCheetahDir, HalfCheetahVel
from metadist.environments.meta_world import MetaWorld
from metadist.environments.navigation import Navigation
from metadist.environments.tabular_mdp import TabularMDP
from metadist.rl.environment import MetaEnvironment

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
