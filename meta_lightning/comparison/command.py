"""``python -m meta_lightning compare``: the algorithms on the same tasks, in one table."""

import math
import shlex
from collections.abc import Mapping
from itertools import product
from pathlib import Path
from typing import Any

from meta_lightning.checks import require, require_at_least, require_choice
from meta_lightning.comparison.report import write_report
from meta_lightning.comparison.runs import Run, complete
from meta_lightning.comparison.summary import UNTRAINED, summarise
from meta_lightning.train import ALGORITHMS

NAMES = tuple(algorithm.__name__ for algorithm in ALGORITHMS.values())
GRID = (1 / 3, 1.0, 3.0)  # factors of inner_lr and outer_lr


def compare(
    config: str,
    algorithms: tuple[str, ...] = NAMES,
    max_steps: int | None = None,
    seeds: tuple[int, ...] = (0,),
    grid: int = 0,
    options: Mapping[str, str] | None = None,
    out: Path = Path("runs/compare"),
    overwrite: bool = False,
) -> str:
    """Train several algorithms on the same tasks, test them, and write one table, figure and report page.

    Each training and test is a ``fit`` or ``test`` of its own, for the same number of meta-iterations, and the last
    parameters are tested. The same command goes on where an earlier one stopped, and takes what is finished. All test
    on the same tasks, those of the first seed.

    Args:
        config: Configuration of ``fit``; its algorithm is replaced.
        algorithms: The algorithms, the first of which the others are compared with.
        max_steps: Meta-iterations of each training. Default: the configuration's.
        seeds: Each is the seed of an initialisation and of training tasks; several give a standard deviation.
        grid: Meta-iterations of each of the 9 short trainings an algorithm with a third, one and three times its
            inner_lr and outer_lr, of which it is told how many come near the best; 0 for none.
        options: What else stands on the command line of ``fit`` and ``test``, by algorithm, ``all`` for every one:
            ``--options.Reptile="--model.outer_lr 0.5 --model.inner_steps 8"``.
        out: Folder of the report (``comparison.html``, ``.md``, ``.csv``, ``.png``), the results and what runs leave.
        overwrite: Begin anew where ``out`` holds runs of other settings.

    Returns:
        The table, and where the report is.

    Raises:
        InputError: If something given cannot be used.
        ChildProcessError: If a run failed, after the others were run and the report written.
        InterruptedError: If it was interrupted.
    """
    options = options or {}
    for name in algorithms:
        require_choice(NAMES, algorithms=name)
    require(
        len({*algorithms}) == len(algorithms) > 0, f"algorithms must be one or more different ones, got {algorithms}"
    )
    require(len({*seeds}) == len(seeds) > 0, f"seeds must be one or more different numbers, got {seeds}")
    require_at_least(0, grid=grid)
    for name in options:
        require_choice(("all", *algorithms), options=name)

    def arguments(algorithm: str, *more: str) -> list[str]:
        """What ``fit`` and ``test`` share."""
        own = [shlex.split(options.get(name, "")) for name in ("all", algorithm)]
        steps = [] if max_steps is None else [f"--trainer.max_steps={max_steps}"]
        return [f"--config={config}", f"--model={algorithm}", *own[0], *own[1], *steps, *more]

    def run(algorithm: str, seed: int) -> Run:
        # the trial validation before training would count in the memory
        fit = [f"--seed_everything={seed}", f"--data.seed={seed}", "--trainer.num_sanity_val_steps=0"]
        test = arguments(algorithm, f"--seed_everything={seed}", f"--data.seed={seeds[0]}")
        return Run(f"{algorithm}-seed{seed}", arguments(algorithm, *fit), {"test": test})

    results: list[dict[str, Any]] = []
    failures: list[str] = []

    def add(run: Run) -> None:
        """Add a run's result, or its failure, to the report."""
        try:
            results.append(complete(run, out, overwrite))
        except KeyboardInterrupt:
            raise InterruptedError("interrupted; the same command goes on where this one stopped") from None
        except ChildProcessError as error:
            failures.append(f"{run.name}: {error}")
        write_report(summarise(results, algorithms), results, failures, out)

    for seed in seeds:
        add(run(algorithms[0], seed)._replace(name=f"{UNTRAINED}-seed{seed}", fit=None))
        for algorithm in algorithms:
            add(run(algorithm, seed))
    if grid:
        for result in [result for result in results if result["name"] in {f"{a}-seed{seeds[0]}" for a in algorithms}]:
            for cell in grid_of(result, run(result["fit"]["algorithm"], seeds[0]), grid):
                add(cell)
    # that a cell of the grid diverges is what the grid is to find out
    failed = [failure for failure in failures if "-grid" not in failure]
    if failed:
        raise ChildProcessError(f"{'; '.join(failed)}. The same command tries again; {out} has the others' report")
    table = (out / "comparison.md").read_text(encoding="utf-8")
    return f"{table}\nThe report is {out / 'comparison.html'}."


def grid_of(result: Mapping[str, Any], run: Run, steps: int) -> list[Run]:
    """The short trainings around the settings of one that is finished; Reptile's outer_lr stays at most 1."""
    assert run.fit is not None
    settings = result["fit"]["config"]["model"]["init_args"]
    most = 1.0 if result["fit"]["algorithm"] == "Reptile" else math.inf
    # validated once, at the end
    fit = [*run.fit, f"--trainer.max_steps={steps}", f"--data.epoch_length={steps}"]
    cells = []
    for i, j in product(range(len(GRID)), repeat=2):
        inner_lr, outer_lr = settings["inner_lr"] * GRID[i], min(most, settings["outer_lr"] * GRID[j])
        rates = [f"--model.inner_lr={inner_lr:.6g}", f"--model.outer_lr={outer_lr:.6g}"]
        cells.append(Run(f"{run.name}-grid{i}{j}", [*fit, *rates], {}))
    return cells
