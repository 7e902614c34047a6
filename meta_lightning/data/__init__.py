"""Where tasks come from, one LightningDataModule each."""

from meta_lightning.data.base import TaskDataModule
from meta_lightning.data.cifar_fs import CIFARFS
from meta_lightning.data.fc100 import FC100
from meta_lightning.data.glyphs import Glyphs
from meta_lightning.data.image_folder import ImageFolderTasks
from meta_lightning.data.images import ImageTasks
from meta_lightning.data.mini_imagenet import MiniImagenet
from meta_lightning.data.omniglot import Omniglot
from meta_lightning.data.regression import RegressionTasks
from meta_lightning.data.sinusoid import Sinusoid
from meta_lightning.data.tensors import TensorTasks
from meta_lightning.data.tiered_imagenet import TieredImagenet
from meta_lightning.data.transforms import ImageTransforms

__all__ = [
    "CIFARFS",
    "FC100",
    "Glyphs",
    "ImageFolderTasks",
    "ImageTasks",
    "ImageTransforms",
    "MiniImagenet",
    "Omniglot",
    "RegressionTasks",
    "Sinusoid",
    "TaskDataModule",
    "TensorTasks",
    "TieredImagenet",
]
