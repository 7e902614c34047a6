"""The figure of a comparison."""

from collections.abc import Sequence
from itertools import cycle
from pathlib import Path
from typing import Any

from meta_lightning.comparison.summary import UNTRAINED, Result, Row, score_of

COLOURS = {UNTRAINED: "#8a94a0", "MAML": "#2f6fb7", "FOMAML": "#2e8b57", "Reptile": "#c8372d"}
OTHERS = ("#8e5bb5", "#d98c1f", "#3aa6a6", "#a65a3a")  # those with a name of their own
PANELS = [["steps"] * 3 + ["time"] * 3, ["scores"] * 2 + ["speed"] * 2 + ["memory"] * 2]


def draw(rows: Sequence[Row], results: Sequence[Result], path: Path) -> None:
    """Draw validation against meta-iterations and against time, and bars of the score, speed and memory.

    Args:
        rows: The table.
        results: What ``runs.complete`` gave, with a curve for each training; those of a grid are left out.
        path: The PNG file.
    """
    from matplotlib.figure import Figure

    figure = Figure(figsize=(12, 7), layout="constrained")
    panels = figure.subplot_mosaic(PANELS)  # type: ignore[arg-type]
    for axes in panels.values():
        axes.spines[["top", "right"]].set_visible(False)
        axes.grid(alpha=0.3)
    curves = [
        (result["name"].rpartition("-seed")[0], result["fit"])
        for result in results
        if result["fit"] is not None and result["tests"]
    ]
    colours = colours_of([row.algorithm for row in rows])
    labelled = set()
    for name, fit in curves:
        metric, unit = score_of(fit, "val")
        points = [(s + 1, unit * v) for s, v in fit["curves"].get(f"val/{metric}", []) if v is not None]
        label = None if name in labelled else name
        labelled.add(name)
        for panel, scale in (("steps", 1.0), ("time", fit["train_seconds"] / fit["steps"])):
            x, y = [scale * step for step, _ in points], [value for _, value in points]
            panels[panel].plot(x, y, "o-", markersize=3, color=colours[name], label=label)
    metric = f"{rows[0].metric}, %" if rows[0].metric == "accuracy" else rows[0].metric
    panels["steps"].set(xlabel="meta-iterations", ylabel=f"validation {metric}")
    panels["time"].set(xlabel="seconds of training", ylabel=f"validation {metric}")
    if labelled:
        panels["steps"].legend()
    bars(panels["scores"], rows, "before", "", -0.2, 0.35)
    bars(panels["scores"], rows, "after", f"test {metric}, before (pale) and after adaptation", 0.2)
    bars(panels["speed"], rows, "tasks_per_second", "tasks a second in training")
    bars(panels["memory"], rows, "peak_memory", "peak memory of training, MB")
    figure.savefig(path, dpi=100)


def colours_of(names: Sequence[str]) -> dict[str, str]:
    """A colour for each row."""
    others = cycle(OTHERS)
    return {name: COLOURS.get(name) or next(others) for name in names}


def bars(axes: Any, rows: Sequence[Row], field: str, title: str, shift: float = 0.0, alpha: float = 1.0) -> None:
    """A bar for each row that has the figure, with its value above it, and its confidence interval if it has one."""
    shown = [row for row in rows if getattr(row, field) is not None]
    places = [i + shift for i in range(len(shown))]
    values = [getattr(row, field) for row in shown]
    errors = [getattr(row, f"{field}_ci95", 0.0) for row in shown]
    names = [row.algorithm for row in shown]
    colours = [colours_of([row.algorithm for row in rows])[name] for name in names]
    drawn = axes.bar(places, values, 0.4 if shift else 0.7, yerr=errors, color=colours, alpha=alpha)
    axes.bar_label(drawn, fmt="{:.3g}", padding=3)
    axes.set_xticks(range(len(shown)), [name.replace("-", "-\n") for name in names])
    axes.set_title(title, size=10)
    axes.margins(y=0.12)
