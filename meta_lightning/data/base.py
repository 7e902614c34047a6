"""What every data module shares: numbered tasks, loaded by meta-iteration."""

from abc import ABC, abstractmethod
from dataclasses import fields, is_dataclass
from pathlib import Path
from typing import Any

import lightning as L
import numpy as np
import torch
from lightning.pytorch.utilities import rank_zero_info
from torch import Tensor

from meta_lightning.checks import require, require_at_least
from meta_lightning.loading import MetaBatches, MetaIterations, TaskLoader
from meta_lightning.tasks import Split, TaskSet


class TaskDataModule(L.LightningDataModule, ABC):
    """Meta-batches of tasks; a data set of one's own needs only ``task_set``.

    Training tasks are an endless stream, and an epoch is ``epoch_length`` meta-batches of it; validation and test are
    the first ``val_tasks`` and ``test_tasks`` tasks of their splits. Task i of a split depends on (seed, split, i)
    alone: not on the number of workers or processes, nor on where training was resumed.

    Args:
        meta_batch_size: Tasks a meta-iteration, over all processes together (B).
        epoch_length: Meta-iterations an epoch.
        val_tasks: Validation tasks.
        test_tasks: Test tasks, also those of ``predict``.
        seed: Seed of the tasks.
        num_workers: Processes that load; with 0 the training process does.

    Raises:
        InputError: If an argument is outside its range.
    """

    data_arguments: tuple[str, ...] = ()  # arguments that hold data: a checkpoint keeps the others

    def __init__(
        self, meta_batch_size: int, epoch_length: int, val_tasks: int, test_tasks: int, seed: int, num_workers: int
    ) -> None:
        super().__init__()
        require_at_least(
            1, meta_batch_size=meta_batch_size, epoch_length=epoch_length, val_tasks=val_tasks, test_tasks=test_tasks
        )
        require_at_least(0, seed=seed, num_workers=num_workers)
        self.save_hyperparameters(ignore=self.data_arguments, logger=False)
        for name, value in list(self.hparams.items()):
            self.hparams[name] = plain(value)
        self.meta_batch_size = meta_batch_size
        self.epoch_length = epoch_length
        self.val_tasks = val_tasks
        self.test_tasks = test_tasks
        self.seed = seed
        self.num_workers = num_workers

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
        # on the first tasks, again and again
        overfit = self.trainer is not None and self.trainer.overfit_batches > 0  # type: ignore[attr-defined]
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


def plain(value: Any) -> Any:
    """An argument as a checkpoint that is loaded with weights_only can hold it; None in place of other objects."""
    if isinstance(value, np.ndarray | np.generic):
        return value.tolist()
    if isinstance(value, dict):
        return {name: plain(part) for name, part in value.items()}
    if isinstance(value, list | tuple):
        return [plain(part) for part in value]
    if isinstance(value, Path):
        return str(value)
    if is_dataclass(value) and not isinstance(value, type):
        return {field.name: plain(getattr(value, field.name)) for field in fields(value)}
    return value if isinstance(value, bool | int | float | str) else None
