"""Gradient-based meta-learning on PyTorch Lightning: MAML, FOMAML and Reptile."""

from meta_lightning.algorithms import FOMAML, MAML, MetaLearner, Reptile
from meta_lightning.data import Glyphs, ImageTasks, Omniglot, Sinusoid, TaskDataModule
from meta_lightning.metrics import TaskMean
from meta_lightning.networks import MLP, Conv4
from meta_lightning.tasks import TaskBatch
from meta_lightning.train import train_maml

__version__ = "0.1.0"

__all__ = [
    "FOMAML",
    "MAML",
    "MLP",
    "Conv4",
    "Glyphs",
    "ImageTasks",
    "MetaLearner",
    "Omniglot",
    "Reptile",
    "Sinusoid",
    "TaskBatch",
    "TaskDataModule",
    "TaskMean",
    "train_maml",
]
