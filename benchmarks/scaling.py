"""Time and peak memory of a meta-gradient against tasks, inner steps, filters, ways and image size: a table and a PNG.

    python benchmarks/scaling.py [--device cuda] [--quick] [--out benchmarks/results/scaling] > scaling.md

Each point runs in a process of its own, all tasks in one pass, so that memory is that of the algorithm and not of the
caches that tasks_per_pass fits by default. Images of other sizes than 28 are in colour, by Conv4 with max-pooling. The
slope is that of log(figure) over log(axis) between the last two points, before which overhead may be most of it.
"""

import argparse
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import torch
from workloads import ALGORITHMS, Workload, interleaved, ours, peak_memory

from meta_lightning.runs.machine import commit, keep_freed_memory, processor

BASE = Workload("base", tasks=4, shots=1, size=28, filters=32, queries=5)
AXES = {
    "tasks": [1, 4, 16, 64, 256],
    "steps": [1, 2, 5, 10, 20],
    "filters": [16, 32, 64, 128],
    "ways": [2, 5, 10, 20],
    "size": [42, 84, 168],
}
UNITS = ("ms", "MB")
Curves = dict[tuple[str, str], tuple[list[int], dict[str, list[float]]]]  # by axis and variant: values, figures
VARIANTS: dict[str, tuple[str, dict[str, Any]]] = {
    "MAML": ("MAML", {}),
    "MAML, recomputed": ("MAML", {"recompute_inner_steps": True}),
    **{name: (name, {}) for name in ALGORITHMS if name != "MAML"},
}


def measure(variant: str, workload: Workload, device: str) -> dict[str, float]:
    algorithm, options = VARIANTS[variant]
    options = options | {"tasks_per_pass": workload.tasks}
    # less than any point, so that what it leaves is not in use before the first step
    ours(algorithm, workload._replace(tasks=1, steps=1, ways=2, queries=1), device, **options)()
    step = ours(algorithm, workload, device, **options)
    memory = peak_memory(step, device)
    return {"ms": interleaved({variant: step}, 3, device)[variant], "MB": memory}


def slope(values: list[int], figures: list[float]) -> float:
    return float(np.diff(np.log(figures[-2:]))[0] / np.diff(np.log(values[-2:]))[0])


def main(device: str, quick: bool, out: Path) -> None:
    print("| axis | algorithm | ms | MB | slope of ms | slope of MB |\n|---|---|---|---|---|---|")
    curves: Curves = {}
    for axis, values in AXES.items():
        values = values[:3] if quick else values
        for variant in VARIANTS:
            points = []
            for value in values:
                workload = BASE._replace(**{axis: value})
                command = [sys.executable, __file__, "--device", device, "--point", json.dumps([variant, *workload])]
                run = subprocess.run(command, check=True, capture_output=True, text=True)
                points.append(json.loads(run.stdout.splitlines()[-1]))
            figures = {unit: [point[unit] for point in points] for unit in UNITS}
            curves[axis, variant] = values, figures
            listed = [" ".join(f"{f:.0f}" for f in figures[unit]) for unit in UNITS]
            slopes = [f"{slope(values, figures[unit]):.1f}" for unit in UNITS]
            print(f"| {axis} {values} | {variant} | {' | '.join(listed + slopes)} |", flush=True)
    threads = f"{processor()}, threads: {torch.get_num_threads()}" if device == "cpu" else torch.cuda.get_device_name()
    print(f"\nBeside what varies: {BASE.tasks} tasks, 5-way 1-shot, {BASE.queries} queries, 28×28, {BASE.filters} ")
    print(f"filters, 5 steps. torch {torch.__version__}, {threads}, commit {commit()}.")
    draw(curves, out)


def draw(curves: Curves, out: Path) -> None:
    from matplotlib.figure import Figure
    from matplotlib.ticker import LogLocator, NullLocator

    figure = Figure(figsize=(13, 6), layout="constrained")
    plots = figure.subplots(len(UNITS), len(AXES))
    for (axis, variant), (values, figures) in curves.items():
        for plot, unit in zip(plots[:, list(AXES).index(axis)], UNITS, strict=True):
            plot.loglog(values, figures[unit], "o-", label=variant)
            plot.set(xlabel=axis, ylabel=unit)
            plot.set_xticks(values, values)
            plot.xaxis.set_minor_locator(NullLocator())
            plot.yaxis.set_major_formatter("{x:g}")
            plot.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
            plot.yaxis.set_minor_locator(NullLocator())
            plot.grid(alpha=0.3)
    figure.legend(*plots[0, 0].get_legend_handles_labels(), loc="outside upper center", ncols=len(VARIANTS))
    figure.savefig(out.with_suffix(".png"), dpi=90)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--quick", action="store_true", help="three points an axis")
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/scaling"))
    parser.add_argument("--point", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.device == "cpu":
        keep_freed_memory()  # as fit does; the peers have it too
    if arguments.point:
        variant, *fields = json.loads(arguments.point)
        print(json.dumps(measure(variant, Workload(*fields), arguments.device)))
    else:
        main(arguments.device, arguments.quick, arguments.out)
