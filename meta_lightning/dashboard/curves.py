"""Figures of the dashboard: adaptation curves, tasks with their answers, accuracy per class."""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator, PercentFormatter
from torch import Tensor
from torch.nn.functional import mse_loss

from meta_lightning.data.tasks import TaskBatch
from meta_lightning.drawing import INK, MUTED, SUPPORT, classifies_pictures, draw_tables, shortened, table_of
from meta_lightning.inner.samples import Samples
from meta_lightning.scores import Statistics

GROUPS = 60  # classes or alphabets shown at most


class PicturedTask(NamedTuple):
    """A task, without the task dimension, and its predictions."""

    batch: TaskBatch
    before: Samples  # R ...
    after: Samples  # R ...
    class_names: list[str]
    ink: bool  # whether pictures hold ink as 1 on 0, to be shown dark on light


def draw_curves(curves: Mapping[str, Sequence[Statistics]], title: str) -> Figure:
    """Plot query loss and score after each inner step, with their 95 % confidence intervals."""
    figure = Figure(figsize=(5, 0.3 + 2.6 * len(curves)), layout="constrained")  # portrait, like TensorBoard's cards
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
    """Draw tasks with their answers if they classify pictures or map one number to one number; None otherwise."""
    batch = tasks[0].batch
    if classifies_pictures(batch):
        return draw_tables([table_of(task.batch, task.class_names, task.after) for task in tasks], tasks[0].ink)
    if not all(isinstance(part, Tensor) for part in (*batch, tasks[0].after)):
        return None
    numbers = batch.query_y.is_floating_point() and batch.query_y.shape == tasks[0].after.shape
    return draw_regressions(tasks) if numbers and batch.query_x[0].numel() == batch.query_y[0].numel() == 1 else None


def draw_regressions(tasks: Sequence[PicturedTask]) -> Figure:
    """Plot targets and predictions of tasks as functions of one number."""
    figure = Figure(figsize=(5, 2.6 * len(tasks)), layout="constrained")
    panels: Any = figure.subplots(len(tasks), 1, squeeze=False, sharex=True)
    for axes, task in zip(panels.flat, tasks, strict=True):
        support_x, support_y, query_x, query_y = task.batch
        order = query_x.flatten().argsort()
        x, target, before, after = (v.flatten()[order] for v in (query_x, query_y, task.before, task.after))
        axes.plot(x, target, color=MUTED, linewidth=5, alpha=0.35, label="target")
        axes.plot(x, before, color=MUTED, linestyle="--", label="before")
        axes.plot(x, after, color=SUPPORT, linewidth=2, label="after")
        axes.plot(support_x.flatten(), support_y.flatten(), "o", color=INK, markersize=5, label="support")
        axes.set_title(f"mse {mse_loss(before, target):.3g} → {mse_loss(after, target):.3g}")
        plain(axes)
    panels[0, 0].legend(frameon=False, fontsize="small")
    return figure


def draw_groups(groups: Mapping[str, Statistics], title: str, chance: float) -> Figure:
    """Plot the accuracy per class or alphabet, the hardest first."""
    shown = dict(sorted(groups.items(), key=lambda item: float(item[1].mean))[:GROUPS])
    mean, ci95, tasks = (torch.stack(part).tolist() for part in zip(*shown.values(), strict=True))
    figure = Figure(figsize=(7.2, 0.9 + 0.21 * len(shown)), layout="constrained")
    axes = figure.subplots()
    left_out = f"; the {GROUPS} hardest of {len(groups)}" if len(groups) > GROUPS else ""
    axes.set_title(title + left_out, color=INK, fontsize="medium", loc="left")
    axes.axvline(chance, color=MUTED, linestyle=":", linewidth=1)
    error = {"ecolor": SUPPORT, "capsize": 2}
    axes.barh(range(len(shown)), mean, 0.72, xerr=ci95, color=SUPPORT, alpha=0.25, error_kw=error)
    for row, (value, number) in enumerate(zip(mean, tasks, strict=True)):
        label = f"{100 * value:.1f} % of {number:.0f} tasks"
        axes.text(1.04, row, label, va="center", fontsize="small", color=MUTED)
    axes.set_yticks(range(len(shown)), [*shortened(shown, 40).values()])
    axes.xaxis.set_major_formatter(PercentFormatter(1, symbol=" %"))
    axes.set(xlim=(0, 1.02), ylim=(len(shown) - 0.5, -0.5), xlabel="query accuracy")
    plain(axes)
    axes.grid(visible=False, axis="y")
    return figure


def plain(axes: Any) -> None:
    """Style axes: two spines and a faint grid."""
    axes.spines[["top", "right"]].set_visible(False)
    axes.spines[["left", "bottom"]].set_color(MUTED)
    axes.tick_params(colors=INK, labelsize="small")
    axes.grid(color=MUTED, alpha=0.2, linewidth=0.6)
    axes.set_axisbelow(True)
