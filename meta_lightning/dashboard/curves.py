"""The dashboard's pictures: adaptation curves, tasks with their answers, accuracy by class."""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator
from torch import Tensor
from torch.nn.functional import mse_loss

from meta_lightning.data.tasks import TaskBatch
from meta_lightning.drawing import INK, MUTED, RIGHT, STEP, SUPPORT, WRONG, draw_picture, pixels, sheet, shortened
from meta_lightning.scores import Statistics

LINE = 1.6  # from one row of pictures to the next, in widths of a picture
ROWS = 6  # classes of a task that are shown
EXAMPLES, ANSWERS = 2, 5  # support and query pictures of a class that are shown
GROUPS = 60  # classes or alphabets whose accuracy is shown


class PicturedTask(NamedTuple):
    """A task and what was predicted of it."""

    batch: TaskBatch  # without the task dimension
    before: Tensor  # R ...
    after: Tensor  # R ...
    class_names: list[str]
    ink: bool  # whether pictures hold ink as 1 on 0, to be shown dark on light


def draw_curves(curves: Mapping[str, Sequence[Statistics]], title: str) -> Figure:
    """Values of the queries after each inner step, with their 95 % confidence intervals."""
    figure = Figure(figsize=(5, 0.3 + 2.6 * len(curves)), layout="constrained")  # upright, as TensorBoard's cards
    figure.suptitle(title, color=INK, fontsize="medium")
    panels: Any = figure.subplots(len(curves), 1, squeeze=False, sharex=True)
    for axes, (name, points) in zip(panels.flat, curves.items(), strict=True):
        scale, unit, digits = (100, " %", ".1f") if name == "accuracy" else (1, "", ".3f")
        mean, ci95 = (scale * torch.stack(part).cpu().double() for part in list(zip(*points, strict=True))[:2])
        steps = range(len(points))
        axes.fill_between(steps, mean - ci95, mean + ci95, color=SUPPORT, alpha=0.18, linewidth=0)
        axes.plot(steps, mean, color=SUPPORT, linewidth=2, marker="o", markersize=4 if len(points) < 20 else 0)
        for step, side in ((0, "left"), (len(points) - 1, "right")):
            label = f"{mean[step]:{digits}} ± {ci95[step]:{digits}}{unit}"
            axes.set_title(label, loc=side, color=MUTED if step == 0 else INK, fontsize="small")
        axes.set_ylabel(f"query {name}{unit and ', %'}")
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        plain(axes)
    panels[-1, 0].set_xlabel("inner steps")
    return figure


def draw_tasks(tasks: Sequence[PicturedTask]) -> Figure | None:
    """Tasks and their answers: pictures, or a regression of one number on one number; None of others."""
    batch = tasks[0].batch
    regression = batch.query_y.is_floating_point() and batch.query_y.shape == tasks[0].after.shape
    if regression and batch.query_x[0].numel() == batch.query_y[0].numel() == 1:
        figure = Figure(figsize=(5, 2.6 * len(tasks)), layout="constrained")
        panels: Any = figure.subplots(len(tasks), 1, squeeze=False, sharex=True)
        for axes, task in zip(panels.flat, tasks, strict=True):
            draw_regression(axes, task)
        panels[0, 0].legend(frameon=False, fontsize="small")
        return figure
    if batch.query_y.ndim == 1 and batch.query_x.ndim == 4 and batch.query_x.shape[1] in (1, 3):
        labels = batch.query_y.unique()[:ROWS]
        examples = min(EXAMPLES, int((batch.support_y == labels[0]).sum()))
        answers = min(ANSWERS, int((batch.query_y == labels[0]).sum()))
        height = len(labels) * LINE + 0.3
        figure, axes = sheet((examples + answers) * STEP + 0.5, len(tasks) * height, scale=0.8)
        for i, task in enumerate(tasks):
            draw_classification(axes, task, labels.tolist(), examples, top=i * height)
        return figure
    return None


