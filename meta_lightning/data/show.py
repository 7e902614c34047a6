"""What a configuration will train on: in words and as a picture."""

from pathlib import Path
from typing import Any

import numpy as np

from meta_lightning.data.base import TaskDataModule
from meta_lightning.data.images import ImageTasks
from meta_lightning.tasks import SPLITS, TaskBatch, as_task_batch


def describe_data(data: TaskDataModule) -> str:
    """A line a split: its classes and images, where there are such, its tasks and the shape of one."""
    numbers = {"train": None, "val": data.val_tasks, "test": data.test_tasks}
    lines = [type(data).__name__]
    for split in SPLITS:
        tasks = "endless tasks" if numbers[split] is None else f"{numbers[split]} tasks"
        batch = data.task_set(split).batch([0])
        support, query = (list(x.shape[1:]) for x in (batch.support_x, batch.query_x))
        words = [tasks, f"support {support}", f"query {query}"]
        if isinstance(data, ImageTasks):
            labelled = data.load()
            members = labelled.members(split)
            words.insert(0, f"{len(members)} classes, {np.isin(labelled.labels, members).sum()} images")
        lines.append(f"  {split:5} {', '.join(words)}")
    return "\n".join(lines)


def draw_tasks(data: TaskDataModule, path: Path) -> None:
    """Draw a task of each split: its support set on the left, its queries on the right, with their labels."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(12, 4.5), layout="constrained")
    panels: Any = figure.subfigures(1, 3)
    for panel, split in zip(panels, SPLITS, strict=True):
        panel.suptitle(split)
        draw_task(panel, data.task_set(split).batch([0]))
    figure.savefig(path, dpi=120)


def draw_task(panel: Any, batch: TaskBatch) -> None:
    """Draw the first task of a batch: images in a row a class, or else points."""
    support_x, support_y, query_x, query_y = (part[0].cpu() for part in as_task_batch(batch))
    if support_x.ndim != 4:  # vectors: the first number of each against its target
        axes = panel.subplots()
        for x, y, marker in ((query_x, query_y, "."), (support_x, support_y, "o")):
            axes.plot(x.reshape(len(x), -1)[:, 0], y.reshape(len(y), -1)[:, 0], marker)
        axes.legend(["query", "support"])
        return
    # six classes, three support and five query images each, are enough to see
    labels = support_y.unique()[:6]
    rows = [(int(y), support_x[support_y == y][:3], query_x[query_y == y][:5]) for y in labels]
    left, right = len(rows[0][1]), len(rows[0][2])
    grid = panel.subplots(len(rows), left + right, squeeze=False, gridspec_kw={"wspace": 0.05, "hspace": 0.05})
    for axes_row, (label, support, query) in zip(grid, rows, strict=True):
        axes_row[0].set_ylabel(label, rotation=0, ha="right", va="center")
        for column, (axes, image) in enumerate(zip(axes_row, [*support, *query], strict=True)):
            pixels = (image - image.min()) / (image.max() - image.min()).clamp(min=1e-8)
            axes.imshow(pixels.permute(1, 2, 0).squeeze(-1), cmap="gray_r")
            axes.set_xticks([])
            axes.set_yticks([])
            for spine in axes.spines.values():
                spine.set_color("tab:blue" if column < left else "lightgray")
