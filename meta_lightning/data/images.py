"""What the image data sets share: N-way K-shot tasks over one tensor of images, kept in a cache."""

import os
from abc import abstractmethod
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from lightning.pytorch.utilities import rank_zero_info, rank_zero_warn

from meta_lightning.checks import require_at_least
from meta_lightning.data.base import TaskDataModule
from meta_lightning.tasks import SPLITS, Array, FewShotTasks, Split


class LabelledImages(NamedTuple):
    """A whole data set, its classes split into train, val and test."""

    images: Array  # M C H W, uint8
    labels: Array  # M, int64: the image's row in ``classes``
    classes: Array  # names, str
    splits: Array  # of each class: its row in SPLITS

    def members(self, split: Split) -> list[int]:
        """The class numbers of a split."""
        return [int(c) for c in np.flatnonzero(self.splits == SPLITS.index(split))]


class ImageTasks(TaskDataModule):
    """N-way K-shot classification of images; a data set of one's own needs only ``build`` and ``cache_name``.

    Args:
        ways: Classes a task (N).
        shots: Support images a class (K).
        queries: Query images a class (Q).
        train_shots: Support images a class in training. Default: ``shots``.
        train_queries: Query images a class in training. Default: ``queries``.
        meta_batch_size: Tasks a meta-iteration, over all processes together (B).
        epoch_length: Meta-iterations an epoch.
        val_tasks: Validation tasks.
        test_tasks: Test tasks, also those of ``predict``.
        seed: Seed of the tasks.
        num_workers: Processes that load; with 0 the training process does.
        cache_dir: Where the packed images are kept. Default: ``meta_lightning`` in the user's cache folder.

    Raises:
        InputError: If an argument is outside its range, or a split cannot give such tasks.
    """

    def __init__(
        self,
        ways: int = 5,
        shots: int = 1,
        queries: int = 15,
        train_shots: int | None = None,
        train_queries: int | None = None,
        meta_batch_size: int = 16,
        epoch_length: int = 500,
        val_tasks: int = 200,
        test_tasks: int = 600,
        seed: int = 0,
        num_workers: int = 0,
        cache_dir: str | None = None,
    ) -> None:
        super().__init__(meta_batch_size, epoch_length, val_tasks, test_tasks, seed, num_workers)
        train_shots = shots if train_shots is None else train_shots
        train_queries = queries if train_queries is None else train_queries
        require_at_least(2, ways=ways)
        require_at_least(1, shots=shots, queries=queries, train_shots=train_shots, train_queries=train_queries)
        self.ways = ways
        self.shots = shots
        self.queries = queries
        self.train_shots = train_shots
        self.train_queries = train_queries
        self.cache_dir = Path(cache_dir).expanduser() if cache_dir else default_cache_dir()
        self.data: LabelledImages | None = None
        self.task_sets: dict[Split, FewShotTasks] = {}

    @property
    @abstractmethod
    def cache_name(self) -> str:
        """Name of the cache file; it has to change with whatever ``build`` depends on."""

    @abstractmethod
    def build(self) -> LabelledImages:
        """Make the data set from its source; called once, its result is cached."""

    def prepare_data(self) -> None:
        """Fill the cache, in one process a machine."""
        self.load()

    def setup(self, stage: str | None = None) -> None:
        """Load the images, and see that every split can give its tasks."""
        self.task_sets = {split: self.make_task_set(split) for split in SPLITS}

    def load(self) -> LabelledImages:
        """The data set, from the cache where there is one."""
        if self.data is None:
            self.data = self.arrange(load_or_build(self.cache_dir / f"{self.cache_name}.npz", self.build))
        return self.data

    def arrange(self, data: LabelledImages) -> LabelledImages:
        """The data set as this module uses it, from what is cached."""
        return data

    def task_set(self, split: Split) -> FewShotTasks:
        """N-way K-shot tasks of the split's classes."""
        if not self.task_sets:
            self.setup()
        return self.task_sets[split]

    def make_task_set(self, split: Split) -> FewShotTasks:
        """The tasks of a split, from the images."""
        data = self.load()
        train = split == "train"
        return FewShotTasks(
            torch.from_numpy(data.images),
            torch.from_numpy(data.labels),
            data.members(split),
            self.ways,
            self.train_shots if train else self.shots,
            self.train_queries if train else self.queries,
            self.seed,
            split,
        )


def default_cache_dir() -> Path:
    """``meta_lightning`` in the user's cache folder."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "meta_lightning"


def load_or_build(path: Path, build: Callable[[], LabelledImages]) -> LabelledImages:
    """Read a cache, or build it where it is missing or does not read; it is never left half-written.

    The archive's own checksums tell a truncated or altered file.
    """
    if path.exists():
        try:
            with np.load(path, allow_pickle=False) as archive:
                return LabelledImages(**{name: archive[name] for name in LabelledImages._fields})
        except Exception as error:  # a spoilt archive fails in many ways, and each means the same
            rank_zero_warn(f"The cache {path} does not read ({error}): it is built anew.")
    data = build()
    part = path.with_name(f"{path.name}.{os.getpid()}.part")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with part.open("wb") as file:
            np.savez(file, **data._asdict())
        part.replace(path)
        rank_zero_info(f"Packed {len(data.images)} images of {len(data.classes)} classes into {path}.")
    except OSError as error:
        rank_zero_warn(f"cache_dir {path.parent} cannot be written ({error}): the images are kept in memory only.")
    finally:
        if part.is_file():
            part.unlink()
    return data
