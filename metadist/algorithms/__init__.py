"""The algorithms by name.

To add one, write a file with a frozen dataclass, whose fields are its settings, and add a line to ``ALGORITHMS``;
``tests/conformance`` tests every entry. An algorithm of supervised learning subclasses ``core.algorithm.Algorithm``
(``maml.py`` is the shortest example), a learned optimiser ``learned_optimizer.LearnedOptimizer``, an algorithm of
reinforcement learning ``rl.algorithm.TrialAlgorithm``. Configs can also name an algorithm by its import path, or by an
entry point of an installed package (``docs/extend.md``).
"""

from __future__ import annotations

from metadist.algorithms.anil import ANIL
from metadist.algorithms.cnp import CNP
from metadist.algorithms.imaml import IMAML
from metadist.algorithms.lstm_optimizer import LSTMOptimizer
from metadist.algorithms.maml import MAML
from metadist.algorithms.maml_rl import MAMLRL
from metadist.algorithms.meta_lstm import MetaLSTM
from metadist.algorithms.meta_sgd import MetaSGD
from metadist.algorithms.meta_weight_net import MetaWeightNet
from metadist.algorithms.metanas import MetaNAS
from metadist.algorithms.mlp_optimizer import MLPOptimizer
from metadist.algorithms.plain import Plain
from metadist.algorithms.protonet import ProtoNet
from metadist.algorithms.reptile import Reptile
from metadist.algorithms.reweight import Reweight
from metadist.algorithms.rl2 import RL2
from metadist.core.algorithm import Algorithm
from metadist.core.carried import CarriedAlgorithm
from metadist.rl.algorithm import TrialAlgorithm

ALGORITHMS: dict[str, type[Algorithm] | type[CarriedAlgorithm] | type[TrialAlgorithm]] = {
    "anil": ANIL,
    "cnp": CNP,
    "lstm_optimizer": LSTMOptimizer,
    "imaml": IMAML,
    "maml": MAML,
    "maml_rl": MAMLRL,
    "meta_lstm": MetaLSTM,
    "meta_sgd": MetaSGD,
    "mlp_optimizer": MLPOptimizer,
    "meta_weight_net": MetaWeightNet,
    "metanas": MetaNAS,
    "plain": Plain,
    "protonet": ProtoNet,
    "reptile": Reptile,
    "reweight": Reweight,
    "rl2": RL2,
}
