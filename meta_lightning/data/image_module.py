"""Base classes of the image data sets: N-way K-shot tasks over one cached tensor of images."""

import os
import zlib
from abc import abstractmethod
from collections.abc import Sequence
from dataclasses import field, replace
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch

from meta_lightning.data.cache import FORMAT, LabelledImages, load_or_build
from meta_lightning.data.form import SampleForm, look_of
from meta_lightning.data.module import ClassificationTasks, options
from meta_lightning.data.tasks import SPLITS, FewShotTasks, Split, TaskBatch, group_of
from meta_lightning.data.transforms import ImageTransforms


@options
class ImageTasks(ClassificationTasks):
    """N-way K-shot classification of images; a user-defined data set implements ``build`` and ``cache_name``.

    Raises:
        InputError: If an option is outside its range, or a split has too few classes or images for its tasks.
    """

    # the form to which other images are converted for adaptation; None if it depends on the options
    image_size: ClassVar[int | None] = None
    channels: ClassVar[int | None] = None
    ink: ClassVar[bool] = False  # drawings with ink 1 on 0
    group_of = staticmethod(group_of)  # the group of a class, by its name

    cache_dir: str | None = None
    """Folder of the packed images. Default: ``meta_lightning`` in the user's cache folder."""
    verify_cache: bool = False
    """Compare the cache with its checksums before it is used, which reads all of it."""
    transforms: ImageTransforms | None = None
    """Normalisation, and augmentation of the training tasks."""

    def __post_init__(self) -> None:
        super().__post_init__()
        self.data: LabelledImages | None = None

    @property
    @abstractmethod
    def cache_name(self) -> str:
        """Name of the cache folder; must change with everything that ``build`` depends on, except ``sources``."""

    @abstractmethod
    def build(self) -> LabelledImages:
        """Make the data set from its source; called once, and the result is cached.

        ``meta_lightning.data.cache.concatenated`` serves images that do not fit into memory.
        """

    def sources(self) -> Sequence[Path]:
        """Files that ``build`` reads: the cache is rebuilt when one changes. Empty if they no longer exist."""
        return []

    def __getstate__(self) -> dict[str, Any]:
        """Without the images, which other processes map from the cache."""
        return self.__dict__ | {"data": None, "placed": None, "task_sets": {}}

    def prepare_data(self) -> None:
        """Fill the cache, in one process per machine."""
        self.load()

    def setup(self, stage: str | None = None) -> None:
        """Load the images and make the tasks of each split that the stage needs; ``fit`` needs all splits."""
        super().setup(stage)
        needed: dict[str | None, tuple[Split, ...]] = {"validate": ("val",), "test": ("test",), "predict": ("test",)}
        for split in needed.get(stage, SPLITS):
            self.task_set(split)

    def load(self) -> LabelledImages:
        """The data set, from the cache if there is one."""
        if self.data is None:
            default = f"{os.environ.get('XDG_CACHE_HOME') or '~/.cache'}/meta_lightning"
            folder = Path(self.cache_dir or default).expanduser() / f"{self.cache_name}-v{FORMAT}"
            self.data = self.arrange(load_or_build(folder, self.build, self.sources, self.verify_cache))
        return self.data

    def arrange(self, data: LabelledImages) -> LabelledImages:
        """Apply the options that the cached data set does not depend on, such as the split of the classes."""
        return data

    def task_set(self, split: Split) -> FewShotTasks:
        """The tasks of a split, from the images."""
        data = self.load()
        classes = data.members(split)
        names = data.classes[classes].tolist()
        groups = [self.group_of(name) for name in names]
        file = getattr(data.images, "filename", None)
        x, y = torch.from_numpy(data.images), torch.from_numpy(data.labels)
        return self.few_shot_tasks(split, x, labels=y, classes=classes, source=file, names=names, groups=groups)

    def sample_form(self) -> SampleForm:
        """The form of the images, and how up to a thousand of the training split look."""
        data = self.load()
        rows = np.flatnonzero(np.isin(data.labels, data.members("train")))
        form = replace(super().sample_form(), pixels=True)
        return replace(form, look=look_of(data.images[rows[:: len(rows) // 1000 + 1]])) if len(rows) else form

    def transformed(self, batch: TaskBatch, training: bool, seed: int) -> TaskBatch:
        """Apply ``transforms`` to a batch."""
        return (self.transforms or ImageTransforms())(batch, training, seed)

    def on_after_batch_transfer(self, batch: TaskBatch, dataloader_idx: int) -> TaskBatch:
        """Augment and normalise on the device; a function of the meta-iteration and the rank."""
        training = self.trainer is not None and self.trainer.training
        rank = self.trainer.global_rank if self.trainer else 0
        seed = np.random.SeedSequence((self.seed, self.meta_iteration(), rank))
        transformed = self.transformed(batch, training, int(seed.generate_state(1)[0]))
        return self.trainer.precision_plugin.convert_input(transformed) if self.trainer else transformed


@options
class FolderTasks(ImageTasks):
    """Images read from a folder."""

    root: str = field(kw_only=False)
    """Folder of the data set."""

    @property
    def folder(self) -> Path:
        """``root`` as a path."""
        return Path(self.root).expanduser()

    def named_for_root(self, name: str, *made_by: str) -> str:
        """A cache name that is unique to ``root`` and to whatever else ``build`` depends on."""
        origin = " ".join([str(self.folder.resolve()), *made_by])
        return f"{name}-{zlib.crc32(origin.encode()):08x}"


@options
class DownloadedTasks(FolderTasks):
    """Images of a published data set, which learn2learn downloads."""

    title: ClassVar[str]
    origin: ClassVar[str]  # where missing files can be copied from

    root: str = field(default="data", kw_only=False)
    download: bool = False
    """Download missing files, through learn2learn."""

    @abstractmethod
    def missing(self) -> str:
        """Which files ``root`` must hold and which are missing, for messages; empty if none are."""

    @abstractmethod
    def fetch(self) -> None:
        """Download missing files."""

    def require_files(self) -> None:
        """Download missing files if that is allowed, else raise FileNotFoundError."""
        by_hand = f"without network access, copy there {self.origin}"
        if self.download and self.missing():
            try:
                self.fetch()
            except Exception as error:
                came = f"{type(error).__name__}: {error}"
                # not chained, since the command line prints the cause only
                raise OSError(f"{self.title} could not be downloaded to {self.folder} ({came}); {by_hand}") from None
        if missing := self.missing():
            advice = f"Pass --data.download true to download what is missing; {by_hand}"
            raise FileNotFoundError(f"root must hold {self.title}: {missing}. {advice}")
