"""Turn benchmarks/results into the tables of docs/benchmarks.md and docs/guide.md, between their markers.

    python benchmarks/tables.py [--check]

A marker is a comment, <!-- results:NAME -->, and the table ends at the next <!-- end -->. What has no results yet says
which command makes them.
"""

import argparse
import json
import math
import re
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from statistics import fmean, median, stdev
from typing import Any

from cosine import told

from meta_lightning.compare.command import NAMES
from meta_lightning.compare.report import cells_of, markdown, without_empty_columns
from meta_lightning.compare.summary import summarise

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "benchmarks" / "results"
PAGES = (ROOT / "docs" / "benchmarks.md", ROOT / "docs" / "guide.md")
MARKED = re.compile(r"(<!-- results:(\w+) -->\n).*?(<!-- end -->)", re.DOTALL)
EVALUATE = "python benchmarks/evaluate.py --config"

# Finn et al. (2017), table 1: transductive. Nichol et al. (2018), tables 1 and 2: Reptile, transductive and not, and
# FOMAML on Omniglot, transductive.
PUBLISHED = {
    "omniglot-maml_5way_1shot": ("98.7 ± 0.4", None),
    "omniglot-maml_5way_1shot-FOMAML": ("98.3 ± 0.5", None),
    "omniglot-reptile_5way_1shot": ("97.68 ± 0.04", "95.39 ± 0.09"),
    "omniglot-maml_5way_5shot": ("99.9 ± 0.1", None),
    "omniglot-maml_5way_5shot-FOMAML": ("99.2 ± 0.2", None),
    "omniglot-reptile_5way_5shot": ("99.48 ± 0.06", "98.90 ± 0.10"),
    "omniglot-maml_20way_1shot": ("95.8 ± 0.3", None),
    "omniglot-maml_20way_1shot-FOMAML": ("89.4 ± 0.5", None),
    "omniglot-reptile_20way_1shot": ("89.43 ± 0.14", "88.14 ± 0.15"),
    "omniglot-maml_20way_5shot": ("98.9 ± 0.2", None),
    "omniglot-maml_20way_5shot-FOMAML": ("97.9 ± 0.1", None),
    "omniglot-reptile_20way_5shot": ("97.12 ± 0.32", "96.65 ± 0.33"),
    "omniglot-mamlpp_20way_1shot": ("97.65 ± 0.05", None),  # Antoniou et al. (2019), table 1, five checkpoints together
    "mini_imagenet-maml_5way_1shot": ("48.70 ± 1.84", None),
    "mini_imagenet-maml_5way_1shot-FOMAML": ("48.07 ± 1.75", None),
    "mini_imagenet-reptile_5way_1shot": ("49.97 ± 0.32", "47.07 ± 0.26"),
    "mini_imagenet-maml_5way_5shot": ("63.11 ± 0.92", None),
    "mini_imagenet-maml_5way_5shot-FOMAML": ("63.15 ± 0.91", None),
    "mini_imagenet-reptile_5way_5shot": ("65.99 ± 0.58", "62.74 ± 0.37"),
}
DIVERGED = 1000.0  # above which nobody wants an error's decimals
SINUSOID = {
    "sinusoid-maml_5shot": "0.67, 0.38, 0.35",
    "sinusoid-maml_5shot-text": "0.67, 0.38, 0.35",  # α 0.01, as the paper's text has it
    "sinusoid-maml_10shot": "",
    "sinusoid-maml_10shot-text": "",
}

Result = dict[str, Any]


def load(folder: Path) -> list[Result]:
    """The results of runs in a folder, in the order of their names."""
    contents = [json.loads(path.read_text()) for path in sorted(folder.glob("*.json"))]
    return [result for result in contents if "tests" in result]


def to_come(command: str) -> str:
    return f"*Still to be measured:* `{command}`\n"


def runs_of(results: Sequence[Result], name: str) -> list[Result]:
    """The seeds of a run."""
    return [result for result in results if base(result) == name]


def base(result: Result) -> str:
    """A run's name without its seed."""
    return re.sub(r"-seed\d+$", "", result["name"])


