"""Tasks for meta-training and evaluation, each a function of (seed, split, number) alone."""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import InitVar, dataclass, field
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor
from torch.utils.data import Dataset

from meta_lightning.checks import InputError, require

Array = npt.NDArray[Any]
Split = Literal["train", "val", "test"]
Shots = int | tuple[int, int]  # a number, or its minimum and maximum
SPLITS: tuple[Split, ...] = ("train", "val", "test")


class TaskBatch(NamedTuple):
    """A meta-batch: T tasks, each with a support and a query set.

    uint8 samples are pixels, which the learner scales to [0, 1] on its device. Targets are int64 class numbers 0 … N-1
    for classification and floating point for regression.
    """

    support_x: Tensor  # T S ...
    support_y: Tensor  # T S (classification), T S D (regression)
    query_x: Tensor  # T R ...
    query_y: Tensor  # T R (classification), T R D (regression)


def least_and_most(shots: Shots, argument: str = "shots") -> tuple[int, int]:
    """The minimum and maximum of a number of shots."""
    pair = shots if isinstance(shots, Sequence) else (shots, shots)
    least, most = pair if len(pair) == 2 else (0, 0)
    require(1 <= least <= most, f"{argument} must be at least 1, or a range (min, max) from 1, got {shots}")
    return least, most


def group_of(class_name: str) -> str:
    """The group of a class: the folder in its name, or the whole name where there is none."""
    return class_name.rpartition("/")[0] or class_name


class TaskSet(ABC):
    """The endless, numbered tasks of one split; task ``i`` depends on the seed, the split and ``i`` alone."""

    def __init__(self, seed: int, split: Split) -> None:
        self.seed, self.split = seed, split

    def rng(self, *task: int) -> np.random.Generator:
        """The random number generator of one task, a function of (seed, split, task) alone."""
        return np.random.default_rng((self.seed, SPLITS.index(self.split), *task))

    @abstractmethod
    def batch(self, tasks: Sequence[int]) -> TaskBatch:
        """The tasks with these numbers, stacked in that order."""

    def class_names(self, task: int) -> list[str]:
        """The names of a task's classes 0 … N-1; empty where classes have no names."""
        return []

    def class_groups(self, task: int) -> list[str]:
        """The groups of a task's classes 0 … N-1, such as their alphabets. Default: see ``group_of``."""
        return [*map(group_of, self.class_names(task))]


