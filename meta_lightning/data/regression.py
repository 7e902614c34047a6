"""Few-shot regression over sets of points."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor

from meta_lightning.checks import require
from meta_lightning.data.module import FewShotDataModule, options
from meta_lightning.data.splits import GivenSplit
from meta_lightning.data.tasks import SPLITS, Array, DrawnTasks, Split, TaskBatch, TaskSet, taken
from meta_lightning.data.tensors import samples
from meta_lightning.inner.params import tree_leaves, tree_map
from meta_lightning.inner.samples import Samples, as_floats, collated, form_of_sample, length, structure_of


@options
class RegressionTasks(GivenSplit, FewShotDataModule):
    """Few-shot regression over user-provided sets of points; the points of a task come from one set.

    Each set samples one function, such as that of a patient, a machine or a place. A task draws its points without
    replacement. Among each n consecutive tasks of a split of n sets, each set occurs once, in random order: if
    ``test_tasks`` is a multiple of n, all sets are tested equally often.

    Raises:
        InputError: If an option is outside its range, or a split has no sets or too few points for its tasks.
    """

    data_arguments = ("tasks",)

    tasks: Sequence[tuple[Any, Any]] = field(kw_only=False)
    """The sets: pairs of inputs and targets, of any number M of points: tensors, arrays, DataFrames, or nests of dicts
    and tuples of these. Floating-point inputs and all targets get the default dtype of torch, uint8 inputs are scaled
    to [0, 1], and scalars become vectors of length 1; targets in nests keep type and shape.  # M ..., M D"""
    shots: int = 10
    queries: int = 10

    def __post_init__(self) -> None:
        """Convert the sets to tensors and split them."""
        super().__post_init__()
        self.sets: list[tuple[Samples, Samples]] = []
        for number, task in enumerate(self.tasks):
            require(len(task) == 2, f"tasks must hold pairs of inputs and targets, got {len(task)} parts in {number}")
            x, y = (samples(part, f"{name} of task {number}") for part, name in zip(task, "xy", strict=True))
            lengths = [*dict.fromkeys(len(tensor) for tensor in tree_leaves((x, y)))]
            came = " and ".join(map(str, lengths))
            require(len(lengths) == 1, f"x and y of task {number} must have one length, got {came}")
            self.sets.append((vectors(x), vectors(as_floats(y) if isinstance(y, Tensor) else y)))
        self.tasks = self.sets  # releases the original arrays
        forms = [structure_of(pair, form_of_sample) for pair in self.sets]
        for number, form in enumerate(forms):
            require(form == forms[0], f"tasks must have the form {forms[0]} of task 0, got {form} in task {number}")
        self.split(range(len(self.sets)), "numbers of tasks")

    def task_set(self, split: Split) -> TaskSet:
        """Tasks of the split's sets."""
        refusal = f"the {split} split must have at least 1 of the tasks, got 0"
        self.require_members(split, dict.fromkeys(SPLITS, 1), refusal)
        sets = {number: self.sets[number] for number in self.members[split]}
        require(bool(sets), refusal)
        tasks = PointTasks([*sets.values()], **self.draws(split))
        smallest = min(sets, key=lambda number: length(sets[number][0]))
        tasks.require_samples(length(sets[smallest][0]), f"points of task {smallest}")
        return tasks


@dataclass(eq=False)
class PointTasks(DrawnTasks):
    """Numbered draws of points from sets."""

    sets: Sequence[tuple[Samples, Samples]]  # M ..., M D

    def batch(self, tasks: Sequence[int]) -> TaskBatch:
        """Points of these tasks' sets.  # T K ..., T K D, T Q ..., T Q D"""
        # spawned, so that it is independent of the stream of the task with the same number
        turns = {task // len(self.sets) for task in tasks}
        orders = {turn: self.rng(turn).spawn(1)[0].permutation(len(self.sets)) for turn in turns}
        drawn = []
        for task in tasks:
            turn, place = divmod(task, len(self.sets))
            pair = self.sets[orders[turn][place]]
            drawn.append(taken(pair, torch.from_numpy(self.draw(self.rng(task), pair[1]))))
        both = collated(drawn)
        support, query = (tree_map(lambda t, part=part: t[:, part], both) for part in self.parts(tasks))
        return TaskBatch(*support, *query)

    def draw(self, rng: np.random.Generator, y: Samples) -> Array:
        """The numbers of a task's points among those of its set, by their targets.  # M D -> K+Q"""
        return rng.choice(length(y), self.drawn, replace=False)


def vectors(part: Samples) -> Samples:
    """Scalars as vectors of length 1; nests stay as they are.  # M -> M 1"""
    return part.unsqueeze(1) if isinstance(part, Tensor) and part.ndim == 1 else part
