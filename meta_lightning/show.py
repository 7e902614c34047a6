"""What a configuration will train on: in words and as a picture."""

import textwrap
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.figure import Figure

from meta_lightning.checks import InputError
from meta_lightning.data.image_module import ImageTasks
from meta_lightning.data.module import TaskDataModule
from meta_lightning.data.tasks import SPLITS, Split, TaskBatch, as_task_batch
from meta_lightning.drawing import pixels


def show_data(data: TaskDataModule, path: Path) -> str:
    """Draw a task of each split into a file and describe the splits; one that cannot give tasks says why instead."""
    lines = [type(data).__name__]
    drawn: list[tuple[Split, TaskBatch, list[str]]] = []
    for split in SPLITS:
        try:
            tasks = data.task_set(split)
        except InputError as error:
            lines.append(f"  {split:5} left out: {error}")
            if split == SPLITS[-1] and not drawn:
                raise
        else:
            drawn.append((split, tasks.batch([0]), tasks.class_names(0)))
            lines.append(f"  {split:5} {', '.join(describe_split(data, split, drawn[-1][1]))}")
    figure = Figure(figsize=(4 * len(drawn), 4.5), layout="constrained")
    panels: Any = figure.subfigures(1, len(drawn), squeeze=False)
    for panel, (split, batch, names) in zip(panels.flat, drawn, strict=True):
        panel.suptitle(split)
        seen = data.transformed(batch, split == "train", data.seed) if isinstance(data, ImageTasks) else batch
        draw_task(panel, seen, names)
    figure.savefig(path, dpi=120)
    return "\n".join(lines)


def describe_split(data: TaskDataModule, split: Split, batch: TaskBatch) -> list[str]:
    """What a split has, in words."""
    numbers = {"train": "endless", "val": data.val_tasks, "test": data.test_tasks}
    support, query = (list(x.shape[1:]) for x in (batch.support_x, batch.query_x))
    words = [f"{numbers[split]} tasks", f"support {support}", f"query {query}"]
    if isinstance(data, ImageTasks):
        labelled = data.load()
        members = labelled.members(split)
        words.insert(0, f"{len(members)} classes, {np.isin(labelled.labels, members).sum()} images")
    return words


def draw_task(panel: Any, batch: TaskBatch, names: Sequence[str]) -> None:
    """Draw the first task of a batch: images in a row per class, or else points."""
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
        name = textwrap.fill(f"{label}: {names[label]}" if names else str(label), 16, max_lines=3, placeholder="…")
        axes_row[0].set_ylabel(name, rotation=0, ha="right", va="center", fontsize="small")
        for column, (axes, image) in enumerate(zip(axes_row, [*support, *query], strict=True)):
            axes.imshow(pixels(image).transpose(1, 2, 0), cmap="gray_r")
            axes.set(xticks=[], yticks=[])
            axes.spines[:].set_color("tab:blue" if column < left else "lightgray")
