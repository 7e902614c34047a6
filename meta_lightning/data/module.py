"""What every data module shares: numbered tasks, loaded by meta-iteration.

Data modules are dataclasses: every option is a field, documented once, where it is declared, and inherited.
"""

import sys
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar, TypeVar, dataclass_transform

import lightning as L
import torch
from lightning.pytorch.core.mixins.hparams_mixin import _given_hyperparameters
from lightning.pytorch.utilities import rank_zero_info
from torch import Tensor

from meta_lightning.checks import NamedOptions, plain, require, require_at_least
from meta_lightning.data.loading import MetaBatches, MetaIterations, TaskLoader
from meta_lightning.data.tasks import FewShotTasks, Shots, Split, TaskSet, least_and_most

T = TypeVar("T")


@dataclass_transform(kw_only_default=True, eq_default=False, field_specifiers=(field,))
def options(cls: type[T]) -> type[T]:
    """A dataclass of options: given by keyword, compared and hashed as any other object."""
    return dataclass(eq=False, repr=False, kw_only=True)(cls)


def constructor_arguments(instance: object) -> dict[str, Any]:
    """The arguments of a subclass' own constructors that are at work on an instance; dataclasses keep theirs."""
    found: dict[str, Any] = {}
    frame = sys._getframe(1)
    while frame.f_back and frame.f_locals.get("self") is instance:
        code = frame.f_code
        if code.co_name == "__init__" and code.co_filename != "<string>":
            names = code.co_varnames[1 : code.co_argcount + code.co_kwonlyargcount]
            found |= {name: frame.f_locals[name] for name in names}
        frame = frame.f_back
    return found


@options
class TaskDataModule(NamedOptions, L.LightningDataModule, ABC):
    """Meta-batches of tasks; a data set of one's own needs only ``task_set``.

    Training tasks are an endless stream, and an epoch is ``epoch_length`` meta-batches of it; validation and test are
    the first ``val_tasks`` and ``test_tasks`` tasks of their splits. Task i of a split depends on (seed, split, i)
    alone: not on the number of workers or processes, nor on where training was resumed.

    Raises:
        InputError: If an option is outside its range.
    """

    data_arguments: ClassVar[tuple[str, ...]] = ()  # options that hold data: a checkpoint keeps the others

    meta_batch_size: int = 16
    """Tasks per meta-iteration, over all processes together (B)."""
    epoch_length: int = 500
    """Meta-iterations per epoch."""
    val_tasks: int = 200
    """Validation tasks."""
    test_tasks: int = 600
    """Test tasks, also those of ``predict``."""
    seed: int = 0
    """Seed of the tasks. Splits of classes do not depend on it."""
    num_workers: int = 0
    """Processes that load; with 0 the training process does."""

    def __post_init__(self) -> None:
        """Keep the options for checkpoints, and refuse those outside their range."""
        super().__init__()
        self.save_hyperparameters(ignore=self.data_arguments, logger=False)
        own = {} if _given_hyperparameters.get() else constructor_arguments(self)
        kept = {name: value for name, value in own.items() if name not in self.data_arguments}
        self.hparams.update(plain({**self.hparams, **kept}))
        for name in ("meta_batch_size", "epoch_length", "val_tasks", "test_tasks"):
            require_at_least(1, **{name: getattr(self, name)})
        require_at_least(0, seed=self.seed, num_workers=self.num_workers)

    @abstractmethod
    def task_set(self, split: Split) -> TaskSet:
        """The tasks of a split."""

    def place(self, samples: Tensor) -> Tensor:
        """All samples, on the GPU that trains where they take less than a quarter of its free memory.

        There gathering a task costs next to nothing. Where they do not fit, or other processes load, they stay.

        Raises:
            InputError: If they are on a GPU already and other processes are to load.
        """
        require(
            samples.device.type == "cpu" or self.num_workers == 0,
            f"num_workers must be 0 for samples on {samples.device}, from where nothing else loads faster, "
            f"got {self.num_workers}",
        )
        device = self.trainer.strategy.root_device if self.trainer else samples.device
        if device.type != "cuda" or samples.is_cuda or self.num_workers:
            return samples
        free = torch.cuda.mem_get_info(device)[0]
        if samples.nbytes < free / 4:
            return samples.to(device)
        rank_zero_info(
            f"The samples, {samples.nbytes / 1e9:.1f} GB, stay outside of {device}, of which {free / 1e9:.1f} GB are "
            "free: training waits while a batch is gathered, unless num_workers is greater than 0."
        )
        return samples

    def train_dataloader(self) -> TaskLoader:
        """An epoch of the stream of training tasks, from the meta-iteration at which the Trainer stands."""
        overfit = getattr(self.trainer, "overfit_batches", 0) > 0  # on the first tasks, again and again
        return self._loader("train", self.epoch_length * self.meta_batch_size if overfit else None)

    def val_dataloader(self) -> TaskLoader:
        """The validation tasks."""
        return self._loader("val", self.val_tasks)

    def test_dataloader(self) -> TaskLoader:
        """The test tasks."""
        return self._loader("test", self.test_tasks)

    def predict_dataloader(self) -> TaskLoader:
        """The test tasks, to predict their queries."""
        return self.test_dataloader()

    def _loader(self, split: Split, num_tasks: int | None) -> TaskLoader:
        batches = MetaBatches(self.task_set(split), self.meta_batch_size, num_tasks, *self._rank())
        length = self.epoch_length if num_tasks is None else len(batches)
        return TaskLoader(
            batches,
            batch_size=None,
            sampler=MetaIterations(batches, length, self._meta_iteration if num_tasks is None else int),
            num_workers=self.num_workers,
            pin_memory=self.num_workers > 0 and torch.cuda.is_available(),
            persistent_workers=self.num_workers > 0,
            generator=torch.Generator(),  # the global one is the network's: a resumed run must draw the same from it
        )

    def _rank(self) -> tuple[int, int]:
        return (self.trainer.global_rank, self.trainer.world_size) if self.trainer else (0, 1)

    def _meta_iteration(self) -> int:
        return self.trainer.fit_loop.total_batch_idx + 1 if self.trainer else 0


