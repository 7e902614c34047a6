"""Description and picture of a configuration's data, for ``--print_data``."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.figure import Figure
from torch import Tensor

from meta_lightning.checks import InputError
from meta_lightning.data.image_module import ImageTasks
from meta_lightning.data.module import TaskDataModule
from meta_lightning.data.tasks import SPLITS, DrawnTasks, Split, TaskBatch, TaskSet, as_task_batch
from meta_lightning.drawing import classifies_pictures, draw_tables, table_of
from meta_lightning.inner.params import tree_map
from meta_lightning.inner.samples import Samples, bare, first_task, length, structure_of


def show_data(data: TaskDataModule, path: Path) -> str:
    """Draw one task of each split into a file and describe the splits; InputError if no split can give a task."""
    lines = [type(data).__name__]
    drawn: dict[Split, tuple[TaskBatch, list[str]]] = {}
    for split in SPLITS:
        try:
            tasks = data.task_set(split)
        except InputError as error:
            lines.append(f"  {split:5} left out: {error}")
            if split == SPLITS[-1] and not drawn:
                raise
            continue
        batch, classes = tasks.batch([0]), ""
        number = {"train": "endless", "val": data.val_tasks, "test": data.test_tasks}[split]
        support, query = shapes(tasks, batch)
        if isinstance(data, ImageTasks):
            labelled = data.load()
            members = labelled.members(split)
            classes = f"{len(members)} classes, {np.isin(labelled.labels, members).sum()} images, "
            batch = data.transformed(batch, split == "train", data.seed)
        lines.append(f"  {split:5} {classes}{number} tasks, support {support}, query {query}")
        drawn[split] = batch, tasks.class_names(0)
    figure = Figure(figsize=(5 * len(drawn), 6), layout="constrained")
    panels: Any = figure.subfigures(1, len(drawn), squeeze=False)
    for panel, (split, (batch, names)) in zip(panels.flat, drawn.items(), strict=True):
        panel.suptitle(split)
        draw_task(panel, batch, names, getattr(data, "ink", None))
    figure.savefig(path, dpi=120)
    return "\n".join(lines)


def shapes(tasks: TaskSet, batch: TaskBatch) -> tuple[str, str]:
    """The shapes of a task's support and query samples, with "5 to 20" where their number is drawn from a range."""
    counts = tasks.sample_counts if isinstance(tasks, DrawnTasks) else (None, None)

    def shape(x: Samples, count: tuple[int, int] | None) -> str:
        least, most = count or (length(x, 1), length(x, 1))
        number = f"{most}" if least == most else f"{least} to {most}"
        return structure_of(bare(x), lambda t: f"[{', '.join([number, *map(str, t.shape[2:])])}]")

    support, query = map(shape, (batch.support_x, batch.query_x), counts)
    return support, query


def draw_task(panel: Any, batch: TaskBatch, names: Sequence[str], ink: bool | None = None) -> None:
    """Draw the first task of a batch into a figure or subfigure: a row of pictures per class, or points.

    ``ink``: whether pictures hold ink as 1 on 0, to be shown dark on light. Default: for pictures of one channel.
    """
    task = TaskBatch(*(tree_map(Tensor.cpu, first_task(part)) for part in as_task_batch(batch)))
    axes = panel.subplots()
    if not all(isinstance(part, Tensor) for part in task):
        axes.set_axis_off()
        axes.text(0.5, 0.5, "nests of tensors are not drawn", ha="center")
        return
    if classifies_pictures(task):
        draw_tables([table_of(task, names)], task.query_x.shape[1] == 1 if ink is None else ink, axes)
        return
    # the first number of each sample against the first of its target
    for x, y, marker in ((task.query_x, task.query_y, "."), (task.support_x, task.support_y, "o")):
        axes.plot(x.reshape(len(x), -1)[:, 0], y.reshape(len(y), -1)[:, 0], marker)
    axes.legend(["query", "support"])
