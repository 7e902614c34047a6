"""Regression over sets of points of one's own."""

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from meta_lightning.checks import require, require_at_least
from meta_lightning.data.base import TaskDataModule
from meta_lightning.data.splits import Fractions, as_lists, split_numbers
from meta_lightning.data.tensors import samples
from meta_lightning.tasks import SPLITS, Array, Split, TaskBatch, TaskSet


class RegressionTasks(TaskDataModule):
    """Few-shot regression over sets of points of one's own: a task is some points of one set.

    Each set is a function to learn: a patient, a machine, a place. The points of a task are drawn from its set without
    replacement. Among every n consecutive tasks of a split of n sets each set comes once, in an order drawn anew, so
    ``test_tasks`` of a multiple of n tests all sets equally often.

    Args:
        tasks: The sets, each a pair of inputs and targets; sizes may differ. Floating-point inputs are used as they
            are, in torch's default precision, as are all targets; uint8 inputs are scaled to [0, 1]. Plain numbers
            count as vectors of length one.  # M ..., M D
        shots: Support points (K).
        queries: Query points (Q).
        train_shots: Support points in training. Default: ``shots``.
        train_queries: Query points in training. Default: ``queries``.
        splits: The numbers (from 0) of the sets of train, val and test, as in TensorTasks. Default: by
            ``split_fractions``.
        split_fractions: Shares of the sets that go to train, val and test, by lot.
        split_seed: Seed of that lot. It is not ``seed``, so that other tasks never bring a set into another split.
        meta_batch_size: Tasks a meta-iteration, over all processes together (B).
        epoch_length: Meta-iterations an epoch.
        val_tasks: Validation tasks.
        test_tasks: Test tasks, also those of ``predict``.
        seed: Seed of the tasks.
        num_workers: Processes that load; with 0 the training process does.

    Attributes:
        splits: The numbers of the sets of each split.

    Raises:
        InputError: If an argument is outside its range, or a split cannot give such tasks.
    """

    data_arguments = ("tasks",)

    def __init__(
        self,
        tasks: Sequence[tuple[Tensor | Array, Tensor | Array]],
        shots: int = 10,
        queries: int = 10,
        train_shots: int | None = None,
        train_queries: int | None = None,
        splits: Mapping[Split, Sequence[int]] | None = None,
        split_fractions: Fractions = (0.6, 0.2, 0.2),
        split_seed: int = 0,
        meta_batch_size: int = 16,
        epoch_length: int = 500,
        val_tasks: int = 200,
        test_tasks: int = 600,
        seed: int = 0,
        num_workers: int = 0,
    ) -> None:
        splits = as_lists(splits)  # also what is saved: a checkpoint loaded with weights_only holds no arrays
        super().__init__(meta_batch_size, epoch_length, val_tasks, test_tasks, seed, num_workers)
        self.shots = shots
        self.queries = queries
        self.train_shots = shots if train_shots is None else train_shots
        self.train_queries = queries if train_queries is None else train_queries
        require_at_least(
            1, shots=shots, queries=queries, train_shots=self.train_shots, train_queries=self.train_queries
        )
        for number, task in enumerate(tasks):
            require(len(task) == 2, f"tasks must hold pairs of inputs and targets, got {len(task)} parts in {number}")
        self.sets = [points(x, y, number) for number, (x, y) in enumerate(tasks)]
        for number, (x, y) in enumerate(self.sets):
            first = [(list(part.shape[1:]), part.dtype) for part in self.sets[0]]
            came = [(list(part.shape[1:]), part.dtype) for part in (x, y)]
            require(
                came == first, f"tasks must be alike: expected points of {first} as in task 0, got {came} in {number}"
            )
        self.splits = split_numbers(range(len(self.sets)), splits, split_fractions, split_seed, "numbers of tasks")

    def setup(self, stage: str | None = None) -> None:
        """See that every split with sets can give its tasks; one without is refused when it is asked for."""
        for split in SPLITS:
            if self.splits[split]:
                self.task_set(split)

    def task_set(self, split: Split) -> TaskSet:
        """Tasks of the split's sets."""
        shots, queries = (self.train_shots, self.train_queries) if split == "train" else (self.shots, self.queries)
        sets = {number: self.sets[number] for number in self.splits[split]}
        return PointTasks(sets, shots, queries, self.seed, split)


class PointTasks(TaskSet):
    """Numbered draws of points from sets.

    Args:
        sets: Inputs and targets of each set, by its number.  # M ..., M D
        shots: Support points (K).
        queries: Query points (Q).
        seed: Seed of the tasks.
        split: The split's name.

    Raises:
        InputError: If there is no set, or one has fewer than ``shots + queries`` points.
    """

    def __init__(
        self, sets: Mapping[int, tuple[Tensor, Tensor]], shots: int, queries: int, seed: int, split: Split
    ) -> None:
        super().__init__(seed, split)
        require(bool(sets), f"the {split} split must have at least 1 of the tasks, got 0")
        smallest = min(sets, key=lambda number: len(sets[number][0]))
        fewest = len(sets[smallest][0])
        require(
            shots + queries <= fewest,
            f"shots + queries must be at most {fewest}, the points of task {smallest} of the {split} split, "
            f"got {shots} + {queries}",
        )
        self.sets = list(sets.values())
        self.shots = shots
        self.queries = queries

    def batch(self, tasks: Sequence[int]) -> TaskBatch:
        """Points of these tasks' sets.  # T K ..., T K D, T Q ..., T Q D"""
        orders = {turn: self.order(turn) for turn in {task // len(self.sets) for task in tasks}}
        drawn = []
        for task in tasks:
            turn, place = divmod(task, len(self.sets))
            x, y = self.sets[orders[turn][place]]
            rows = torch.from_numpy(self.rng(task).choice(len(x), self.shots + self.queries, replace=False))
            drawn.append((x[rows.to(x.device)], y[rows.to(y.device)]))
        x, y = (torch.stack(part) for part in zip(*drawn, strict=True))
        K = self.shots
        return TaskBatch(x[:, :K], y[:, :K], x[:, K:], y[:, K:])

    def order(self, turn: int) -> Array:
        """The order of the sets in a turn of as many tasks."""
        # a stream of its own beside that of the task of the same number
        return self.rng(turn).spawn(1)[0].permutation(len(self.sets))


def points(x: Tensor | Array, y: Tensor | Array, number: int) -> tuple[Tensor, Tensor]:
    """Inputs and floating-point targets of one set.  # M ..., M D"""
    x, y = samples(x, f"x of task {number}"), samples(y, f"y of task {number}").to(torch.get_default_dtype())
    require(len(x) == len(y), f"x and y of task {number} must be of one length, got {len(x)} and {len(y)}")
    return x.unsqueeze(1) if x.ndim == 1 else x, y.unsqueeze(1) if y.ndim == 1 else y
