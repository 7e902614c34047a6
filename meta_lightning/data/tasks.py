"""Tasks for meta-training and evaluation, each a function of (seed, split, number)."""

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import InitVar, dataclass
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor
from torch.utils.data import Dataset

from meta_lightning.checks import InputError, require
from meta_lightning.data.streams import generators
from meta_lightning.inner.params import tree_leaves, tree_map
from meta_lightning.inner.samples import Padded, Samples, collated, form_of_sample, length, structure_of, values_of

Array = npt.NDArray[Any]
Split = Literal["train", "val", "test"]
Count = int | tuple[int, int]  # a number, or its minimum and maximum
LabelSpace = Literal["task", "split"]
SPLITS: tuple[Split, ...] = ("train", "val", "test")
# learn2learn's sdist does not compile without the option
INSTALL = "on Python 3.11 or 3.12, pip install learn2learn==0.2.0 --config-settings='--build-option=build_ext'"


class TaskBatch(NamedTuple):
    """A meta-batch: T tasks, each with a support and a query set.

    uint8 samples are pixels, which the learner scales to [0, 1] on its device. Targets are int64 class numbers for
    classification, 0 … N-1 unless ``train_labels`` is "split", and floating point for regression. Samples and targets
    may be nests of dicts and tuples of tensors, all with leading T S; those of tasks of unequal size are ``Padded``.
    """

    support_x: Samples  # T S ...
    support_y: Samples  # T S (classification), T S D (regression)
    query_x: Samples  # T R ...
    query_y: Samples  # T R (classification), T R D (regression)


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


class ReadSamples(ABC):
    """Samples that are read when tasks need them."""

    @abstractmethod
    def take(self, rows: list[int]) -> Samples:
        """The samples with these numbers, on the CPU.  # -> len(rows) ..."""


def taken(samples: Samples | ReadSamples, rows: Tensor) -> Samples:
    """Samples by their numbers, on the device where they are."""
    if isinstance(samples, ReadSamples):
        return samples.take(rows.tolist())
    return tree_map(lambda t: t.index_select(0, rows.to(t.device)), samples)


class TaskSet(ABC):
    """The endless, numbered tasks of one split; task ``i`` depends on the seed, the split and ``i``."""

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
    """N-way K-shot classification tasks, gathered on the device of the samples.

    learn2learn's ``Taskset`` describes them. Where it is not installed they are the same, number for number.
    """

    images: Samples | ReadSamples  # M C H W, or any samples; shared by all splits
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
        self.dataset = None
        if has_learn2learn():
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
        draw = partial(self.draw, rng, ways or self.most_ways)
        if self.dataset is None:
            return draw()
        data = import_learn2learn().data
        # learn2learn's NWays and KShots use Python's global random state, which is the same on each rank
        taskset = data.Taskset(self.dataset, lambda description: [*map(data.DataDescription, draw())])
        # never index a Taskset: it ignores the index and draws in order of access
        return [description.index for description in taskset.sample_task_description()]

    def draw(self, rng: np.random.Generator, ways: int) -> list[int]:
        """Draw N ways and, of each, its samples without replacement."""
        classes, members = self.choose(rng, ways), self.rows_by_class
        if isinstance(members, list):
            drawn = np.stack([rng.permuted(members[c])[: self.drawn] for c in classes])
        else:
            drawn = rng.permuted(members[classes], axis=1)[:, : self.drawn]  # N K+Q, the same numbers but faster
        return [*drawn.flatten().tolist()]

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
            x = taken(self.images, index.flatten())
            return tree_map(lambda t: t.unflatten(0, index.shape), x), labels[:, :, samples].flatten(1)

        support, query = self.parts(tasks)
        return TaskBatch(*part(support), *part(query))

    @property
    def device(self) -> torch.device:
        """Where the samples are."""
        return torch.device("cpu") if isinstance(self.images, ReadSamples) else tree_leaves(self.images)[0].device

    def labels_of(self, tasks: Sequence[int], ways: int) -> Tensor:
        """The label of each class of these tasks, on the device of the samples.  # T N"""
        if self.label_space == "task":
            return torch.arange(ways, device=self.device).expand(len(tasks), ways)
        chosen = [self.choose(rng, ways) for rng in generators(self.entropy, tasks)]
        return torch.from_numpy(np.stack(chosen)).to(self.device)


def as_task_batch(parts: Sequence[Samples]) -> TaskBatch:
    """The four parts of a ``TaskBatch``, from any loader, with pixels scaled to [0, 1].

    Raises:
        InputError: If these are not four tensors, or nests of tensors, of the same number of tasks.
    """
    if len(parts) != 4 or isinstance(parts, Mapping):
        came = f"{type(parts).__name__} of {len(parts)}"
        raise InputError(f"batches must be a tuple ({', '.join(TaskBatch._fields)}), got {came}")
    fields = getattr(parts, "_fields", TaskBatch._fields)
    if fields != TaskBatch._fields and {*fields} == {*TaskBatch._fields}:
        raise InputError(f"batches must be a tuple ({', '.join(TaskBatch._fields)}), got ({', '.join(fields)})")
    batch = TaskBatch(*(nest_of(part, name) for name, part in zip(TaskBatch._fields, parts, strict=True)))
    padded = [isinstance(part, Padded) for part in batch]
    require(
        all(padded) or not any(padded), f"batches must have all four parts Padded or none, got {padded}; see pad_tasks"
    )
    shape = list(tree_leaves(batch.support_x)[0].shape)
    for name, part in batch._asdict().items():
        sizes = {tensor.shape[:2] for tensor in tree_leaves(part)}
        for tensor in tree_leaves(part):
            if tensor.ndim < 2 or len(tensor) != shape[0] or len(sizes) > 1:
                others = "" if isinstance(part, Tensor) else " and one number of samples"
                raise InputError(
                    f"{name} must have the shape T S ..., tasks by samples, with as many tasks as support_x{others}; "
                    f"got {list(tensor.shape)} and {shape} of support_x"
                )
    for support, query, name in ((batch[0], batch[2], "x"), (batch[1], batch[3], "y")):
        forms = [structure_of(values_of(part)) for part in (support, query)]
        expected = f"query_{name} must have the structure of support_{name}"
        require(forms[0] == forms[1], f"{expected}, {forms[0]}, got {forms[1]}")
    return TaskBatch(scale_pixels(batch.support_x), batch.support_y, scale_pixels(batch.query_x), batch.query_y)


