"""Gradient-based meta-learning on PyTorch Lightning: MAML, FOMAML and Reptile."""

from meta_lightning.adaptation.predictor import Predictor
from meta_lightning.algorithms import FOMAML, MAML, MetaLearner, Reptile
from meta_lightning.dashboard import Dashboard
from meta_lightning.data import (
    CIFARFS,
    FC100,
    Glyphs,
    ImageFolderTasks,
    ImageTasks,
    ImageTransforms,
    MiniImagenet,
    Omniglot,
    RegressionTasks,
    Sinusoid,
    TaskDataModule,
    TensorTasks,
    TieredImagenet,
)
from meta_lightning.metrics import TaskMean
from meta_lightning.networks import MLP, Conv4
from meta_lightning.resnet import ResNet12
from meta_lightning.restoring import load_learner
from meta_lightning.tasks import TaskBatch
from meta_lightning.train import train_maml

__version__ = "0.1.0"

__all__ = [
    "CIFARFS",
    "FC100",
    "FOMAML",
    "MAML",
    "MLP",
    "Conv4",
    "Dashboard",
    "Glyphs",
    "ImageFolderTasks",
    "ImageTasks",
    "ImageTransforms",
    "MetaLearner",
    "MiniImagenet",
    "Omniglot",
    "Predictor",
    "RegressionTasks",
    "Reptile",
    "ResNet12",
    "Sinusoid",
    "TaskBatch",
    "TaskDataModule",
    "TaskMean",
    "TensorTasks",
    "TieredImagenet",
    "load_learner",
    "train_maml",
]
