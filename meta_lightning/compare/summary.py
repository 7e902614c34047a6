"""From the results of runs to the rows of a table."""

import math
from collections.abc import Iterable, Mapping, Sequence
from statistics import fmean, stdev
from typing import Any, NamedTuple

UNTRAINED = "untrained"
CELLS = 9  # of a grid
NEAR = 2.0  # points of accuracy from the best of a grid; for a regression per cent of its error

Result = Mapping[str, Any]


class Row(NamedTuple):
    """An algorithm's figures, means over its seeds; None for what there is none of.

    Accuracies and their half-widths (``…_ci95``, over tasks) are in per cent, or errors as they are; ``…_relative`` are
    the first algorithm's multiples, of the accuracy the difference from it.
    """

    algorithm: str
    metric: str
    before: float
    before_ci95: float
    after: float
    after_ci95: float
    after_relative: float | None
    seconds: float | None  # of training, without validation
    seconds_relative: float | None
    tasks_per_second: float | None
    tasks_per_second_relative: float | None
    peak_memory: float | None  # MB
    peak_memory_relative: float | None
    seeds: int  # of those that were asked for, the finished
    seeds_asked: int
    after_std: float | None  # over the seeds
    skipped: float | None  # non-finite steps, of all seeds together
    near_best: float | None  # share of the grid


def score_of(record: Mapping[str, Any], stage: str) -> tuple[str, float]:
    """The name of what a record is judged by, ``accuracy`` or ``mse``, and the factor by which it is shown."""
    return ("accuracy", 100.0) if f"{stage}/accuracy" in record["figures"] else ("mse", 1.0)


def algorithm_of(result: Result) -> str:
    """What a run is of: an algorithm, by the name that it has in the table, or the untrained network."""
    return str(result["name"]).rpartition("-seed")[0]


def mean(values: Iterable[float | None]) -> float | None:
    """The mean of the values that there are; None if there is none."""
    known = [value for value in values if value is not None]
    return fmean(known) if known else None


def summarise(results: Sequence[Result], algorithms: Sequence[str], seeds: int) -> list[Row]:
    """A row for the untrained network and for each of the algorithms that has results."""
    rows = {}
    for algorithm in (UNTRAINED, *algorithms):
        mine = [result for result in results if algorithm_of(result) == algorithm]
        if runs := [result for result in mine if result["tests"]]:
            grid = [result["fit"] for result in mine if "-grid" in result["name"]]
            rows[algorithm] = row_of(algorithm, runs, seeds, grid)
    reference = rows.get(algorithms[0])
    return [row if reference is None else relative(row, reference) for row in rows.values()]


def row_of(algorithm: str, runs: Sequence[Result], seeds: int, grid: Sequence[Mapping[str, Any]]) -> Row:
    """The row of an algorithm, not yet compared with another's."""
    tests = [next(iter(run["tests"].values())) for run in runs]
    fits = [run["fit"] for run in runs if run["fit"] is not None]
    metric, unit = score_of(tests[0], "test")

    def tested(name: str) -> list[float]:
        values = [test["figures"].get(f"test/{name}") for test in tests]
        return [math.nan if value is None else unit * value for value in values]  # no number is no finite one

    after = tested(metric)
    skipped = [fit["figures"]["train/skipped"] for fit in fits if "train/skipped" in fit["figures"]]
    return Row(
        algorithm=algorithm,
        metric=metric,
        before=fmean(tested(f"{metric}_before")),
        before_ci95=fmean(tested(f"{metric}_before_ci95")),
        after=fmean(after),
        after_ci95=fmean(tested(f"{metric}_ci95")),
        after_relative=None,
        seconds=mean(fit.get("train_seconds") for fit in fits),
        seconds_relative=None,
        tasks_per_second=mean(fit["tasks_per_second"] for fit in fits),
        tasks_per_second_relative=None,
        peak_memory=mean(fit.get("peak_memory") for fit in fits),
        peak_memory_relative=None,
        seeds=len(runs),
        seeds_asked=seeds,
        after_std=stdev(after) if len(after) > 1 else None,
        skipped=sum(skipped) if skipped else None,
        near_best=near_best(grid),
    )


def relative(row: Row, reference: Row) -> Row:
    """The row with its comparison."""
    ratios: dict[str, Any] = {}
    for name in ("seconds", "tasks_per_second", "peak_memory"):
        value, of = getattr(row, name), getattr(reference, name)
        ratios[f"{name}_relative"] = value / of if value is not None and of else None
    return row._replace(after_relative=row.after - reference.after, **ratios)


def near_best(fits: Sequence[Mapping[str, Any]]) -> float | None:
    """The share of a grid's trainings that validate near the best of them; one that failed does not."""
    if not fits:
        return None
    metric, unit = score_of(fits[0], "val")
    scores = [fit["figures"].get(f"val/{metric}") for fit in fits]
    known: list[float] = [unit * score for score in scores if score is not None]
    if metric == "accuracy":
        return sum(score >= max(known) - NEAR for score in known) / CELLS
    return sum(score <= min(known) * (1 + NEAR / 100) for score in known) / CELLS