def nest_of(part: Any, name: str) -> Samples:
    """A tensor, or a nest of dicts and tuples of tensors, from any mappings and sequences."""
    if isinstance(part, Mapping | tuple | list) and not part:
        raise InputError(f"{name} must hold tensors, got an empty {type(part).__name__}")
    if isinstance(part, Mapping):
        return {key: nest_of(value, f"{name}[{key!r}]") for key, value in part.items()}
    if isinstance(part, tuple | list):
        values = [nest_of(value, f"{name}[{i}]") for i, value in enumerate(part)]
        return Padded(*values) if isinstance(part, Padded) else tuple(values)
    if not isinstance(part, Tensor):
        raise InputError(f"{name} must be a tensor, or dicts and tuples of tensors, got {type(part).__name__}")
    return part


def tasks_of(parts: Sequence[Samples]) -> int:
    """Number of tasks of a batch from any loader."""
    return length(nest_of(parts[0], "support_x"))


def pad_tasks(tasks: Sequence[Sequence[Samples]]) -> TaskBatch:
    """Stack tasks of unequal size into one meta-batch: ``DataLoader(tasks, 4, collate_fn=pad_tasks)``.

    Smaller tasks are padded with their own first sample, which losses and scores leave out: the meta-gradient is that
    of the tasks without padding. Where samples of a task affect each other, as by batch norm, the tasks run in a loop.

    Args:
        tasks: Support samples, support targets, query samples and query targets of each task.  # of S ..., R ...

    Returns:
        The batch, whose parts are ``Padded`` unless all tasks are of one size.

    Raises:
        InputError: If a task has other parts, samples and targets of it differ in number, or it has no samples.
    """
    require(len(tasks) > 0, "tasks must hold at least 1, got 0")
    for number, task in enumerate(tasks):
        require(len(task) == 4, f"tasks must hold ({', '.join(TaskBatch._fields)}), got {len(task)} parts in {number}")
    names = TaskBatch._fields
    of_tasks = [
        [nest_of(part, f"{name} of task {number}") for name, part in zip(names, task, strict=True)]
        for number, task in enumerate(tasks)
    ]
    parts: list[tuple[Samples, Tensor]] = []  # values and mask
    for x in (0, 2):
        sizes: list[int] = []
        for number, task in enumerate(of_tasks):
            shapes = [tensor.shape for tensor in tree_leaves(task[x : x + 2])]
            lengths = {shape[0] if shape else None for shape in shapes}
            came = f"{sorted(lengths, key=str)} in task {number}"
            require(
                len(lengths) == 1 and None not in lengths,
                f"{names[x]} and {names[x + 1]} must have one length, got {came}",
            )
            require(0 not in lengths, f"{names[x]} must have samples in every task, got none in task {number}")
            sizes.append(shapes[0][0])
        most = max(sizes)
        rows = [torch.where(torch.arange(most) < size, torch.arange(most), 0) for size in sizes]
        mask = torch.stack([torch.arange(most) < size for size in sizes])
        for part in (x, x + 1):
            own = [task[part] for task in of_tasks]
            filled = [tree_map(lambda t, r=r: t[r.to(t.device)], task) for task, r in zip(own, rows, strict=True)]
            forms = [structure_of(task, form_of_sample) for task in filled]
            for number, form in enumerate(forms):
                expected = f"{names[part]} must have one form in all tasks but for the number of samples"
                require(form == forms[0], f"{expected}, got {forms[0]} in task 0 and {form} in task {number}")
            values = collated(filled)
            parts.append((values, mask.to(tree_leaves(values)[0].device)))
    if all(bool(mask.all()) for _, mask in parts):
        return TaskBatch(*(values for values, _ in parts))
    return TaskBatch(*(Padded(*part) for part in parts))


def scale_pixels(x: Samples) -> Samples:
    """Scale uint8 pixels to [0, 1] in torch's default dtype; return other samples unchanged."""
    if not isinstance(x, Tensor):
        return tree_map(scale_pixels, x)
    return x.to(torch.get_default_dtype()).div_(255) if x.dtype == torch.uint8 else x


def has_learn2learn() -> bool:
    """Whether learn2learn is installed."""
    return find_spec("learn2learn") is not None


def import_learn2learn() -> Any:
    """learn2learn, without the notice that gym prints; importing it takes seconds.

    Raises:
        InputError: If it is not installed.
    """
    require(has_learn2learn(), f"learn2learn must be installed to download and read this data set, got none: {INSTALL}")
    from gym_notices import notices

    notices.notices.clear()
    import learn2learn

    return learn2learn