@options
class FewShotDataModule(TaskDataModule):
    """Tasks of K support and Q query samples, per class or, of a regression, per task."""

    shots: int = 1
    """Support samples (K), per class or, of a regression, per task."""
    queries: int = 15
    """Query samples (Q), likewise."""
    train_shots: Shots | None = None
    """Support samples in training, or the least and most of them, drawn for each meta-batch. Default: ``shots``."""
    train_queries: int | None = None
    """Query samples in training. Default: ``queries``."""

    def __post_init__(self) -> None:
        """Refuse tasks without samples."""
        super().__post_init__()
        require_at_least(1, shots=self.shots, queries=self.queries, train_queries=self.sizes("train")[1])
        if self.train_shots is not None:
            least_and_most(self.train_shots, "train_shots")

    def sizes(self, split: Split) -> tuple[Shots, int]:
        """Support and query samples of the tasks of a split."""
        if split != "train":
            return self.shots, self.queries
        shots = self.shots if self.train_shots is None else self.train_shots
        return shots, self.queries if self.train_queries is None else self.train_queries


@options
class ClassificationTasks(FewShotDataModule):
    """N-way K-shot classification tasks over samples in one tensor."""

    ways: int = 5
    """Classes per task (N)."""
    train_ways: int | None = None
    """Classes per task in training. Default: ``ways``."""

    def __post_init__(self) -> None:
        """Refuse tasks without classes to tell apart."""
        super().__post_init__()
        require_at_least(2, ways=self.ways, train_ways=self.ways_of("train"))
        self.placed: Tensor | None = None
        self.task_sets: dict[Split, FewShotTasks] = {}

    def setup(self, stage: str | None = None) -> None:
        """Let go of the samples and tasks: what a device held before is free before it holds them again."""
        self.placed, self.task_sets = None, {}

    def task_set(self, split: Split) -> FewShotTasks:
        """N-way K-shot tasks of the split's classes."""
        if split not in self.task_sets:
            self.task_sets[split] = self.make_task_set(split)
        return self.task_sets[split]

    @abstractmethod
    def make_task_set(self, split: Split) -> FewShotTasks:
        """The tasks of a split, by ``few_shot_tasks``."""

    def ways_of(self, split: Split) -> int:
        """Classes per task of a split."""
        return self.train_ways if split == "train" and self.train_ways is not None else self.ways

    def few_shot_tasks(
        self,
        split: Split,
        samples: Tensor,
        labels: Tensor,
        classes: Sequence[int],
        source: Path | None = None,
        names: Sequence[str] | None = None,
        groups: Sequence[str] | None = None,
    ) -> FewShotTasks:
        """The tasks of a split over samples that all splits share, see ``FewShotTasks``."""
        if self.placed is None:
            self.placed = self.place(samples)
        ways, sizes = self.ways_of(split), self.sizes(split)
        return FewShotTasks(
            self.placed, labels, classes, ways, *sizes, self.seed, split, self.meta_batch_size, source, names, groups
        )
