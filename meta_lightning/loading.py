"""From numbered tasks to meta-batches: which meta-iteration and which rank meets which."""

import sys
from collections.abc import Callable, Iterator
from typing import Any

from torch.utils.data import DataLoader, Dataset, DistributedSampler

from meta_lightning.checks import require
from meta_lightning.tasks import TaskBatch, TaskSet


class MetaBatches(Dataset[TaskBatch]):
    """Meta-batch ``j`` of a task set, as one rank sees it: a function of the meta-iteration j alone.

    Rank r of R takes tasks r, r + R, r + 2R, …, so the ranks' shares of meta-batch j are disjoint and together tasks
    j*B … (j+1)*B - 1, and where the number of tasks is bounded each is met once.

    Args:
        tasks: The tasks.
        meta_batch_size: Tasks a meta-batch, over all ranks together (B).
        num_tasks: Stop after this many tasks; None for an endless stream.
        rank: This process' number.
        world_size: Number of processes (R).

    Raises:
        InputError: If the ranks cannot share a meta-batch evenly, or there are fewer tasks than ranks.
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


def class_names_of(loader: Any, iteration: int, tasks: int) -> list[list[str]]:
    """The names of the classes of each task of a meta-batch; none of a loader that is not of this package.

    Args:
        loader: A loader of tasks.
        iteration: The meta-batch's number in an evaluation.
        tasks: The number of its tasks.
    """
    batches = getattr(loader, "dataset", None)
    if not isinstance(batches, MetaBatches):
        return [[]] * tasks
    return [batches.tasks.class_names(number) for number in batches.numbers(iteration)]


class MetaIterations(DistributedSampler[TaskBatch]):
    """The meta-iterations of one epoch, from wherever training stands.

    A DistributedSampler by type only: the ranks' shares are made in ``MetaBatches``, and Lightning would put a
    DistributedSampler, which pads and so repeats tasks, in the place of any other sampler.

    Args:
        batches: The meta-batches.
        length: Meta-iterations an epoch.
        start: Called at each epoch's start for the first meta-iteration.
    """

    def __init__(self, batches: MetaBatches, length: int, start: Callable[[], int]) -> None:
        super().__init__(batches, num_replicas=1, rank=0, shuffle=False)
        self.length = length
        self.start = start

    def __iter__(self) -> Iterator[Any]:
        start = self.start()
        return iter(range(start, start + self.length))

    def __len__(self) -> int:
        return self.length


class TaskLoader(DataLoader[TaskBatch]):
    """Loads meta-batches by their meta-iteration; resumable, since its place is the trainer's count of batches."""

    def state_dict(self) -> dict[str, Any]:
        """Nothing to keep: ``MetaIterations`` starts from the count of batches, which the checkpoint holds."""
        return {}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Nothing to restore; that the pair of methods exists tells Lightning that a mid-epoch resume is exact."""
