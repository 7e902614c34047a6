"""What the image data sets share: N-way K-shot tasks over one tensor of images, kept in a cache."""

from abc import abstractmethod
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from meta_lightning.checks import require_at_least
from meta_lightning.data.base import TaskDataModule
from meta_lightning.data.cache import FORMAT, LabelledImages, default_cache_dir, load_or_build
from meta_lightning.data.transforms import ImageTransforms
from meta_lightning.tasks import SPLITS, FewShotTasks, Split, TaskBatch

STAGE_SPLITS: dict[str, tuple[Split, ...]] = {"validate": ("val",), "test": ("test",), "predict": ("test",)}


class ImageTasks(TaskDataModule):
    """N-way K-shot classification of images; a data set of one's own needs only ``build`` and ``cache_name``.

    Args:
        ways: Classes a task (N).
        shots: Support images a class (K).
        queries: Query images a class (Q).
        train_ways: Classes a task in training. Default: ``ways``.
        train_shots: Support images a class in training, or the least and most of them, to be drawn for each meta-batch.
            Default: ``shots``.
        train_queries: Query images a class in training. Default: ``queries``.
        meta_batch_size: Tasks a meta-iteration, over all processes together (B).
        epoch_length: Meta-iterations an epoch.
        val_tasks: Validation tasks.
        test_tasks: Test tasks, also those of ``predict``.
        seed: Seed of the tasks.
        num_workers: Processes that load; with 0 the training process does.
        cache_dir: Where the packed images are kept. Default: ``meta_lightning`` in the user's cache folder.
        transforms: Normalisation, and the augmentation of training tasks.

    Raises:
        InputError: If an argument is outside its range, or a split cannot give such tasks.
    """

    # what pictures of other origin are made to look like; None where it depends on the arguments
    image_size: int | None = None
    channels: int | None = None
    ink: bool = False  # drawings, their ink 1 on 0

    def __init__(
        self,
        ways: int = 5,
        shots: int = 1,
        queries: int = 15,
        train_ways: int | None = None,
        train_shots: int | tuple[int, int] | None = None,
        train_queries: int | None = None,
        meta_batch_size: int = 16,
        epoch_length: int = 500,
        val_tasks: int = 200,
        test_tasks: int = 600,
        seed: int = 0,
        num_workers: int = 0,
        cache_dir: str | None = None,
        transforms: ImageTransforms | None = None,
    ) -> None:
        super().__init__(meta_batch_size, epoch_length, val_tasks, test_tasks, seed, num_workers)
        self.ways = ways
        self.shots = shots
        self.queries = queries
        self.train_ways = ways if train_ways is None else train_ways
        self.train_shots = shots if train_shots is None else train_shots
        self.train_queries = queries if train_queries is None else train_queries
        require_at_least(2, ways=ways, train_ways=self.train_ways)
        require_at_least(1, shots=shots, queries=queries, train_queries=self.train_queries)
        self.transforms = transforms or ImageTransforms()
        self.cache_dir = Path(cache_dir).expanduser() if cache_dir else default_cache_dir()
        self.data: LabelledImages | None = None
        self.images: Tensor | None = None
        self.task_sets: dict[Split, FewShotTasks] = {}

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
        return self.__dict__ | {"data": None, "images": None, "task_sets": {}}

    def prepare_data(self) -> None:
        """Fill the cache and verify its checksums, in one process a machine."""
        self.load(verify=True)

    def setup(self, stage: str | None = None) -> None:
        """Load the images, and see that each split that the stage needs can give its tasks; fitting needs all."""
        self.images, self.task_sets = None, {}  # what a device held before is free before it holds them again
        for split in STAGE_SPLITS.get(stage or "fit", SPLITS):
            self.task_set(split)

    def load(self, verify: bool = False) -> LabelledImages:
        """The data set, from the cache where there is one."""
        if self.data is None:
            folder = self.cache_dir / f"{self.cache_name}-v{FORMAT}"
            self.data = self.arrange(load_or_build(folder, self.build, self.sources, verify))
        return self.data

    def arrange(self, data: LabelledImages) -> LabelledImages:
        """The data set as this module uses it, from what is cached."""
        return data

    def task_set(self, split: Split) -> FewShotTasks:
        """N-way K-shot tasks of the split's classes."""
        if split not in self.task_sets:
            self.task_sets[split] = self.make_task_set(split)
        return self.task_sets[split]

    def make_task_set(self, split: Split) -> FewShotTasks:
        """The tasks of a split, from the images."""
        data = self.load()
        if self.images is None:
            self.images = self.place(torch.from_numpy(data.images))
        train = split == "train"
        return FewShotTasks(
            self.images,
            torch.from_numpy(data.labels),
            data.members(split),
            self.train_ways if train else self.ways,
            self.train_shots if train else self.shots,
            self.train_queries if train else self.queries,
            self.seed,
            split,
            block=self.meta_batch_size,
            source=Path(data.images.filename)
            if isinstance(data.images, np.memmap) and data.images.filename is not None
            else None,
            names=data.classes[data.members(split)].tolist(),
        )

    def on_after_batch_transfer(self, batch: TaskBatch, dataloader_idx: int) -> TaskBatch:
        """Augment and normalise on the device, as ``transforms`` says; the same step of a rank looks the same again."""
        training = self.trainer is not None and self.trainer.training
        seed = np.random.SeedSequence((self.seed, self._meta_iteration(), self._rank()[0]))
        transformed = self.transforms(batch, training, int(seed.generate_state(1)[0]))
        return self.trainer.precision_plugin.convert_input(transformed) if self.trainer else transformed