def mean_of(runs: Sequence[Result], kind: str, metric: str, unit: float, digits: int) -> str:
    """A figure's mean over the seeds, with the half-width of its 95 % interval over tasks."""
    figures = [run["tests"][kind]["figures"] for run in runs if kind in run["tests"]]
    if not figures:
        return ""
    values = [[figure[f"test/{metric}{suffix}"] for figure in figures] for suffix in ("", "_ci95")]
    if None in values[0]:
        return "not finite"
    mean, ci95 = (unit * fmean(of_seeds) for of_seeds in values)
    form = f".{digits}f" if mean < DIVERGED else ".0e"
    return f"{mean:{form}} ± {ci95:{form}}"


def mean_and_median(runs: Sequence[Result], kind: str) -> str:
    """The mean error, which a few tasks can make, and the median over the tasks of all seeds."""
    of_tasks = [run["tests"].get(kind, {}).get("of_tasks", {}).get("test/mse", []) for run in runs]
    errors = [math.inf if error is None else error for errors in of_tasks for error in errors]
    return mean_of(runs, kind, "mse", 1, 3) + (f", {median(errors):.3f}" if errors else "")


TRAINING = ["meta-iterations", "changed", "minutes", "on", "seeds"]


def training_of(runs: Sequence[Result]) -> list[str]:
    """How a run was trained, in the columns of ``TRAINING``."""
    fits = [run["fit"] for run in runs if run["fit"]]
    if not fits:  # a checkpoint that was there
        return ["" for _ in TRAINING]
    minutes = fmean(fit["train_seconds"] for fit in fits) / 60
    changed = ", ".join(changes(runs[0]["commands"]["fit"]))
    return [f"{fits[0]['steps']:,}", changed, f"{minutes:,.1f}", device_of(fits[0]), str(len(runs))]


def device_of(fit: Result) -> str:
    """What a training ran on."""
    device, threads = fit["machine"]["device"], fit["machine"]["threads"]
    return f"cpu, {threads} thread{'s' * (threads > 1)}" if device == "cpu" else device


CHECKPOINT = re.compile(r".*/([^/]+)/checkpoints/\w+\.ckpt")  # of a run, whose name says it
PLACES = (
    "root",
    "seed",
    "epoch_length",
    "max_steps",
    "logger",
    "enable_progress_bar",
    "limit_val_batches",
    "val_tasks",
    "accelerator",
)  # the steps and the device have columns


def changes(command: Sequence[str]) -> list[str]:
    """What a training's command line changes of its configuration, beside the algorithm and what only places it."""
    options = re.findall(r"--(?:model|data|trainer)\.([\w.]+)[= ](\S+)", " ".join(command))
    changed = [(name, CHECKPOINT.sub(r"\1", value)) for name, value in options if name.partition(".")[0] not in PLACES]
    return [f"`{name} {value}`" for name, value in changed]


def published(results: Sequence[Result]) -> str:
    """Classification with both kinds of evaluation, Omniglot and mini-ImageNet beside the papers' figures."""
    others = {base(result): ("", None) for result in results if "transductive-1" in result["tests"]}
    heads = ["", "paper", "1 query", "15 queries", "paper, alone", "1 query, alone", "15 queries, alone"]
    rows = []
    for name, (transductive, alone) in (PUBLISHED | {n: f for n, f in others.items() if n not in PUBLISHED}).items():
        if runs := runs_of(results, name):
            cells = [
                mean_of(runs, f"{kind}-{queries}", "accuracy", 100, 2)
                for kind in ("transductive", "alone")
                for queries in (1, 15)
            ]
            spread = [100 * run["tests"]["transductive-1"]["figures"]["test/accuracy"] for run in runs]
            over = f"{stdev(spread):.2f}" if len(spread) > 1 else ""
            rows.append([f"`{name}`", transductive, *cells[:2], alone or "", *cells[2:], *training_of(runs), over])
    if not rows:
        return to_come(f"{EVALUATE} omniglot/maml_5way_1shot.yaml --data.root data")
    return markdown(without_empty_columns([[*heads, *TRAINING, "std over seeds"], *rows]))


