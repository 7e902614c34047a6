"""The figure of a comparison."""

from collections.abc import Sequence
from itertools import cycle
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure

from meta_lightning.compare.summary import UNTRAINED, Result, Row, algorithm_of, score_of
from meta_lightning.drawing import MUTED, RIGHT, SUPPORT, WRONG

COLOURS = {UNTRAINED: MUTED, "MAML": SUPPORT, "FOMAML": RIGHT, "Reptile": WRONG}
OTHERS = ("#8e5bb5", "#d98c1f", "#3aa6a6", "#a65a3a", "#d66fa6", "#a8b23a", "#5f6fd9", "#444444")  # of other algorithms
PANELS = [["steps"] * 3 + ["time"] * 3, ["scores"] * 2 + ["speed"] * 2 + ["memory"] * 2]


def draw(rows: Sequence[Row], results: Sequence[Result], path: Path) -> None:
    """Plot validation against meta-iterations and time, and bars of score, speed and memory."""
    figure = Figure(figsize=(12, 4.5 + 0.35 * len(rows)), layout="constrained")
    panels: dict[str, Any] = figure.subplot_mosaic(PANELS)  # type: ignore[arg-type]
    for axes in panels.values():
        axes.spines[["top", "right"]].set_visible(False)
        axes.grid(alpha=0.3)
    others = cycle(OTHERS)
    colours = {row.algorithm: COLOURS.get(row.algorithm) or next(others) for row in rows}
    lines = {}
    for result in results:
        name, fit = algorithm_of(result), result["fit"]
        if fit is None or not result["tests"]:
            continue
        metric, unit = score_of(fit, "val")
        points = [(s + 1, unit * v) for s, v in fit["curves"].get(f"val/{metric}", []) if v is not None]
        for panel, scale in (("steps", 1.0), ("time", fit["train_seconds"] / fit["steps"])):
            x, y = [scale * step for step, _ in points], [value for _, value in points]
            (lines[name],) = panels[panel].plot(x, y, "o-", markersize=3, color=colours[name])
    metric = f"{rows[0].metric}, %" if rows[0].metric == "accuracy" else rows[0].metric
    for panel, label in (("steps", "meta-iterations"), ("time", "seconds of training")):
        panels[panel].set(xlabel=label, ylabel=f"validation {metric}")
    if lines:
        figure.legend(lines.values(), lines, loc="outside upper center", ncols=5)

    def bars(panel: str, field: str, title: str, shift: float = 0.0, **style: float) -> None:
        """Draw a bar per row, labelled with its value, and its confidence interval if it has one."""
        axes = panels[panel]
        shown = [row for row in rows if getattr(row, field) is not None]
        places, widths = [i + shift for i in range(len(shown))], [getattr(row, field) for row in shown]
        errors = [getattr(row, f"{field}_ci95", 0.0) for row in shown]
        colour = [colours[row.algorithm] for row in shown]
        drawn = axes.barh(places, widths, 0.4 if shift else 0.7, xerr=errors, color=colour, **style)
        axes.bar_label(drawn, fmt=lambda width: f"{width:.3g}" if width < 1000 else f"{width:,.0f}", padding=3)
        axes.set_yticks(range(len(shown)), [row.algorithm for row in shown])
        axes.set_ylim(max(len(shown), 1) - 0.5, -0.5)  # the first on top, as in the table
        axes.set_title(title, size=10)
        axes.margins(x=0.15)

    bars("scores", "before", "", -0.2, alpha=0.35)
    bars("scores", "after", f"test {metric}, before (pale) and after adaptation", 0.2)
    bars("speed", "tasks_per_second", "tasks per second in training")
    bars("memory", "peak_memory", "peak memory of training, MB")
    figure.savefig(path, dpi=100)
