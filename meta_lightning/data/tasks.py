"""Tasks for meta-training and evaluation, each a function of (seed, split, number) alone."""

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import InitVar, dataclass
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor
from torch.utils.data import Dataset

from meta_lightning.checks import InputError, require
from meta_lightning.data.streams import generators

Array = npt.NDArray[Any]
Split = Literal["train", "val", "test"]
Count = int | tuple[int, int]  # a number, or its minimum and maximum
LabelSpace = Literal["task", "split"]
SPLITS: tuple[Split, ...] = ("train", "val", "test")


class TaskBatch(NamedTuple):
    """A meta-batch: T tasks, each with a support and a query set.

    uint8 samples are pixels, which the learner scales to [0, 1] on its device. Targets are int64 class numbers for
    classification, 0 … N-1 unless ``train_labels`` is "split", and floating point for regression.
    """

    support_x: Tensor  # T S ...
    support_y: Tensor  # T S (classification), T S D (regression)
    query_x: Tensor  # T R ...
    query_y: Tensor  # T R (classification), T R D (regression)


def least_and_most(count: Count, argument: str, lowest: int = 1) -> tuple[int, int]:
    """The minimum and maximum of a number that must be at least ``lowest``."""
    pair = count if isinstance(count, Sequence) else (count, count)
    least, most = pair if len(pair) == 2 else (0, 0)
    expected = f"{argument} must be at least {lowest}, or a range (min, max) from {lowest}"
    require(lowest <= least <= most, f"{expected}, got {count}")
    return least, most


def group_of(class_name: str) -> str:
    """The group of a class: the folder in its name, or the whole name where there is none."""
    return class_name.rpartition("/")[0] or class_name


class TaskSet(ABC):
    """The endless, numbered tasks of one split; task ``i`` depends on the seed, the split and ``i`` alone."""

    def __init__(self, seed: int, split: Split) -> None:
        self.seed, self.split = seed, split

    @property
    def entropy(self) -> tuple[int, int]:
        """What the random numbers of all tasks depend on."""
        return self.seed, SPLITS.index(self.split)

    def rng(self, *task: int) -> np.random.Generator:
        """The random number generator of one task, a function of (seed, split, task) alone."""
        return np.random.default_rng((*self.entropy, *task))

    @abstractmethod
    def batch(self, tasks: Sequence[int]) -> TaskBatch:
        """The tasks with these numbers, stacked in that order."""

    def class_names(self, task: int) -> list[str]:
        """The names of a task's labels 0, 1, …; empty where classes have no names."""
        return []

    def class_groups(self, task: int) -> list[str]:
        """The groups of a task's labels 0, 1, …, such as alphabets. Default: see ``group_of``."""
        return [*map(group_of, self.class_names(task))]


