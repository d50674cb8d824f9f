"""The algorithms by name.

To add one, write a file with a frozen dataclass, whose fields are its settings, and add a line to ``ALGORITHMS``;
``tests/conformance`` tests every entry. An algorithm of supervised learning subclasses ``core.algorithm.Algorithm``
(``maml.py`` is the shortest example), an algorithm of reinforcement learning ``rl.algorithm.TrialAlgorithm``. Configs
can also name an algorithm by its import path, or by an entry point of an installed package (``docs/extend.md``).
"""

from __future__ import annotations

from metadist.algorithms.anil import ANIL
from metadist.algorithms.cnp import CNP
from metadist.algorithms.imaml import IMAML
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
    "imaml": IMAML,
    "maml": MAML,
    "maml_rl": MAMLRL,
    "meta_sgd": MetaSGD,
    "protonet": ProtoNet,
    "reptile": Reptile,
    "rl2": RL2,
}
