"""The public names, which ``meta_lightning`` loads when the first of them is used."""

from meta_lightning.adaptation.predictor import Predictor
from meta_lightning.algorithms import FOMAML, IMAML, MAML, Baseline, MetaLearner, ProtoNet, Reptile
from meta_lightning.dashboard import Dashboard
from meta_lightning.data import (
    CIFARFS,
    FC100,
    Characters,
    DatasetTasks,
    Glyphs,
    ImageFolderTasks,
    ImageTasks,
    ImageTransforms,
    MiniImagenet,
    Omniglot,
    RegressionTasks,
    Sinusoid,
    TableForm,
    TableTasks,
    TaskDataModule,
    TensorTasks,
    TieredImagenet,
)
from meta_lightning.data.tasks import TaskBatch, pad_tasks
from meta_lightning.inner.heads import ComputedRows, HeadStart, LearntRows, OneVector, Prototypes, ZeroRows
from meta_lightning.inner.rules import LSLR, SGD, Adam, InnerRule, MetaSGD
from meta_lightning.inner.task_loss import TaskLoss, TaskPredictor
from meta_lightning.networks import MLP, Backbone, Conv4, ResNet12
from meta_lightning.scores import TaskMean
from meta_lightning.train import load_learner, train_maml

__all__ = ["FOMAML", "IMAML", "MAML", "Baseline", "MetaLearner", "ProtoNet", "Reptile", "load_learner", "train_maml"]
__all__ += ["LSLR", "SGD", "Adam", "InnerRule", "MetaSGD"]
__all__ += ["ComputedRows", "HeadStart", "LearntRows", "OneVector", "Prototypes", "ZeroRows"]
__all__ += ["MLP", "Backbone", "Conv4", "Dashboard", "Predictor", "ResNet12", "TaskBatch", "TaskMean"]
__all__ += ["TaskLoss", "TaskPredictor", "pad_tasks"]
__all__ += ["ImageFolderTasks", "ImageTasks", "ImageTransforms", "RegressionTasks", "TaskDataModule", "TensorTasks"]
__all__ += ["DatasetTasks", "TableForm", "TableTasks"]
__all__ += ["CIFARFS", "FC100", "Characters", "Glyphs", "MiniImagenet", "Omniglot", "Sinusoid", "TieredImagenet"]
