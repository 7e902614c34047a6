"""Tasks: what a meta-learner is trained and tested on, each a function of (seed, split, number) alone."""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor
from torch.utils.data import Dataset

from meta_lightning.checks import require

Array = npt.NDArray[Any]
Split = Literal["train", "val", "test"]
Shots = int | tuple[int, int]  # a number, or the least and the most
SPLITS: tuple[Split, ...] = ("train", "val", "test")


class TaskBatch(NamedTuple):
    """A meta-batch: T tasks side by side, each with a support and a query set.

    Samples of uint8 are pixels, which the learner scales to [0, 1] on its device. Targets are int64 class numbers
    0 … N-1 for classification, floating point for regression.
    """

    support_x: Tensor  # T S ...
    support_y: Tensor  # T S (classification), T S D (regression)
    query_x: Tensor  # T R ...
    query_y: Tensor  # T R (classification), T R D (regression)


def least_and_most(shots: Shots, argument: str = "shots") -> tuple[int, int]:
    """A number of shots, or a range of them, as a range."""
    pair = shots if isinstance(shots, Sequence) else (shots, shots)
    least, most = pair if len(pair) == 2 else (0, 0)
    require(1 <= least <= most, f"{argument} must be a number of at least 1, or a range (least, most), got {shots}")
    return least, most


def group_of(class_name: str) -> str:
    """What a class belongs to: the folder before its name, where there is one; else the class itself."""
    return class_name.rpartition("/")[0] or class_name


class TaskSet(ABC):
    """The endless, numbered tasks of one split: task ``i`` is the same whoever asks for it, and when.

    Args:
        seed: Seed of the tasks.
        split: The split that the tasks belong to; the splits of one seed have unrelated tasks.
    """

    def __init__(self, seed: int, split: Split) -> None:
        self.seed = seed
        self.split = split

    def rng(self, task: int) -> np.random.Generator:
        """The random numbers of one task, a function of (seed, split, task) alone."""
        return np.random.default_rng((self.seed, SPLITS.index(self.split), task))

    @abstractmethod
    def batch(self, tasks: Sequence[int]) -> TaskBatch:
        """The tasks of these numbers, stacked in that order."""

    def class_names(self, task: int) -> list[str]:
        """The names of a task's classes 0 … N-1; none where they have none."""
        return []

    def class_groups(self, task: int) -> list[str]:
        """The groups of a task's classes 0 … N-1, such as their alphabets. Default: see ``group_of``."""
        return [*map(group_of, self.class_names(task))]


