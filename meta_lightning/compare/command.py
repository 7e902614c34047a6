"""``python -m meta_lightning compare``: the algorithms on the same tasks, in one table."""

import re
import shlex
from collections.abc import Mapping
from itertools import product
from pathlib import Path
from typing import Any

from meta_lightning.checks import require, require_at_least, require_choice
from meta_lightning.compare.report import write_report
from meta_lightning.compare.runs import Run, complete
from meta_lightning.compare.summary import UNTRAINED, summarise
from meta_lightning.train import ALGORITHMS

NAMES = tuple(algorithm.__name__ for algorithm in ALGORITHMS.values())
GRID = (1 / 3, 1.0, 3.0)  # factors of inner_lr and outer_lr
LABEL = re.compile(r"\w[\w.+-]*")  # names files and options


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
        algorithms: The algorithms, the first of which the others are compared with. One may come again under a name
            of its own, with options of its own: ``Reptile-Adam=Reptile``.
        max_steps: Meta-iterations of each training. Default: the configuration's.
        seeds: Each is the seed of an initialisation and of training tasks; several give a standard deviation.
        grid: Meta-iterations of each of the 9 short trainings an algorithm with a third, one and three times its
            inner_lr and outer_lr (Reptile's at most 1: then 1, a third and a ninth), of which it is told how many come
            near the best; 0 for none.
        options: What else stands on the command line of ``fit`` and ``test``, by algorithm or name, ``all`` for all:
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
    labelled = [(label or name, name) for label, _, name in (given.rpartition("=") for given in algorithms)]
    labels = [label for label, _ in labelled]
    for label, name in labelled:
        require_choice(NAMES, algorithms=name)
        require(
            LABEL.fullmatch(label) is not None and (label == name or label not in (*NAMES, UNTRAINED)),
            f"algorithms must be named by letters, digits and -+._ and not as others are, got {label!r} for {name}",
        )
    require(len({*labels}) == len(labels) > 0, f"algorithms must be one or more different ones, got {algorithms}")
    require(len({*seeds}) == len(seeds) > 0, f"seeds must be one or more different numbers, got {seeds}")
    require_at_least(0, grid=grid)
    for name in options:
        require_choice(("all", *labels), options=name)

    def run(label: str, seed: int) -> Run:
        shared = [f"--config={config}", f"--model={dict(labelled)[label]}"]
        shared += [option for name in ("all", label) for option in shlex.split(options.get(name, ""))]
        shared += [] if max_steps is None else [f"--trainer.max_steps={max_steps}"]
        shared += [f"--seed_everything={seed}"]
        # the trial validation before training would count in the memory
        fit = [*shared, f"--data.seed={seed}", "--trainer.num_sanity_val_steps=0"]
        return Run(f"{label}-seed{seed}", fit, {"test": [*shared, f"--data.seed={seeds[0]}"]})

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
        write_report(summarise(results, labels, len(seeds)), results, failures, out)

    for seed in seeds:
        add(run(labels[0], seed)._replace(name=f"{UNTRAINED}-seed{seed}", fit=None))
        for label in labels:
            add(run(label, seed))
    if grid:
        finished = {result["name"]: result for result in results}
        for first in [run(label, seeds[0]) for label in labels]:
            if first.name in finished:
                for cell in grid_of(finished[first.name], first, grid):
                    add(cell)
    # that a cell of the grid diverges is what the grid is to find out
    if failed := [failure for failure in failures if "-grid" not in failure]:
        report = f"; {out} has the others' report" if results else ""
        raise ChildProcessError(f"{'; '.join(failed)}. The same command tries again{report}")
    table = (out / "comparison.md").read_text(encoding="utf-8")
    return f"{table}\nThe report is {out / 'comparison.html'}."


def grid_of(result: Mapping[str, Any], run: Run, steps: int) -> list[Run]:
    """The short trainings around the settings of one that is finished."""
    assert run.fit is not None
    settings = result["fit"]["config"]["model"]["init_args"]
    # where there is a greatest outer_lr, the grid ends at it
    most = ALGORITHMS[result["fit"]["algorithm"].lower()].greatest_outer_lr / GRID[-1]
    inner_lr, outer_lr = settings["inner_lr"], min(most, settings["outer_lr"])
    # validated once, at the end
    fit = [*run.fit, f"--trainer.max_steps={steps}", f"--data.epoch_length={steps}"]
    cells = []
    for (i, inner), (j, outer) in product(enumerate(GRID), repeat=2):
        rates = [f"--model.inner_lr={inner_lr * inner:.6g}", f"--model.outer_lr={outer_lr * outer:.6g}"]
        cells.append(Run(f"{run.name}-grid{i}{j}", [*fit, *rates], {}))
    return cells
