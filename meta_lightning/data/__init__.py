"""Where tasks come from, one LightningDataModule each."""

from meta_lightning.data.base import TaskDataModule
from meta_lightning.data.glyphs import Glyphs
from meta_lightning.data.images import ImageTasks
from meta_lightning.data.omniglot import Omniglot
from meta_lightning.data.sinusoid import Sinusoid

__all__ = ["Glyphs", "ImageTasks", "Omniglot", "Sinusoid", "TaskDataModule"]
