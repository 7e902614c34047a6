"""Rows of the comparison table, from the results of runs."""

import math
from collections.abc import Iterable, Mapping, Sequence
from statistics import fmean, stdev
from typing import Any, NamedTuple

import torch

from meta_lightning.scores import TaskMean

UNTRAINED = "untrained"
CELLS = 9  # of a grid
NEAR = 2.0  # largest distance from the best of a grid: points of accuracy, or per cent of the mse

Result = Mapping[str, Any]


class Row(NamedTuple):
    """Figures of an algorithm, means over its seeds; None if not available.

    Accuracies and their half-widths (``…_ci95``, over tasks) are in per cent. ``…_relative`` is the ratio to the first
    algorithm, for ``after`` the difference from it, whose half-width is that of the differences of the single tasks.
    """

    algorithm: str
    metric: str
    before: float
    before_ci95: float
    after: float
    after_ci95: float
    after_relative: float | None = None
    after_relative_ci95: float | None = None
    seconds: float | None = None  # of training, without validation
    seconds_relative: float | None = None
    tasks_per_second: float | None = None
    tasks_per_second_relative: float | None = None
    peak_memory: float | None = None  # MB
    peak_memory_relative: float | None = None
    seeds: int = 0  # finished
    seeds_asked: int = 0
    after_std: float | None = None  # over seeds
    skipped: float | None = None  # non-finite steps, sum over seeds
    near_best: float | None = None  # share of the grid


def score_of(record: Mapping[str, Any], stage: str) -> tuple[str, float]:
    """The metric that ranks a record, ``accuracy`` or ``mse``, and the factor for display."""
    return ("accuracy", 100.0) if f"{stage}/accuracy" in record["figures"] else ("mse", 1.0)


def algorithm_of(result: Result) -> str:
    """The name of a run's algorithm in the table."""
    return str(result["name"]).rpartition("-seed")[0]


def mean(values: Iterable[float | None]) -> float | None:
    """The mean of the values that are not None; None if there are none."""
    known = [value for value in values if value is not None]
    return fmean(known) if known else None


def summarise(results: Sequence[Result], algorithms: Sequence[str], seeds: int) -> list[Row]:
    """Rows of the untrained network and of the algorithms that have results."""
    rows, tasks = {}, {}
    for algorithm in (UNTRAINED, *algorithms):
        mine = [result for result in results if algorithm_of(result) == algorithm]
        if runs := [result for result in mine if result["tests"]]:
            grid = [result["fit"] for result in mine if "-grid" in result["name"]]
            rows[algorithm], tasks[algorithm] = row_of(algorithm, runs, seeds, grid), means_of_tasks(runs)
    if (reference := rows.get(algorithms[0])) is None:
        return [*rows.values()]
    paired = {algorithm: paired_ci95(values, tasks[algorithms[0]]) for algorithm, values in tasks.items()}
    return [relative(row, reference)._replace(after_relative_ci95=paired[algorithm]) for algorithm, row in rows.items()]


def tests_of(runs: Sequence[Result]) -> list[Mapping[str, Any]]:
    """The record of the test of each run."""
    return [next(iter(run["tests"].values())) for run in runs]


def means_of_tasks(runs: Sequence[Result]) -> list[float]:
    """The score of each test task, the mean over the seeds; empty if a record lacks it."""
    tests = tests_of(runs)
    metric, unit = score_of(tests[0], "test")
    of_seeds = [test.get("of_tasks", {}).get(f"test/{metric}", []) for test in tests]
    if len({*map(len, of_seeds)}) > 1:
        return []
    return [
        unit * fmean(math.nan if value is None else value for value in task) for task in zip(*of_seeds, strict=True)
    ]


def paired_ci95(values: Sequence[float], reference: Sequence[float]) -> float | None:
    """Half-width of the 95 % confidence interval of the mean difference over the same tasks; None if they are not."""
    if len(values) != len(reference) or len(values) < 2 or values is reference:
        return None
    differences = TaskMean(sync_on_compute=False)
    differences.update(torch.tensor(values, dtype=torch.float64) - torch.tensor(reference, dtype=torch.float64))
    return float(differences.compute().ci95)


def row_of(algorithm: str, runs: Sequence[Result], seeds: int, grid: Sequence[Mapping[str, Any]]) -> Row:
    """The row of an algorithm, without the comparison."""
    tests = tests_of(runs)
    fits = [run["fit"] for run in runs if run["fit"] is not None]
    metric, unit = score_of(tests[0], "test")

    def tested(name: str) -> list[float]:
        values = [test["figures"].get(f"test/{name}") for test in tests]
        return [math.nan if value is None else unit * value for value in values]  # records have None for NaN

    after = tested(metric)
    skipped = [fit["figures"]["train/skipped"] for fit in fits if "train/skipped" in fit["figures"]]
    return Row(
        algorithm=algorithm,
        metric=metric,
        before=fmean(tested(f"{metric}_before")),
        before_ci95=fmean(tested(f"{metric}_before_ci95")),
        after=fmean(after),
        after_ci95=fmean(tested(f"{metric}_ci95")),
        seconds=mean(fit.get("train_seconds") for fit in fits),
        tasks_per_second=mean(fit["tasks_per_second"] for fit in fits),
        peak_memory=mean(fit.get("peak_memory") for fit in fits),
        seeds=len(runs),
        seeds_asked=seeds,
        after_std=stdev(after) if len(after) > 1 else None,
        skipped=sum(skipped) if skipped else None,
        near_best=near_best(grid),
    )


def relative(row: Row, reference: Row) -> Row:
    """The row with its comparison to the reference."""
    ratios: dict[str, Any] = {}
    for name in ("seconds", "tasks_per_second", "peak_memory"):
        value, of = getattr(row, name), getattr(reference, name)
        ratios[f"{name}_relative"] = value / of if value is not None and of else None
    return row._replace(after_relative=row.after - reference.after, **ratios)


def near_best(fits: Sequence[Mapping[str, Any]]) -> float | None:
    """The share of a grid's trainings whose validation is near the best; failed trainings count as far."""
    if not fits:
        return None
    metric, unit = score_of(fits[0], "val")
    scores = [fit["figures"].get(f"val/{metric}") for fit in fits]
    known: list[float] = [unit * score for score in scores if score is not None]
    if metric == "accuracy":
        return sum(score >= max(known) - NEAR for score in known) / CELLS
    return sum(score <= min(known) * (1 + NEAR / 100) for score in known) / CELLS
