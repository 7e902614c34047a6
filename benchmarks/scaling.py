"""Time and peak memory of a meta-gradient against tasks, inner steps, ways and image size: a table and a PNG.

    python benchmarks/scaling.py [--device cuda] [--quick] [--out benchmarks/results/scaling]

Each point runs in a process of its own. The slope is that of log(figure) over log(axis), by least squares.
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

from meta_lightning.machine import keep_freed_memory

BASE = Workload("base", tasks=4, shots=1, size=28, filters=32, queries=5)
AXES = {
    "tasks": [1, 4, 16, 64, 256],
    "steps": [1, 2, 5, 10, 20],
    "ways": [2, 5, 10, 20],
    "size": [28, 42, 84],
}
VARIANTS: dict[str, tuple[str, dict[str, Any]]] = {
    "MAML": ("MAML", {}),
    "MAML, recomputed": ("MAML", {"recompute_inner_steps": True}),
    **{name: (name, {}) for name in ALGORITHMS if name != "MAML"},
}


def measure(variant: str, workload: Workload, device: str) -> dict[str, float]:
    algorithm, options = VARIANTS[variant]
    ours(algorithm, workload._replace(tasks=1, steps=1), device, **options)()
    step = ours(algorithm, workload, device, **options)
    memory = peak_memory(step, device)
    return {"ms": interleaved({variant: step}, 3, device)[variant], "MB": memory}


def slope(values: list[int], figures: list[float]) -> float:
    return float(np.polyfit(np.log(values), np.log(np.maximum(figures, 1e-3)), 1)[0])


def main(device: str, quick: bool, out: Path) -> None:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(13, 6), layout="constrained")
    plots = figure.subplots(2, len(AXES))
    print("| axis | algorithm | ms | MB | slope of ms | slope of MB |\n|---|---|---|---|---|---|")
    for column, (axis, values) in enumerate(AXES.items()):
        values = values[:3] if quick else values
        for variant in VARIANTS:
            points = []
            for value in values:
                workload = BASE._replace(**{axis: value})
                command = [sys.executable, __file__, "--device", device, "--point", json.dumps([variant, *workload])]
                run = subprocess.run(command, check=True, capture_output=True, text=True)
                points.append(json.loads(run.stdout.splitlines()[-1]))
            cells = []
            for row, unit in enumerate(("ms", "MB")):
                figures = [point[unit] for point in points]
                plots[row, column].loglog(values, figures, "o-", label=variant)
                plots[row, column].set(xlabel=axis, ylabel=unit)
                plots[row, column].grid(alpha=0.3)
                cells.append((" ".join(f"{f:.0f}" for f in figures), slope(values, figures)))
            (ms, time_slope), (mb, memory_slope) = cells
            print(f"| {axis} {values} | {variant} | {ms} | {mb} | {time_slope:.2f} | {memory_slope:.2f} |", flush=True)
    plots[0, 0].legend()
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