class DrawnTasks(TaskSet):
    """Tasks whose samples are drawn together: those of the support set, the most shots, before the queries."""

    def __init__(self, shots: Shots, queries: int, seed: int, split: Split, block: int) -> None:
        super().__init__(seed, split)
        self.least_shots, self.most_shots = least_and_most(shots)
        self.queries, self.block = queries, block

    def require_samples(self, fewest: int, what: str) -> None:
        """Refuse tasks that take more samples than there are in the smallest set that they are drawn from."""
        require(
            self.most_shots + self.queries <= fewest,
            f"shots + queries must be at most {fewest}, the {what} of the {self.split} split, "
            f"got {self.most_shots} + {self.queries}",
        )

    def shots(self, task: int) -> int:
        """Support samples (of each class) in the block of tasks that a task belongs to."""
        if self.least_shots == self.most_shots:
            return self.most_shots
        rng = np.random.default_rng((self.seed, SPLITS.index(self.split), task // self.block, self.block))
        return int(rng.integers(self.least_shots, self.most_shots, endpoint=True))

    def parts(self, tasks: Sequence[int]) -> tuple[slice, slice]:
        """Where the support and the query samples of these tasks are among those drawn."""
        return slice(self.shots(tasks[0])), slice(self.most_shots, None)


@dataclass
class FewShotTransform:
    """learn2learn task transform: draws N ways and, of each, its samples without replacement.

    It does the work of learn2learn's ``NWays``, ``KShots`` and ``RemapLabels`` from a generator that is set anew before
    each task, where those draw from Python's global ``random``: two ranks would get the same tasks.
    """

    rows_by_class: Array | list[Array]
    ways: int
    samples: int
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
        """A task's classes, the first that is drawn of it, as numbers in ``rows_by_class``.  # N"""
        return rng.choice(len(self.rows_by_class), self.ways, replace=False)


class FewShotTasks(DrawnTasks):
    """N-way K-shot classification tasks over images (or any samples) held in one tensor.

    learn2learn's ``MetaDataset`` and ``Taskset`` describe a task as sample numbers; the samples themselves are gathered
    by index, for all tasks of a meta-batch at once and on the device that holds them.

    Args:
        images: All samples.  # M C H W
        labels: Class number of each sample.  # M
        classes: The class numbers that belong to this split.
        ways: Classes per task (N).
        shots: Support samples per class (K), or the least and most of them: then each ``block`` of tasks has its own K.
        queries: Query samples per class (Q).
        seed: Seed of the tasks.
        split: The split's name.
        block: Tasks that share a number of shots: those of a meta-batch.
        source: The ``.npy`` file that ``images`` is mapped from, if it is; another process maps it too.
        names: The names of ``classes``. Default: their numbers.
        groups: The groups of ``classes``. Default: see ``group_of``.

    Raises:
        InputError: If the split has fewer than ``ways`` classes, or a class fewer than ``shots + queries`` samples.
    """

    def __init__(
        self,
        images: Tensor,
        labels: Tensor,
        classes: Sequence[int],
        ways: int,
        shots: Shots,
        queries: int,
        seed: int,
        split: Split,
        block: int = 1,
        source: Path | None = None,
        names: Sequence[str] | None = None,
        groups: Sequence[str] | None = None,
    ) -> None:
        super().__init__(shots, queries, seed, split, block)
        rows = group_rows(labels.numpy(), classes)
        require(
            2 <= ways <= len(rows),
            f"ways must be from 2 to the {len(rows)} classes of the {split} split, got {ways}",
        )
        self.require_samples(min(map(len, rows)), "samples of the smallest class")
        self.images, self.ways, self.source = images, ways, source
        self.classes = list(classes)
        self.names = [str(name) for name in (classes if names is None else names)]
        self.groups = [*map(group_of, self.names)] if groups is None else list(groups)
        self.rows_by_class = np.stack(rows) if len({*map(len, rows)}) == 1 else rows
        self.describe()

    def describe(self) -> None:
        """Let learn2learn describe the tasks."""
        data = import_learn2learn().data
        members = {label: rows.tolist() for label, rows in enumerate(self.rows_by_class)}
        self.transform = FewShotTransform(self.rows_by_class, self.ways, self.most_shots + self.queries)
        # a data set without samples: they are gathered here, by their numbers
        samples = data.MetaDataset(Dataset[int](), labels_to_indices=members)
        self.taskset = data.Taskset(samples, [self.transform])

    def __getstate__(self) -> dict[str, Any]:
        """Without what learn2learn cannot pickle, and without images that the other process can map."""
        left_out = {"transform", "taskset"} | ({"images"} if self.source else set())
        return {name: value for name, value in self.__dict__.items() if name not in left_out}

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Map the images again, and describe the tasks again."""
        self.__dict__.update(state)
        if self.source:
            self.images = torch.from_numpy(np.load(self.source, mmap_mode="c", allow_pickle=False))
        self.describe()

    def rows(self, task: int) -> list[int]:
        """Sample numbers of one task, class by class: N * (K + Q) of them, K the most shots."""
        self.transform.rng = self.rng(task)
        # never index the Taskset: it ignores the index, draws in visiting order and caches
        return [description.index for description in self.taskset.sample_task_description()]

    def class_names(self, task: int) -> list[str]:
        """The names of a task's classes 0 … N-1."""
        return [self.names[c] for c in self.transform.choose(self.rng(task))]

    def class_groups(self, task: int) -> list[str]:
        """The groups of a task's classes 0 … N-1."""
        return [self.groups[c] for c in self.transform.choose(self.rng(task))]

    def batch(self, tasks: Sequence[int]) -> TaskBatch:
        """Gather the images of these tasks, as they are and where they are."""
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
    """Four tensors in the order of ``TaskBatch``, from whichever loader, with pixels scaled to [0, 1]."""
    support_x, support_y, query_x, query_y = parts
    return TaskBatch(scale_pixels(support_x), support_y, scale_pixels(query_x), query_y)


def scale_pixels(x: Tensor) -> Tensor:
    """uint8 pixels in [0, 1], in torch's default precision; other samples as they are."""
    return x.to(torch.get_default_dtype()).div_(255) if x.dtype == torch.uint8 else x


def import_learn2learn() -> Any:
    """learn2learn, which takes seconds to import, without the notice that gym prints there."""
    from gym_notices import notices

    notices.notices.clear()
    import learn2learn

    return learn2learn
