"""Classification over arrays of one's own."""

import warnings
from collections.abc import Mapping, Sequence

import numpy as np
import torch
from torch import Tensor

from meta_lightning.checks import InputError, require, require_at_least
from meta_lightning.data.base import TaskDataModule
from meta_lightning.data.splits import Fractions, as_lists, split_numbers
from meta_lightning.tasks import SPLITS, Array, FewShotTasks, Split


class TensorTasks(TaskDataModule):
    """N-way K-shot classification over arrays of one's own.

    ``trainer.fit(MAML(MLP(in_features=20, out_features=5)), TensorTasks(x, y))`` is all it takes. The arrays are not
    copied where their type serves as it is, but for a copy on the GPU that trains, where that has room, and do not go
    into checkpoints.

    Args:
        x: Samples. Floating-point ones are used as they are, in torch's default precision; uint8 is scaled to [0, 1];
            other integers become int64, for embeddings.  # M ...
        y: Class number of each sample, any integers; of names, ``np.unique(names, return_inverse=True)[1]``.  # M
        splits: The class numbers of train, val and test; classes in none are left out, and so may be a split that is
            not asked for (``fit`` validates, unless ``limit_val_batches`` is 0). Default: by ``split_fractions``.
        split_fractions: Shares of the classes that go to train, val and test, by lot.
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

    data_arguments = ("x", "y")

    def __init__(
        self,
        x: Tensor | Array,
        y: Tensor | Array,
        splits: Mapping[Split, Sequence[int]] | None = None,
        split_fractions: Fractions = (0.6, 0.2, 0.2),
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
        self.splits = split_numbers(self.y.unique().tolist(), splits, split_fractions, split_seed, "class numbers of y")
        self.placed: Tensor | None = None
        self.task_sets: dict[Split, FewShotTasks] = {}

    def setup(self, stage: str | None = None) -> None:
        """See that every split with classes can give its tasks; one without is refused when it is asked for."""
        self.placed, self.task_sets = None, {}
        for split in SPLITS:
            if self.splits[split]:
                self.task_set(split)

    def task_set(self, split: Split) -> FewShotTasks:
        """N-way K-shot tasks of the split's classes."""
        if self.placed is None:
            self.placed = self.place(self.x)
        if split not in self.task_sets:
            train = split == "train"
            self.task_sets[split] = FewShotTasks(
                self.placed,
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
    # the extremes are NaN or infinite if anything is; to test every value takes more memory than x
    if x.numel() and not torch.stack(x.aminmax()).isfinite().all():
        spoilt = (~x.isfinite()).nonzero()[:, 0].unique().tolist()
        raise InputError(
            f"{name} must be finite, got NaN or infinity in {len(spoilt)} of {len(x)} samples, first in number "
            f"{', '.join(map(str, spoilt[:3]))}"
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