@dataclass(eq=False, kw_only=True)
class DrawnTasks(TaskSet):
    """Tasks that draw their samples at once: those of the maximum number of shots, then the queries."""

    shots: Shots  # support samples (K), per class or, for regression, per task
    queries: int  # query samples (Q)
    seed: int
    split: Split
    block: int = 1  # tasks that share K, if ``shots`` is a range: those of a meta-batch

    def __post_init__(self) -> None:
        """Check the shots."""
        self.least_shots, self.most_shots = least_and_most(self.shots)
        self.drawn = self.most_shots + self.queries

    def require_samples(self, fewest: int, what: str) -> None:
        """Refuse tasks of more samples than the smallest set that they are drawn from."""
        if self.drawn > fewest:
            allowed = f"at most {fewest}, the {what} of the {self.split} split"
            raise InputError(f"shots + queries must be {allowed}, got {self.most_shots} + {self.queries}")

    def parts(self, tasks: Sequence[int]) -> tuple[slice, slice]:
        """The positions of the support and the query samples among the samples drawn for a block's tasks."""
        shots = self.most_shots
        if self.least_shots < self.most_shots:
            rng = self.rng(tasks[0] // self.block, self.block)
            shots = int(rng.integers(self.least_shots, self.most_shots, endpoint=True))
        return slice(shots), slice(self.most_shots, None)


@dataclass
class FewShotTransform:
    """learn2learn task transform that draws N ways and, of each, its samples without replacement."""

    rows_by_class: Array | list[Array]
    ways: int
    samples: int
    # set for each task; learn2learn's NWays and KShots use Python's global random, the same on each rank
    rng: np.random.Generator = field(default_factory=np.random.default_rng)

    def __call__(self, description: Any) -> list[Any]:
        """A new task description: ``ways * samples`` learn2learn data descriptions, class by class."""
        classes = self.choose(self.rng)
        if isinstance(self.rows_by_class, list):
            drawn = np.stack([self.rng.permuted(self.rows_by_class[c])[: self.samples] for c in classes])
        else:
            drawn = self.rng.permuted(self.rows_by_class[classes], axis=1)[:, : self.samples]  # N K+Q
        return [*map(import_learn2learn().data.DataDescription, drawn.flatten().tolist())]

    def choose(self, rng: np.random.Generator) -> Array:
        """A task's classes, its first random draw, as indices of ``rows_by_class``.  # N"""
        return rng.choice(len(self.rows_by_class), self.ways, replace=False)


@dataclass(eq=False)
class FewShotTasks(DrawnTasks):
    """N-way K-shot classification tasks, described by learn2learn and gathered on the device of the samples."""

    images: Tensor  # M C H W, or any samples; shared by all splits
    labels: InitVar[Tensor]  # M: class number of each sample
    classes: Sequence[int]  # class numbers of this split
    ways: int  # classes per task (N)
    source: str | Path | None = None  # .npy file that ``images`` is mapped from, as other processes map it
    names: Sequence[str] = ()  # of ``classes``; default: their numbers
    groups: Sequence[str] = ()  # of ``classes``; default: see ``group_of``

    def __post_init__(self, labels: Tensor) -> None:
        """Check that the split has the classes and samples of a task (InputError)."""
        super().__post_init__()
        rows = group_rows(labels.numpy(), self.classes)
        if not 2 <= self.ways <= len(rows):
            raise InputError(f"ways must be from 2 to {len(rows)} (classes of the {self.split} split), got {self.ways}")
        self.require_samples(min(map(len, rows)), "samples of the smallest class")
        self.names = self.names or [*map(str, self.classes)]
        self.groups = self.groups or [*map(group_of, self.names)]
        one_size = len({*map(len, rows)}) == 1
        self.transform = FewShotTransform(np.stack(rows) if one_size else rows, self.ways, self.drawn)
        self.describe()

    def describe(self) -> None:
        """Make learn2learn's task set."""
        data = import_learn2learn().data
        members = {label: rows.tolist() for label, rows in enumerate(self.transform.rows_by_class)}
        # the data set is empty, since ``batch`` gathers the samples by their numbers
        self.taskset = data.Taskset(data.MetaDataset(Dataset[int](), labels_to_indices=members), [self.transform])

    def __getstate__(self) -> dict[str, Any]:
        """Without learn2learn's objects, which do not pickle, and without images that can be mapped from a file."""
        left_out = {"taskset", "images"} if self.source else {"taskset"}
        return {name: value for name, value in self.__dict__.items() if name not in left_out}

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Map the images and make learn2learn's task set again."""
        self.__dict__.update(state)
        if self.source:
            self.images = torch.from_numpy(np.load(self.source, mmap_mode="c", allow_pickle=False))
        self.describe()

    def rows(self, task: int) -> list[int]:
        """Sample numbers of one task, class by class: N * (K + Q) of them, K the maximum number of shots."""
        self.transform.rng = self.rng(task)
        # never index the Taskset: it ignores the index, draws in order of access and caches
        return [description.index for description in self.taskset.sample_task_description()]

    def class_names(self, task: int) -> list[str]:
        """The names of a task's classes 0 … N-1."""
        return [self.names[c] for c in self.transform.choose(self.rng(task))]

    def class_groups(self, task: int) -> list[str]:
        """The groups of a task's classes 0 … N-1."""
        return [self.groups[c] for c in self.transform.choose(self.rng(task))]

    def batch(self, tasks: Sequence[int]) -> TaskBatch:
        """Gather the images of these tasks, unchanged and on their device."""
        T, N = len(tasks), self.ways
        rows = torch.tensor([self.rows(task) for task in tasks]).view(T, N, -1)  # T N K+Q
        labels = torch.arange(N, device=self.images.device).view(1, N, 1).expand(rows.shape)

        def part(samples: slice) -> tuple[Tensor, Tensor]:
            index = rows[:, :, samples].flatten(1)  # T N*samples
            x = self.images.index_select(0, index.flatten().to(self.images.device))
            return x.unflatten(0, index.shape), labels[:, :, samples].flatten(1)

        support, query = self.parts(tasks)
        return TaskBatch(*part(support), *part(query))


def group_rows(labels: Array, classes: Sequence[int]) -> list[Array]:
    """The rows of each of these classes, in the order of ``classes``."""
    order = np.argsort(labels, kind="stable")
    in_order = labels[order]
    starts, stops = (np.searchsorted(in_order, classes, side=side) for side in ("left", "right"))
    return [order[start:stop] for start, stop in zip(starts, stops, strict=True)]


def as_task_batch(parts: Sequence[Tensor]) -> TaskBatch:
    """The four tensors of a ``TaskBatch``, from any loader, with pixels scaled to [0, 1]."""
    support_x, support_y, query_x, query_y = parts
    return TaskBatch(scale_pixels(support_x), support_y, scale_pixels(query_x), query_y)


def scale_pixels(x: Tensor) -> Tensor:
    """Scale uint8 pixels to [0, 1] in torch's default dtype; return other samples unchanged."""
    return x.to(torch.get_default_dtype()).div_(255) if x.dtype == torch.uint8 else x


def import_learn2learn() -> Any:
    """learn2learn, without the notice that gym prints; importing it takes seconds."""
    from gym_notices import notices

    notices.notices.clear()
    import learn2learn

    return learn2learn
