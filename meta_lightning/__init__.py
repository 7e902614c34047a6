"""Gradient-based meta-learning on PyTorch Lightning: MAML, FOMAML and Reptile."""

from meta_lightning.algorithms import FOMAML, MAML, MetaLearner, Reptile
from meta_lightning.data import (
    CIFARFS,
    FC100,
    Glyphs,
    ImageTasks,
    ImageTransforms,
    MiniImagenet,
    Omniglot,
    Sinusoid,
    TaskDataModule,
    TieredImagenet,
)
from meta_lightning.metrics import TaskMean
from meta_lightning.networks import MLP, Conv4
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
    "Glyphs",
    "ImageTasks",
    "ImageTransforms",
    "MetaLearner",
    "MiniImagenet",
    "Omniglot",
    "Reptile",
    "Sinusoid",
    "TaskBatch",
    "TaskDataModule",
    "TaskMean",
    "TieredImagenet",
    "train_maml",
]
