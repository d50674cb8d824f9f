"""The algorithms by name.

A new one is one file and one line in ``ALGORITHMS``. A user's own is named by its import path; a package of its own
declares an entry point (``docs/extend.md``).
"""

from __future__ import annotations

from metadist.algorithms.anil import ANIL
from metadist.algorithms.cnp import CNP
from metadist.algorithms.maml import MAML
from metadist.algorithms.maml_rl import MAMLRL
from metadist.algorithms.meta_sgd import MetaSGD
from metadist.algorithms.protonet import ProtoNet
from metadist.algorithms.reptile import Reptile
from metadist.algorithms.rl2 import RL2
from metadist.core.algorithm import Algorithm
from metadist.rl.algorithm import TrialAlgorithm

ALGORITHMS: dict[str, type[Algorithm] | type[TrialAlgorithm]] = {
    "anil": ANIL,
    "cnp": CNP,
    "maml": MAML,
    "maml_rl": MAMLRL,
    "meta_sgd": MetaSGD,
    "protonet": ProtoNet,
    "reptile": Reptile,
    "rl2": RL2,
}