def sinusoid(results: Sequence[Result]) -> str:
    """The sinusoids' errors beside the paper's."""
    rows = [
        [f"`{name}`", paper, *(mean_and_median(runs, f"steps-{n}") for n in (1, 5, 10)), *training_of(runs)]
        for name, paper in SINUSOID.items()
        if (runs := runs_of(results, name))
    ]
    if not rows:
        return to_come(f"{EVALUATE} sinusoid/maml_5shot.yaml --regression")
    steps = ["1 step: mean, median", "5 steps: mean, median", "10 steps: mean, median"]
    heads = ["mean squared error", "paper, 1, 5 and 10 steps", *steps]
    return markdown(without_empty_columns([[*heads, *TRAINING], *rows]))


def comparison(folder: Path) -> str:
    """A comparison's table, from its runs."""
    results = load(folder / "results")
    trained = [result for result in results if result["fit"] and result["tests"]]
    if not trained:
        return to_come("python -m meta_lightning compare --config maml.yaml --out benchmarks/results/compare")
    found = sorted({base(result) for result in trained})
    order = [name for name in NAMES if name in found] + [name for name in found if name not in NAMES]
    seeds = len({result["fit"]["seed"] for result in trained})
    fit = next(result["fit"] for result in trained if base(result) == order[0])
    model, data = (fit["config"][part]["init_args"] for part in ("model", "data"))
    tasks = trained[0]["tests"]["test"]["figures"]["test/tasks"]
    said = (
        f"{fit['steps']:,} meta-iterations of {data['meta_batch_size']} tasks, {data['ways']}-way {data['shots']}-shot"
        f"; {order[0]} with inner_lr {model['inner_lr']} and {model['inner_steps']} inner steps; seeds: {seeds}; "
        f"{tasks:.0f} test tasks; {fit['machine']['processor']}, {device_of(fit)}.\n"
    )
    return f"{markdown(cells_of(summarise(results, order, seeds)))}\n{said}"


def cosine(folder: Path) -> str:
    """How the three updates point, from benchmarks/cosine.py."""
    path = folder / "cosine.json"
    if not path.exists():
        return to_come("python benchmarks/cosine.py --ckpt_path runs/best.ckpt")
    measured = json.loads(path.read_text())
    pairs = list(measured["points"][0]["cosines"])

    def cell(point: Result, pair: str, start: str) -> str:
        if not told(point, pair, start):
            return "noise"
        return f"{point['cosines'][pair][start]:.2f} ± {point['ci95'][pair][start]:.2f}"

    rows = [
        [start, f"{point['inner_lr']:g}", str(point["inner_steps"]), *(cell(point, pair, start) for pair in pairs)]
        for start in ("trained", "random")
        for point in measured["points"]
        if point["inner_lr"] in measured["shown"]
    ]
    return markdown([["θ", "α", "K", *pairs], *rows])


def scaling(folder: Path) -> str:
    """Time and memory against tasks, steps, ways and image size, as benchmarks/scaling.py printed them."""
    path = folder / "scaling.md"
    return (
        path.read_text() if path.exists() else to_come("python benchmarks/scaling.py > benchmarks/results/scaling.md")
    )


def tables(results: Path = RESULTS) -> dict[str, str]:
    """Every table by the name of its marker."""
    runs = load(results)
    makers: dict[str, Callable[[], str]] = {
        "published": lambda: published(runs),
        "sinusoid": lambda: sinusoid(runs),
        "comparison": lambda: comparison(results / "compare"),
        "scaling": lambda: scaling(results),
        "cosine": lambda: cosine(results),
    }
    return {name: make() for name, make in makers.items()}


def filled(page: str, made: dict[str, str]) -> str:
    """A page with its tables in place."""
    return MARKED.sub(lambda found: f"{found[1]}{made[found[2]]}{found[3]}", page)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="change nothing; fail if a page differs from its records")
    check, made = parser.parse_args().check, tables()
    pages = {path: filled(path.read_text(), made) for path in PAGES}
    if check and (stale := [path.name for path, text in pages.items() if text != path.read_text()]):
        sys.exit(f"{', '.join(stale)} must show what benchmarks/results has: run python benchmarks/tables.py")
    for path, text in pages.items():
        path.write_text(text)