def draw_regression(axes: Any, task: PicturedTask) -> None:
    """Targets and predictions of a task as functions of one number."""
    support_x, support_y, query_x, query_y = task.batch
    order = query_x.flatten().argsort()
    x, target, before, after = (v.flatten()[order] for v in (query_x, query_y, task.before, task.after))
    axes.plot(x, target, color=MUTED, linewidth=5, alpha=0.35, label="target")
    axes.plot(x, before, color=MUTED, linestyle="--", label="before")
    axes.plot(x, after, color=SUPPORT, linewidth=2, label="after")
    axes.plot(support_x.flatten(), support_y.flatten(), "o", color=INK, markersize=5, label="support")
    axes.set_title(f"mse {mse_loss(task.before, query_y):.3g} → {mse_loss(task.after, query_y):.3g}")
    plain(axes)


def draw_classification(axes: Any, task: PicturedTask, labels: Sequence[int], examples: int, top: float) -> None:
    """A row per class: support pictures, and queries in the colour of a right or wrong answer."""
    support_x, support_y, query_x, query_y = task.batch
    answers = task.after.argmax(1)
    for row, label in enumerate(labels):
        y = top + 0.4 + row * LINE
        name = f"{label + 1}  {task.class_names[label]}" if task.class_names else f"class {label + 1}"
        axes.text(0, y - 0.1, shortened(name.replace("_", " "), 36), color=INK, size=7)
        for column, image in enumerate(support_x[support_y == label][:examples]):
            draw_picture(axes, pixels(image), task.ink, column * STEP, y, SUPPORT)
        for column, query in enumerate((query_y == label).nonzero().flatten()[:ANSWERS]):
            x = (examples + column) * STEP + 0.25
            right = answers[query] == label
            draw_picture(axes, pixels(query_x[query]), task.ink, x, y, RIGHT if right else WRONG)
            if not right:
                axes.text(x + 1, y + 1.2, f"taken for {int(answers[query]) + 1}", color=WRONG, size=7, ha="right")


def draw_groups(groups: Mapping[str, Statistics], title: str, chance: float) -> Figure:
    """Accuracy by class or alphabet, the hardest first."""
    shown = sorted(groups.items(), key=lambda item: float(item[1].mean))[:GROUPS]
    figure = Figure(figsize=(7.2, 0.9 + 0.21 * len(shown)), layout="constrained")
    axes = figure.subplots()
    left_out = f"; the {GROUPS} hardest of {len(groups)}" if len(groups) > GROUPS else ""
    axes.set_title(title + left_out, color=INK, fontsize="medium", loc="left")
    axes.axvline(100 * chance, color=MUTED, linestyle=":", linewidth=1)
    for row, (_, (mean, ci95, _)) in enumerate(shown):
        axes.barh(row, 100 * float(mean), color=SUPPORT, alpha=0.25, height=0.72)
        axes.errorbar(100 * float(mean), row, xerr=100 * float(ci95), color=SUPPORT, fmt="o", markersize=3, capsize=2)
    axes.set_yticks(range(len(shown)), [shortened(name.replace("_", " "), 40) for name, _ in shown])
    axes.set(xlim=(0, 102), ylim=(len(shown) - 0.5, -0.5), xlabel="query accuracy, %")
    plain(axes)
    axes.grid(visible=False, axis="y")
    figures = axes.secondary_yaxis("right")
    labels = [f"{100 * float(mean):.1f} % of {int(tasks)} tasks" for _, (mean, _, tasks) in shown]
    figures.set_yticks(range(len(shown)), labels, fontsize="small", color=MUTED)
    figures.tick_params(length=0)
    figures.spines["right"].set_visible(False)
    return figure


def plain(axes: Any) -> None:
    """Two spines and a faint grid."""
    axes.spines[["top", "right"]].set_visible(False)
    axes.spines[["left", "bottom"]].set_color(MUTED)
    axes.tick_params(colors=INK, labelsize="small")
    axes.grid(color=MUTED, alpha=0.2, linewidth=0.6)
    axes.set_axisbelow(True)
