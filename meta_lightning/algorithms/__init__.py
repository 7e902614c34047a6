"""The algorithms, one LightningModule each."""

from meta_lightning.algorithms.baseline import Baseline
from meta_lightning.algorithms.fomaml import FOMAML
from meta_lightning.algorithms.imaml import IMAML
from meta_lightning.algorithms.maml import MAML
from meta_lightning.algorithms.meta_learner import MetaLearner
from meta_lightning.algorithms.protonet import ProtoNet
from meta_lightning.algorithms.reptile import Reptile

ALGORITHMS: dict[str, type[MetaLearner]] = {
    "maml": MAML,
    "fomaml": FOMAML,
    "reptile": Reptile,
    "imaml": IMAML,
    "protonet": ProtoNet,
    "baseline": Baseline,
}

__all__ = ["ALGORITHMS", "FOMAML", "IMAML", "MAML", "Baseline", "MetaLearner", "ProtoNet", "Reptile"]
