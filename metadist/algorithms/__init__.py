"""The algorithms by name. A new one is one file and one line here."""

from metadist.algorithms.anil import ANIL
from metadist.algorithms.cnp import CNP
from metadist.algorithms.maml import MAML
from metadist.algorithms.meta_sgd import MetaSGD
from metadist.algorithms.protonet import ProtoNet
from metadist.algorithms.reptile import Reptile
from metadist.core.algorithm import Algorithm

ALGORITHMS: dict[str, type[Algorithm]] = {
    "anil": ANIL,
    "cnp": CNP,
    "maml": MAML,
    "meta_sgd": MetaSGD,
    "protonet": ProtoNet,
    "reptile": Reptile,
}
