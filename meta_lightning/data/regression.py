"""Regression over sets of points of one's own."""

from collections.abc import Mapping, Sequence
from dataclasses import field

import torch
from torch import Tensor

from meta_lightning.checks import require
from meta_lightning.data.module import FewShotDataModule, options
from meta_lightning.data.splits import GivenSplit
from meta_lightning.data.tasks import Array, DrawnTasks, Shots, Split, TaskBatch, TaskSet
from meta_lightning.data.tensors import samples


@options
class RegressionTasks(GivenSplit, FewShotDataModule):
    """Few-shot regression over sets of points of one's own: a task is some points of one set.

    Each set is a function to learn: a patient, a machine, a place. The points of a task are drawn from its set without
    replacement. Among every n consecutive tasks of a split of n sets each set comes once, in an order drawn anew, so
    ``test_tasks`` of a multiple of n tests all sets equally often.

    Raises:
        InputError: If an option is outside its range, or a split cannot give such tasks.
    """

    data_arguments = ("tasks",)

    tasks: Sequence[tuple[Tensor | Array, Tensor | Array]] = field(kw_only=False)
    """The sets, each a pair of inputs and targets; sizes may differ. Floating-point inputs are used as they are, in
    torch's default precision, as are all targets; uint8 inputs are scaled to [0, 1]. Plain numbers count as vectors of
    length one.  # M ..., M D"""
    shots: int = 10
    queries: int = 10

    def __post_init__(self) -> None:
        """Take the sets as tensors, and split them."""
        super().__post_init__()
        for number, task in enumerate(self.tasks):
            require(len(task) == 2, f"tasks must hold pairs of inputs and targets, got {len(task)} parts in {number}")
        self.sets = [points(x, y, number) for number, (x, y) in enumerate(self.tasks)]
        self.tasks = self.sets  # whatever they were made of may go
        forms = [[(list(part.shape[1:]), part.dtype) for part in pair] for pair in self.sets]
        for number, came in enumerate(forms):
            require(
                came == forms[0],
                f"tasks must be alike: expected points of {forms[0]} as in task 0, got {came} in {number}",
            )
        self.split(range(len(self.sets)), "numbers of tasks")

    def task_set(self, split: Split) -> TaskSet:
        """Tasks of the split's sets."""
        sets = {number: self.sets[number] for number in self.members[split]}
        return PointTasks(sets, *self.sizes(split), self.seed, split, self.meta_batch_size)


class PointTasks(DrawnTasks):
    """Numbered draws of points from sets."""

    def __init__(
        self,
        sets: Mapping[int, tuple[Tensor, Tensor]],
        shots: Shots,
        queries: int,
        seed: int,
        split: Split,
        block: int,
    ) -> None:
        super().__init__(shots, queries, seed, split, block)
        require(bool(sets), f"the {split} split must have at least 1 of the tasks, got 0")
        smallest = min(sets, key=lambda number: len(sets[number][0]))
        self.require_samples(len(sets[smallest][0]), f"points of task {smallest}")
        self.sets = list(sets.values())

    def batch(self, tasks: Sequence[int]) -> TaskBatch:
        """Points of these tasks' sets.  # T K ..., T K D, T Q ..., T Q D"""
        # a stream of its own beside that of the task of the same number
        streams = {turn: self.rng(turn).spawn(1)[0] for turn in {task // len(self.sets) for task in tasks}}
        orders = {turn: stream.permutation(len(self.sets)) for turn, stream in streams.items()}
        drawn = []
        for task in tasks:
            turn, place = divmod(task, len(self.sets))
            x, y = self.sets[orders[turn][place]]
            rows = torch.from_numpy(self.rng(task).choice(len(x), self.most_shots + self.queries, replace=False))
            drawn.append((x[rows.to(x.device)], y[rows.to(y.device)]))
        x, y = (torch.stack(part) for part in zip(*drawn, strict=True))
        return TaskBatch(*(part[:, samples] for samples in self.parts(tasks) for part in (x, y)))


def points(x: Tensor | Array, y: Tensor | Array, number: int) -> tuple[Tensor, Tensor]:
    """Inputs and floating-point targets of one set.  # M ..., M D"""
    x, y = samples(x, f"x of task {number}"), samples(y, f"y of task {number}").to(torch.get_default_dtype())
    require(len(x) == len(y), f"x and y of task {number} must be of one length, got {len(x)} and {len(y)}")
    return x.unsqueeze(1) if x.ndim == 1 else x, y.unsqueeze(1) if y.ndim == 1 else y
