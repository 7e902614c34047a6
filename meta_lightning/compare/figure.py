"""The figure of a comparison."""

from collections.abc import Sequence
from itertools import cycle
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure

from meta_lightning.compare.summary import UNTRAINED, Result, Row, algorithm_of, score_of

COLOURS = {UNTRAINED: "#8a94a0", "MAML": "#2f6fb7", "FOMAML": "#2e8b57", "Reptile": "#c8372d"}
OTHERS = ("#8e5bb5", "#d98c1f", "#3aa6a6", "#a65a3a")  # those with a name of their own
PANELS = [["steps"] * 3 + ["time"] * 3, ["scores"] * 2 + ["speed"] * 2 + ["memory"] * 2]


def draw(rows: Sequence[Row], results: Sequence[Result], path: Path) -> None:
    """Draw validation against meta-iterations and against time, and bars of the score, speed and memory."""
    figure = Figure(figsize=(12, 7), layout="constrained")
    panels = figure.subplot_mosaic(PANELS)  # type: ignore[arg-type]
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
    panels["steps"].set(xlabel="meta-iterations", ylabel=f"validation {metric}")
    panels["time"].set(xlabel="seconds of training", ylabel=f"validation {metric}")
    if lines:
        panels["steps"].legend(lines.values(), lines)

    def bars(panel: str, field: str, title: str, shift: float = 0.0, alpha: float = 1.0) -> None:
        """A bar for each row that has the figure, with its value above it and its confidence interval if any."""
        axes: Any = panels[panel]
        shown = [row for row in rows if getattr(row, field) is not None]
        drawn = axes.bar(
            [i + shift for i in range(len(shown))],
            [getattr(row, field) for row in shown],
            0.4 if shift else 0.7,
            yerr=[getattr(row, f"{field}_ci95", 0.0) for row in shown],
            color=[colours[row.algorithm] for row in shown],
            alpha=alpha,
        )
        axes.bar_label(drawn, fmt="{:.3g}", padding=3)
        axes.set_xticks(range(len(shown)), [row.algorithm.replace("-", "-\n") for row in shown])
        axes.set_title(title, size=10)
        axes.margins(y=0.12)

    bars("scores", "before", "", -0.2, 0.35)
    bars("scores", "after", f"test {metric}, before (pale) and after adaptation", 0.2)
    bars("speed", "tasks_per_second", "tasks a second in training")
    bars("memory", "peak_memory", "peak memory of training, MB")
    figure.savefig(path, dpi=100)
