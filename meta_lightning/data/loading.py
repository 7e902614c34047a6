"""Group numbered tasks into meta-batches and shard them over ranks."""

import sys
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
from lightning import seed_everything
from torch.utils.data import DataLoader, Dataset, DistributedSampler, get_worker_info

from meta_lightning.checks import InputError
from meta_lightning.data.tasks import TaskBatch, TaskSet


class MetaBatches(Dataset[TaskBatch]):
    """One rank's share of each meta-batch of a task set: rank r of R loads tasks r, r + R, r + 2R, …"""

    def __init__(
        self, tasks: TaskSet, meta_batch_size: int, num_tasks: int | None = None, rank: int = 0, world_size: int = 1
    ) -> None:
        processes = f"the number of processes, {world_size}"
        if meta_batch_size < 1 or meta_batch_size % world_size:
            raise InputError(f"meta_batch_size must be a positive multiple of {processes}, got {meta_batch_size}")
        if num_tasks is not None and num_tasks < world_size:
            raise InputError(f"the number of {tasks.split} tasks must be at least {processes}, got {num_tasks}")
        self.tasks = tasks
        self.share = meta_batch_size // world_size
        self.mine = range(rank, sys.maxsize if num_tasks is None else num_tasks, world_size)

    def __len__(self) -> int:
        return -(-len(self.mine) // self.share)

    def __getitem__(self, iteration: int) -> TaskBatch:
        numbers = self.numbers(iteration)
        if get_worker_info() is not None:  # samples may draw: the same in any worker, and after a resume
            seeds = np.random.SeedSequence((*self.tasks.entropy, numbers.start, numbers.step))
            seed_everything(int(seeds.generate_state(1)[0]), verbose=False)
        return self.tasks.batch(numbers)

    def numbers(self, iteration: int) -> range:
        """The numbers of a meta-batch's tasks."""
        return self.mine[iteration * self.share : (iteration + 1) * self.share]


def class_names_of(loader: Any, iteration: int, tasks: int, groups: bool = False) -> list[list[str]]:
    """Class names (or groups) of each task of a meta-batch; empty lists for a loader of another package."""
    batches = getattr(loader, "dataset", None)
    if not isinstance(batches, MetaBatches):
        return [[]] * tasks
    names = batches.tasks.class_groups if groups else batches.tasks.class_names
    return [names(number) for number in batches.numbers(iteration)]


# A DistributedSampler by type only: Lightning replaces any other sampler by one that pads, and so repeats tasks
class MetaIterations(DistributedSampler[TaskBatch]):
    """The meta-iterations of one epoch, from the one that ``start`` returns."""

    def __init__(self, batches: MetaBatches, length: int, start: Callable[[], int]) -> None:
        super().__init__(batches, num_replicas=1, rank=0, shuffle=False)
        self.num_samples, self.start = length, start

    def __iter__(self) -> Iterator[Any]:
        start = self.start()
        return iter(range(start, start + self.num_samples))


class TaskLoader(DataLoader[TaskBatch]):
    """Loads meta-batches by number; resumable mid-epoch, since its position is the trainer's count of batches."""

    def __iter__(self) -> Iterator[TaskBatch]:  # type: ignore[override]  # a generator, no iterator of DataLoader
        """The batches; the position is read with the first, since the trainer asks for this before it is restored."""
        yield from super().__iter__()

    def state_dict(self) -> dict[str, Any]:
        """Nothing: ``MetaIterations`` starts from the count of batches in the checkpoint."""
        return {}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Nothing to restore; Lightning treats a loader that has both methods as resumable."""
