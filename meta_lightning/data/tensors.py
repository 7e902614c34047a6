"""Tasks over the user's own arrays: of classes, or of sets of points."""

import warnings
from collections import Counter
from collections.abc import Mapping, Sequence

import numpy as np
import torch
from torch import Tensor

from meta_lightning.checks import InputError, require, require_at_least
from meta_lightning.data.base import TaskDataModule
from meta_lightning.tasks import SPLITS, Array, FewShotTasks, Split, TaskBatch, TaskSet

Fractions = tuple[float, float, float]
Splits = dict[Split, list[int]]


class TensorTasks(TaskDataModule):
    """N-way K-shot classification over arrays of one's own.

    ``trainer.fit(MAML(MLP(in_features=20, out_features=5)), TensorTasks(x, y))`` is all it takes. The arrays stay
    on their device, are not copied where their type serves as it is, and do not go into checkpoints.

    Args:
        x: Samples. Floating-point ones are used as they are, in torch's default precision; uint8 is scaled to [0, 1];
            other integers become int64, for embeddings.  # M ...
        y: Class number of each sample, any integers; of names, ``np.unique(names, return_inverse=True)[1]``.  # M
        splits: The class numbers of train, val and test; classes in none are left out, and so may be a split that is
            not asked for (``fit`` validates, unless ``limit_val_batches`` is 0). Default: by ``fractions``.
        fractions: Shares of the classes that go to train, val and test, by lot.
        split_seed: Seed of that lot. It is not ``seed``, so that other tasks never bring a class into another split.
        ways: Classes a task (N).
        shots: Support samples a class (K).
        queries: Query samples a class (Q).
        train_ways: Classes a task in training. Default: ``ways``.
        train_shots: Support samples a class in training, or the least and most of them, to be drawn for each
            meta-batch. Default: ``shots``.
        train_queries: Query samples a class in training. Default: ``queries``.
        meta_batch_size: Tasks a meta-iteration, over all processes together (B).
        epoch_length: Meta-iterations an epoch.
        val_tasks: Validation tasks.
        test_tasks: Test tasks, also those of ``predict``.
        seed: Seed of the tasks.
        num_workers: Processes that load; with 0 the training process does.

    Attributes:
        splits: The class numbers of each split.

    Raises:
        InputError: If an argument is outside its range, or a split cannot give such tasks.
    """

    def __init__(
        self,
        x: Tensor | Array,
        y: Tensor | Array,
        splits: Mapping[Split, Sequence[int]] | None = None,
        fractions: Fractions = (0.6, 0.2, 0.2),
        split_seed: int = 0,
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
    ) -> None:
        splits = as_lists(splits)  # also what is saved: a checkpoint loaded with weights_only holds no arrays
        super().__init__(meta_batch_size, epoch_length, val_tasks, test_tasks, seed, num_workers)
        self.save_hyperparameters(logger=False, ignore=["x", "y"])  # a checkpoint is not the place of the data
        self.ways = ways
        self.shots = shots
        self.queries = queries
        self.train_ways = ways if train_ways is None else train_ways
        self.train_shots = shots if train_shots is None else train_shots
        self.train_queries = queries if train_queries is None else train_queries
        require_at_least(2, ways=ways, train_ways=self.train_ways)
        require_at_least(1, shots=shots, queries=queries, train_queries=self.train_queries)
        self.x, self.y = samples(x, "x"), class_numbers(y)
        require(len(self.x) == len(self.y), f"x and y must be of one length, got {len(self.x)} and {len(self.y)}")
        self.splits = split_numbers(self.y.unique().tolist(), splits, fractions, split_seed, "class numbers of y")
        self.task_sets: dict[Split, FewShotTasks] = {}

    def setup(self, stage: str | None = None) -> None:
        """See that every split with classes can give its tasks; one without is refused when it is asked for."""
        for split in SPLITS:
            if self.splits[split]:
                self.task_set(split)

    def task_set(self, split: Split) -> FewShotTasks:
        """N-way K-shot tasks of the split's classes."""
        if split not in self.task_sets:
            train = split == "train"
            self.task_sets[split] = FewShotTasks(
                self.x,
                self.y,
                self.splits[split],
                self.train_ways if train else self.ways,
                self.train_shots if train else self.shots,
                self.train_queries if train else self.queries,
                self.seed,
                split,
                block=self.meta_batch_size,
            )
        return self.task_sets[split]


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
        splits: The numbers (from 0) of the sets of train, val and test, as in TensorTasks. Default: by ``fractions``.
        fractions: Shares of the sets that go to train, val and test, by lot.
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

    def __init__(
        self,
        tasks: Sequence[tuple[Tensor | Array, Tensor | Array]],
        shots: int = 10,
        queries: int = 10,
        train_shots: int | None = None,
        train_queries: int | None = None,
        splits: Mapping[Split, Sequence[int]] | None = None,
        fractions: Fractions = (0.6, 0.2, 0.2),
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
        self.save_hyperparameters(logger=False, ignore=["tasks"])  # a checkpoint is not the place of the data
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
        self.splits = split_numbers(range(len(self.sets)), splits, fractions, split_seed, "numbers of tasks")

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


def as_lists(splits: Mapping[Split, Sequence[int]] | None) -> Splits | None:
    """Splits as plain lists, whatever holds the numbers.

    Raises:
        InputError: If there are others than train, val and test.
    """
    unknown = [name for name in splits or () if name not in SPLITS]
    require(not unknown, f"splits must have the keys 'train', 'val' and 'test', got {unknown}")
    return None if splits is None else {split: [int(number) for number in part] for split, part in splits.items()}


def split_numbers(
    numbers: Sequence[int],
    splits: Splits | None,
    fractions: Fractions,
    seed: int,
    what: str,
) -> Splits:
    """What belongs to each split: as given, or by lot.

    Args:
        numbers: All there are.
        splits: What the user gives; None for a lot.
        fractions: Shares of train, val and test in the lot.
        seed: Seed of the lot.
        what: What the numbers are, for the messages.

    Raises:
        InputError: If something is in two splits or does not exist, or the shares are not shares.
    """
    require_at_least(0, split_seed=seed)
    if splits is None:
        require(
            len(fractions) == 3 and min(fractions) >= 0 and abs(sum(fractions) - 1) < 1e-6,
            f"fractions must be 3 shares, of train, val and test, with the sum 1, got {tuple(fractions)}",
        )
        bounds = [round(sum(fractions[:i]) * len(numbers)) for i in (1, 2)]
        parts = np.split(np.random.default_rng(seed).permutation(np.array(numbers, dtype=np.int64)), bounds)
        return {split: sorted(part.tolist()) for split, part in zip(SPLITS, parts, strict=True)}
    counts = Counter(number for part in splits.values() for number in part)
    missing = sorted(set(counts) - set(numbers))
    require(not missing, f"splits must hold {what}, got {missing}, which do not occur")
    repeated = sorted(number for number, count in counts.items() if count > 1)
    require(not repeated, f"splits must hold {what} once each, got {repeated} more than once")
    return {split: splits.get(split, []) for split in SPLITS}


def points(x: Tensor | Array, y: Tensor | Array, number: int) -> tuple[Tensor, Tensor]:
    """Inputs and floating-point targets of one set.  # M ..., M D"""
    x, y = samples(x, f"x of task {number}"), samples(y, f"y of task {number}").to(torch.get_default_dtype())
    require(len(x) == len(y), f"x and y of task {number} must be of one length, got {len(x)} and {len(y)}")
    return x.unsqueeze(1) if x.ndim == 1 else x, y.unsqueeze(1) if y.ndim == 1 else y


def samples(x: Tensor | Array, name: str) -> Tensor:
    """Samples as tasks hold them: of torch's default precision, uint8 or int64.

    Raises:
        InputError: If they are not real numbers, or some are NaN or infinite.
    """
    x = as_tensor(x, name)
    require(not x.is_complex() and x.dtype != torch.bool, f"{name} must hold real numbers, got {x.dtype}")
    if not x.is_floating_point():
        return x if x.dtype == torch.uint8 else x.long()
    x = x.to(torch.get_default_dtype())
    spoilt = (~x.isfinite()).nonzero()[:, 0].unique()
    require(
        len(spoilt) == 0,
        f"{name} must be finite, got NaN or infinity in {len(spoilt)} of {len(x)} samples, first in number "
        f"{', '.join(map(str, spoilt[:3].tolist()))}",
    )
    return x


def class_numbers(y: Tensor | Array) -> Tensor:
    """Class numbers, int64.  # M

    Raises:
        InputError: If they are not integers, or not one a sample.
    """
    y = as_tensor(y, "y")
    require(
        not y.is_floating_point() and not y.is_complex(),
        f"y must hold class numbers, integers, got {y.dtype}; RegressionTasks takes floating-point targets",
    )
    require(y.ndim == 1, f"y must be one class number a sample, of shape [M], got shape {list(y.shape)}")
    return y.long().cpu()


def as_tensor(values: Tensor | Array, name: str) -> Tensor:
    """The same values as a tensor outside of any graph, without a copy where that can be."""
    if isinstance(values, Tensor):
        tensor = values.detach()
    else:
        try:
            with warnings.catch_warnings():
                # an array is read-only: nothing writes into it here (https://github.com/pytorch/pytorch/pull/33615)
                warnings.filterwarnings("ignore", "The given NumPy array is not writable")
                tensor = torch.from_numpy(np.ascontiguousarray(values))
        except (TypeError, ValueError) as error:
            raise InputError(f"{name} must be a tensor or an array of numbers, got another: {error}") from None
    require(tensor.ndim > 0, f"{name} must have a dimension of samples, got a single number")
    return tensor
