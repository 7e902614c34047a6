"""What the image data sets share: N-way K-shot tasks over one tensor of images, kept in a cache."""

import zlib
from abc import abstractmethod
from collections.abc import Sequence
from dataclasses import field
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch

from meta_lightning.data.cache import FORMAT, LabelledImages, default_cache_dir, load_or_build
from meta_lightning.data.module import ClassificationTasks, options
from meta_lightning.data.tasks import SPLITS, FewShotTasks, Split, TaskBatch, group_of
from meta_lightning.data.transforms import ImageTransforms

STAGE_SPLITS: dict[str, tuple[Split, ...]] = {"validate": ("val",), "test": ("test",), "predict": ("test",)}


@options
class ImageTasks(ClassificationTasks):
    """N-way K-shot classification of images; a data set of one's own needs only ``build`` and ``cache_name``.

    Raises:
        InputError: If an option is outside its range, or a split cannot give such tasks.
    """

    # what pictures of other origin are made to look like; None where it depends on the options
    image_size: ClassVar[int | None] = None
    channels: ClassVar[int | None] = None
    ink: ClassVar[bool] = False  # drawings, their ink 1 on 0

    cache_dir: str | None = None
    """Where the packed images are kept. Default: ``meta_lightning`` in the user's cache folder."""
    transforms: ImageTransforms | None = None
    """Normalisation, and the augmentation of training tasks."""

    def __post_init__(self) -> None:
        """Begin without images."""
        super().__post_init__()
        self.data: LabelledImages | None = None

    @property
    @abstractmethod
    def cache_name(self) -> str:
        """Name of the cache folder; it has to change with whatever ``build`` depends on, but for ``sources``."""

    @abstractmethod
    def build(self) -> LabelledImages:
        """Make the data set from its source; called once, its result is cached."""

    def sources(self) -> Sequence[Path]:
        """The files that ``build`` reads, so that it is called again when one changes; none where they are gone."""
        return []

    def __getstate__(self) -> dict[str, Any]:
        """Without the images, which the other process maps for itself."""
        return self.__dict__ | {"data": None, "placed": None, "task_sets": {}}

    def prepare_data(self) -> None:
        """Fill the cache and verify its checksums, in one process a machine."""
        self.load(verify=True)

    def setup(self, stage: str | None = None) -> None:
        """Load the images, and see that each split that the stage needs can give its tasks; fitting needs all."""
        super().setup(stage)
        for split in STAGE_SPLITS.get(stage or "fit", SPLITS):
            self.task_set(split)

    def load(self, verify: bool = False) -> LabelledImages:
        """The data set, from the cache where there is one."""
        if self.data is None:
            caches = Path(self.cache_dir).expanduser() if self.cache_dir else default_cache_dir()
            folder = caches / f"{self.cache_name}-v{FORMAT}"
            self.data = self.arrange(load_or_build(folder, self.build, self.sources, verify))
        return self.data

    def arrange(self, data: LabelledImages) -> LabelledImages:
        """The data set as this module uses it, from what is cached."""
        return data

    def make_task_set(self, split: Split) -> FewShotTasks:
        """The tasks of a split, from the images."""
        data = self.load()
        members, file = data.members(split), getattr(data.images, "filename", None)
        images, labels = torch.from_numpy(data.images), torch.from_numpy(data.labels)
        source = None if file is None else Path(file)
        names = [str(name) for name in data.classes[members]]
        groups = [self.group_of(name) for name in names]
        return self.few_shot_tasks(split, images, labels, members, source, names, groups)

    def group_of(self, class_name: str) -> str:
        """What a class belongs to. Default: the folder before its name, where there is one; else the class itself."""
        return group_of(class_name)

    def transformed(self, batch: TaskBatch, training: bool, seed: int) -> TaskBatch:
        """A batch as ``transforms`` makes it."""
        return (self.transforms or ImageTransforms())(batch, training, seed)

    def on_after_batch_transfer(self, batch: TaskBatch, dataloader_idx: int) -> TaskBatch:
        """Augment and normalise on the device, as ``transforms`` says; the same step of a rank looks the same again."""
        training = self.trainer is not None and self.trainer.training
        seed = np.random.SeedSequence((self.seed, self._meta_iteration(), self._rank()[0]))
        transformed = self.transformed(batch, training, int(seed.generate_state(1)[0]))
        return self.trainer.precision_plugin.convert_input(transformed) if self.trainer else transformed


@options
class FolderTasks(ImageTasks):
    """Images that are read from a folder."""

    root: str = field(kw_only=False)
    """Folder that holds the files of the data set."""

    @property
    def folder(self) -> Path:
        """``root`` as a path."""
        return Path(self.root).expanduser()

    def named_for_root(self, name: str, *made_by: str) -> str:
        """A name for each ``root`` and whatever else ``build`` depends on, so that no cache answers for another."""
        origin = " ".join([str(self.folder.resolve()), *made_by])
        return f"{name}-{zlib.crc32(origin.encode()):08x}"


@options
class DownloadedTasks(FolderTasks):
    """Images of a published data set."""

    root: str = field(default="data", kw_only=False)
    download: bool = False
    """Download the files, through learn2learn, when some are missing."""