@dataclass(eq=False, kw_only=True)
class DrawnTasks(TaskSet):
    """Tasks that draw their samples at once: those of the maximum number of shots, then the queries."""

    shots: Count  # support samples (K), per class or, for regression, per task
    queries: int  # query samples (Q)
    seed: int
    split: Split
    block: int = 1  # tasks that share a number drawn from a range, such as K: those of a meta-batch

    def __post_init__(self) -> None:
        self.least_shots, self.most_shots = least_and_most(self.shots, "shots")
        self.drawn = self.most_shots + self.queries

    @property
    def sample_counts(self) -> tuple[tuple[int, int], tuple[int, int]]:
        """The minimum and maximum number of support samples of a task, and of its queries."""
        return (self.least_shots, self.most_shots), (self.queries, self.queries)

    def require_samples(self, fewest: int, what: str) -> None:
        """Refuse tasks of more samples than the smallest set that they are drawn from."""
        limit = f"at most {fewest}, the {what} of the {self.split} split"
        require(self.drawn <= fewest, f"shots + queries must be {limit}, got {self.most_shots} + {self.queries}")

    def parts(self, tasks: Sequence[int]) -> tuple[slice, slice]:
        """The positions of the support and the query samples among the samples drawn for a block's tasks."""
        shots = self.shared(tasks[0], self.least_shots, self.most_shots)
        return slice(shots), slice(self.most_shots, None)

    def shared(self, task: int, least: int, most: int, *stream: int) -> int:
        """A number from ``least`` to ``most``, the same for all tasks of this task's block."""
        if least == most:
            return most
        return int(self.rng(task // self.block, self.block, *stream).integers(least, most, endpoint=True))


@dataclass(eq=False)
class FewShotTasks(DrawnTasks):
    """N-way K-shot classification tasks, described by learn2learn and gathered on the device of the samples."""

    images: Tensor  # M C H W, or any samples; shared by all splits
    labels: InitVar[Tensor]  # M: class number of each sample
    classes: Sequence[int]  # class numbers of this split
    ways: Count  # classes per task (N)
    source: str | Path | None = None  # .npy file that ``images`` is mapped from, as other processes map it
    names: Sequence[str] = ()  # of ``classes``; default: their numbers
    groups: Sequence[str] = ()  # of ``classes``; default: see ``group_of``
    label_space: LabelSpace = "task"  # whose classes the labels number: those of the task, or ``classes``
    ways_argument: str = "ways"  # name of ``ways`` in messages

    def __post_init__(self, labels: Tensor) -> None:
        """Check that the split has the classes and samples of a task (InputError)."""
        super().__post_init__()
        order = np.argsort(labels.numpy(), kind="stable")
        starts, stops = (np.searchsorted(labels.numpy(), self.classes, side, order) for side in ("left", "right"))
        rows = [order[start:stop] for start, stop in zip(starts, stops, strict=True)]
        self.least_ways, self.most_ways = least_and_most(self.ways, self.ways_argument, 2)
        if self.most_ways > len(rows):
            limit = f"from 2 to {len(rows)} (classes of the {self.split} split)"
            raise InputError(f"{self.ways_argument} must be {limit}, got {self.ways}")
        sizes = {*map(len, rows)}
        self.require_samples(min(sizes), "samples of the smallest class")
        self.names = self.names or [*map(str, self.classes)]
        self.groups = self.groups or [*map(group_of, self.names)]
        self.rows_by_class = np.stack(rows) if len(sizes) == 1 else rows
        self.describe()

    def describe(self) -> None:
        """Make learn2learn's data set, which holds no samples since ``batch`` gathers them by their numbers."""
        members = {label: rows.tolist() for label, rows in enumerate(self.rows_by_class)}
        self.dataset = import_learn2learn().data.MetaDataset(Dataset[int](), labels_to_indices=members)

    def __getstate__(self) -> dict[str, Any]:
        """Without learn2learn's objects, which do not pickle, and without images that can be mapped from a file."""
        left_out = {"dataset", "images"} if self.source else {"dataset"}
        return {name: value for name, value in self.__dict__.items() if name not in left_out}

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Map the images and make learn2learn's data set again."""
        self.__dict__.update(state)
        if self.source:
            self.images = torch.from_numpy(np.load(self.source, mmap_mode="c", allow_pickle=False))
        self.describe()

    @property
    def sample_counts(self) -> tuple[tuple[int, int], tuple[int, int]]:
        """The minimum and maximum number of support samples of a task, and of its queries."""
        support, query = ((least * self.least_ways, most * self.most_ways) for least, most in super().sample_counts)
        return support, query

    def drawn_ways(self, task: int) -> int:
        """Classes of a task (N), which the tasks of its block share; independent of their shots."""
        return self.shared(task, self.least_ways, self.most_ways, 1)

    def choose(self, rng: np.random.Generator, ways: int) -> Array:
        """A task's classes, its first random draw, as indices of ``classes``.  # N"""
        return rng.choice(len(self.rows_by_class), ways, replace=False)

    def rows(self, rng: np.random.Generator, ways: int | None = None) -> list[int]:
        """Sample numbers of a new task, class by class: N * (K + Q) of them, K the maximum number of shots.

        ``ways`` is N. Default: the maximum.
        """
        # learn2learn's NWays and KShots use Python's global random state, which is the same on each rank
        data = import_learn2learn().data

        def draw(description: Any) -> list[Any]:
            """Task transform that draws N ways and, of each, its samples without replacement."""
            classes, members = self.choose(rng, ways or self.most_ways), self.rows_by_class
            if isinstance(members, list):
                drawn = np.stack([rng.permuted(members[c])[: self.drawn] for c in classes])
            else:
                drawn = rng.permuted(members[classes], axis=1)[:, : self.drawn]  # N K+Q, the same numbers but faster
            return [*map(data.DataDescription, drawn.flatten().tolist())]

        # never index a Taskset: it ignores the index and draws in order of access
        return [description.index for description in data.Taskset(self.dataset, draw).sample_task_description()]

    def class_names(self, task: int) -> list[str]:
        """The names of a task's labels: of its N classes, or of all classes of the split."""
        return [self.names[c] for c in self.labelled(task)]

    def class_groups(self, task: int) -> list[str]:
        """The groups of a task's labels: of its N classes, or of all classes of the split."""
        return [self.groups[c] for c in self.labelled(task)]

    def labelled(self, task: int) -> Array:
        """The class that each label of a task stands for, as an index of ``classes``.  # N, or all classes"""
        if self.label_space == "split":
            return np.arange(len(self.rows_by_class))
        return self.choose(self.rng(task), self.drawn_ways(task))

    def batch(self, tasks: Sequence[int]) -> TaskBatch:
        """Gather the images of a block's tasks, unchanged and on their device."""
        T, N = len(tasks), self.drawn_ways(tasks[0])
        rows = torch.tensor([self.rows(rng, N) for rng in generators(self.entropy, tasks)]).view(T, N, -1)  # T N K+Q
        labels = self.labels_of(tasks, N).unsqueeze(2).expand(rows.shape)

        def part(samples: slice) -> tuple[Tensor, Tensor]:
            index = rows[:, :, samples].flatten(1)  # T N*samples
            x = self.images.index_select(0, index.flatten().to(self.images.device))
            return x.unflatten(0, index.shape), labels[:, :, samples].flatten(1)

        support, query = self.parts(tasks)
        return TaskBatch(*part(support), *part(query))

    def labels_of(self, tasks: Sequence[int], ways: int) -> Tensor:
        """The label of each class of these tasks, on the device of the samples.  # T N"""
        if self.label_space == "task":
            return torch.arange(ways, device=self.images.device).expand(len(tasks), ways)
        chosen = [self.choose(rng, ways) for rng in generators(self.entropy, tasks)]
        return torch.from_numpy(np.stack(chosen)).to(self.images.device)


def as_task_batch(parts: Sequence[Tensor]) -> TaskBatch:
    """The four tensors of a ``TaskBatch``, from any loader, with pixels scaled to [0, 1].

    Raises:
        InputError: If these are not four tensors of the same number of tasks.
    """
    if len(parts) != 4 or isinstance(parts, Mapping):
        came = f"{type(parts).__name__} of {len(parts)}"
        raise InputError(f"batches must be a tuple ({', '.join(TaskBatch._fields)}), got {came}")
    fields = getattr(parts, "_fields", TaskBatch._fields)
    if fields != TaskBatch._fields and {*fields} == {*TaskBatch._fields}:
        raise InputError(f"batches must be a tuple ({', '.join(TaskBatch._fields)}), got ({', '.join(fields)})")
    for name, part in zip(TaskBatch._fields, parts, strict=True):
        if not isinstance(part, Tensor):
            raise InputError(f"{name} must be a tensor, got {type(part).__name__}")
        if part.ndim < 2 or len(part) != len(parts[0]):
            raise InputError(
                f"{name} must have the shape T S ..., tasks by samples, with as many tasks as support_x; "
                f"got {list(part.shape)} and {list(parts[0].shape)} of support_x"
            )
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
