"""Data sets of tasks, one LightningDataModule each."""

from meta_lightning.data.characters import Characters as Characters
from meta_lightning.data.cifar_fs import CIFARFS as CIFARFS
from meta_lightning.data.datasets import DatasetTasks as DatasetTasks
from meta_lightning.data.fc100 import FC100 as FC100
from meta_lightning.data.glyphs import Glyphs as Glyphs
from meta_lightning.data.image_folder import ImageFolderTasks as ImageFolderTasks
from meta_lightning.data.image_module import ImageTasks as ImageTasks
from meta_lightning.data.mini_imagenet import MiniImagenet as MiniImagenet
from meta_lightning.data.module import TaskDataModule as TaskDataModule
from meta_lightning.data.omniglot import Omniglot as Omniglot
from meta_lightning.data.regression import RegressionTasks as RegressionTasks
from meta_lightning.data.sinusoid import Sinusoid as Sinusoid
from meta_lightning.data.table_form import TableForm as TableForm
from meta_lightning.data.tables import TableTasks as TableTasks
from meta_lightning.data.tensors import TensorTasks as TensorTasks
from meta_lightning.data.tiered_imagenet import TieredImagenet as TieredImagenet
from meta_lightning.data.transforms import ImageTransforms as ImageTransforms
