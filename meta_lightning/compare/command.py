"""``python -m meta_lightning compare``: several algorithms on the same tasks, in one table."""

import re
import shlex
from collections.abc import Mapping
from itertools import product
from pathlib import Path
from typing import Any

from meta_lightning.algorithms import ALGORITHMS
from meta_lightning.checks import require, require_at_least, require_choice
from meta_lightning.compare.report import write_report
from meta_lightning.compare.runs import Run, complete
from meta_lightning.compare.summary import UNTRAINED, summarise

NAMES = tuple(algorithm.__name__ for algorithm in ALGORITHMS.values())
GRID = (1 / 3, 1.0, 3.0)  # factors of inner_lr and outer_lr
LABEL = re.compile(r"\w[\w.+-]*")  # becomes part of file and option names


def compare(
    config: str,
    algorithms: tuple[str, ...] = ("MAML", "FOMAML", "Reptile"),
    max_steps: int | None = None,
    seeds: tuple[int, ...] = (0,),
    grid: int = 0,
    options: Mapping[str, str] | None = None,
    out: Path = Path("runs/compare"),
    overwrite: bool = False,
) -> str:
    """Train several algorithms on the same tasks, test them, and write a table, a figure and a report page.

    Each training and each test is a ``fit`` or ``test`` in a separate process. All trainings take the same number of
    meta-iterations, and their last parameters are tested on the same tasks, those of the first seed. The same command
    resumes an interrupted comparison and keeps finished runs.

    Args:
        config: Configuration of ``fit``; its algorithm is replaced.
        algorithms: The algorithms; the first is the reference. ``NAME=ALGORITHM`` runs an algorithm a second time under
            another name, with its own options: ``Reptile-Adam=Reptile``.
        max_steps: Meta-iterations of each training. Default: the configuration's.
        seeds: Seeds of initialisation and training tasks; several give a standard deviation.
        grid: Meta-iterations of each of 9 short trainings per algorithm, with 1/3, 1 and 3 times its inner_lr and
            outer_lr (if Reptile's would exceed 1: with 1, 1/3 and 1/9). The table counts those near the best; 0 for
            no grid.
        options: More command-line options of ``fit`` and ``test``, by algorithm or name, or ``all`` for all:
            ``--options.Reptile="--model.outer_lr 0.5 --model.inner_steps 8"``.
        out: Folder of the report (``comparison.html``, ``.md``, ``.csv``, ``.png``), the results and the runs.
        overwrite: Start again if ``out`` holds runs with other settings.

    Returns:
        The table and the path of the report.

    Raises:
        InputError: If an argument is invalid.
        ChildProcessError: If a run failed, after the other runs have finished and the report is written.
        InterruptedError: If the comparison was interrupted.
    """
    options = options or {}
    chosen = {label or name: name for label, _, name in (given.rpartition("=") for given in algorithms)}
    require(0 < len(chosen) == len(algorithms), f"algorithms must be one or more different ones, got {algorithms}")
    require(0 < len({*seeds}) == len(seeds), f"seeds must be one or more different numbers, got {seeds}")
    require_at_least(0, grid=grid)
    for label, name in chosen.items():
        require_choice(NAMES, algorithms=name)
        require(
            LABEL.fullmatch(label) is not None and (label == name or label not in (*NAMES, UNTRAINED)),
            f"algorithms must have new names of letters, digits and -+._, got {label!r} for {name}",
        )
    for name in options:
        require_choice(("all", *chosen), options=name)

    def run(label: str, seed: int) -> Run:
        shared = [f"--config={config}", f"--model={chosen[label]}"]
        shared += [option for name in ("all", label) for option in shlex.split(options.get(name, ""))]
        shared += [] if max_steps is None else [f"--trainer.max_steps={max_steps}"]
        shared += [f"--seed_everything={seed}"]
        # no sanity check, which would count in the peak memory
        fit = [*shared, f"--data.seed={seed}", "--trainer.num_sanity_val_steps=0"]
        return Run(f"{label}-seed{seed}", fit, {"test": [*shared, f"--data.seed={seeds[0]}"]})

    results: list[dict[str, Any]] = []
    failures: list[str] = []

    def add(run: Run) -> None:
        """Add the result of a run, or its failure, to the report."""
        try:
            results.append(complete(run, out, overwrite))
        except KeyboardInterrupt:
            raise InterruptedError("interrupted; the same command resumes the comparison") from None
        except ChildProcessError as error:
            failures.append(f"{run.name}: {error}")
        write_report(summarise(results, [*chosen], len(seeds)), results, failures, out)

    for seed in seeds:
        add(run(next(iter(chosen)), seed)._replace(name=f"{UNTRAINED}-seed{seed}", fit=None))
        for label in chosen:
            add(run(label, seed))
    finished = {result["name"]: result for result in results}
    for first in [run(label, seeds[0]) for label in chosen]:
        if grid and first.name in finished:
            for cell in grid_of(finished[first.name], first, grid):
                add(cell)
    # a cell of the grid may diverge
    if failed := [failure for failure in failures if "-grid" not in failure]:
        report = f"; the others are reported in {out}" if results else ""
        raise ChildProcessError(f"{'; '.join(failed)}. The same command tries again{report}")
    table = (out / "comparison.md").read_text(encoding="utf-8")
    return f"{table}\nThe report is {out / 'comparison.html'}."


def grid_of(result: Mapping[str, Any], run: Run, steps: int) -> list[Run]:
    """Short trainings around the settings of a finished run."""
    assert run.fit is not None
    settings = result["fit"]["config"]["model"]["init_args"]
    # the grid stays below the largest outer_lr that the algorithm accepts
    largest = ALGORITHMS[result["fit"]["algorithm"].lower()].greatest_outer_lr / GRID[-1]
    inner_lr, outer_lr = settings["inner_lr"], min(largest, settings["outer_lr"])
    # a single epoch, so that validation runs once, at the end
    fit = [*run.fit, f"--trainer.max_steps={steps}", f"--data.epoch_length={steps}"]
    cells = []
    for (i, inner), (j, outer) in product(enumerate(GRID), repeat=2):
        rates = [f"--model.inner_lr={inner_lr * inner:.6g}", f"--model.outer_lr={outer_lr * outer:.6g}"]
        cells.append(Run(f"{run.name}-grid{i}{j}", [*fit, *rates], {}))
    return cells
