"""Group numbered tasks into meta-batches, and shard them over ranks."""

import sys
from collections.abc import Callable, Iterator
from typing import Any

from torch.utils.data import DataLoader, Dataset, DistributedSampler

from meta_lightning.checks import require
from meta_lightning.data.tasks import TaskBatch, TaskSet


class MetaBatches(Dataset[TaskBatch]):
    """Meta-batch ``j`` of a task set, as one rank sees it: a function of the meta-iteration j alone.

    Rank r of R takes tasks r, r + R, r + 2R, …, so the ranks' shares of meta-batch j are disjoint and together tasks
    j*B … (j+1)*B - 1, and where the number of tasks is bounded each is met once.
    """

    def __init__(
        self, tasks: TaskSet, meta_batch_size: int, num_tasks: int | None = None, rank: int = 0, world_size: int = 1
    ) -> None:
        require(
            meta_batch_size > 0 and meta_batch_size % world_size == 0,
            f"meta_batch_size must be a positive multiple of the number of processes, {world_size}, "
            f"got {meta_batch_size}",
        )
        require(
            num_tasks is None or num_tasks >= world_size,
            f"the number of {tasks.split} tasks must be at least the number of processes, {world_size}, "
            f"got {num_tasks}",
        )
        self.tasks = tasks
        self.share = meta_batch_size // world_size
        self.mine = range(rank, sys.maxsize if num_tasks is None else num_tasks, world_size)

    def __len__(self) -> int:
        return -(-len(self.mine) // self.share)

    def __getitem__(self, iteration: int) -> TaskBatch:
        return self.tasks.batch(self.numbers(iteration))

    def numbers(self, iteration: int) -> range:
        """The numbers of a meta-batch's tasks."""
        return self.mine[iteration * self.share : (iteration + 1) * self.share]


def class_names_of(loader: Any, iteration: int, tasks: int, groups: bool = False) -> list[list[str]]:
    """The names of the classes of each task of a meta-batch, or their groups; none of a loader of another package."""
    batches = getattr(loader, "dataset", None)
    if not isinstance(batches, MetaBatches):
        return [[]] * tasks
    names = batches.tasks.class_groups if groups else batches.tasks.class_names
    return [names(number) for number in batches.numbers(iteration)]


class MetaIterations(DistributedSampler[TaskBatch]):
    """The meta-iterations of one epoch, from wherever training stands.

    A DistributedSampler by type only: the ranks' shares are made in ``MetaBatches``, and Lightning would put a
    DistributedSampler, which pads and so repeats tasks, in the place of any other sampler.
    """

    def __init__(self, batches: MetaBatches, length: int, start: Callable[[], int]) -> None:
        super().__init__(batches, num_replicas=1, rank=0, shuffle=False)
        self.num_samples, self.start = length, start

    def __iter__(self) -> Iterator[Any]:
        start = self.start()
        return iter(range(start, start + self.num_samples))


class TaskLoader(DataLoader[TaskBatch]):
    """Loads meta-batches by their meta-iteration; resumable, since its place is the trainer's count of batches."""

    def state_dict(self) -> dict[str, Any]:
        """Nothing to keep: ``MetaIterations`` starts from the count of batches, which the checkpoint holds."""
        return {}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Nothing to restore; that the pair of methods exists tells Lightning that a mid-epoch resume is exact."""
