"""How Reptile's update points beside FOMAML's and MAML's gradient, against inner_lr (α) and inner_steps (K).

    python benchmarks/cosine.py --ckpt_path runs/best.ckpt [--tasks 256]

Reptile's update is θ'−θ averaged over tasks; its negative is compared with the meta-gradients of the same tasks at the
same θ, all as one vector over all parameters: of a checkpoint, and of a random initialisation of its network. Each
vector is a mean over the tasks; the interval is a jackknife's over batches of 8. It writes docs/images/cosine.png and
benchmarks/results/cosine.json, of which benchmarks/tables.py makes the guide's table.
"""

import argparse
import copy
import json
import warnings
from itertools import product
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from meta_lightning import FOMAML, MAML, Glyphs, Reptile, TaskBatch, load_learner
from meta_lightning.inner_loop import Params
from meta_lightning.machine import commit, machine, versions
from meta_lightning.tasks import as_task_batch

INNER_LRS = (0.001, 0.01, 0.05, 0.2, 0.4)
INNER_STEPS = (1, 2, 5, 10)
SHOWN = (0.01, 0.2)
ALGORITHMS = ("MAML", "FOMAML", "Reptile")
PAIRS = {"FOMAML, MAML": (1, 0), "Reptile, FOMAML": (2, 1), "Reptile, MAML": (2, 0)}
BATCH = 8


def flat(params: Params) -> Tensor:
    return torch.cat([p.detach().flatten() for p in params.values()]).double()


def updates(network: nn.Module, batch: TaskBatch, inner_lr: float, inner_steps: int) -> Tensor:
    """MAML's and FOMAML's meta-gradient and the negative of Reptile's update.  # 3 P"""
    gradients = [
        flat(algorithm(network, inner_lr=inner_lr, inner_steps=inner_steps).meta_gradient(batch)[0])
        for algorithm in (MAML, FOMAML)
    ]
    reptile = Reptile(network, inner_lr=inner_lr, inner_steps=inner_steps)
    support = reptile.inner_batches(batch.support_x, batch.support_y, inner_steps)
    (mean,), _ = reptile.in_passes(reptile.adapt_pass, support)
    return torch.stack([*gradients, flat(reptile.meta_parameters()) - flat(mean)])


def measure(network: nn.Module, batches: list[TaskBatch], inner_lr: float, inner_steps: int) -> Any:
    """Each pair's cosine with the half-width of its interval, and each update's with that of other tasks.  # 3, 3, 3

    The interval is the jackknife's over batches: a bootstrap repeats batches, and the noise that this adds to both
    vectors lowers their cosine. The last is between the two halves of the tasks: near 0 an update is mostly noise.
    """
    each = torch.stack([updates(network, batch, inner_lr, inner_steps) for batch in batches])
    # to leave a batch out needs the inner products of the batches' vectors only, not the vectors
    n, gram = len(each), torch.einsum("aip,bjp->abij", each, each)
    weights = torch.cat([torch.ones(1, n), 1 - torch.eye(n)]).double()  # the first takes all, each other all but one
    inner = torch.einsum("ra,rb,abij->rij", weights, weights, gram)
    lengths = inner.diagonal(dim1=1, dim2=2).sqrt()
    found = torch.stack([inner[:, a, b] / (lengths[:, a] * lengths[:, b]) for a, b in PAIRS.values()], -1)
    deviation = ((n - 1) * found[1:].var(0, correction=0)).sqrt()
    halves = torch.cosine_similarity(each[::2].mean(0), each[1::2].mean(0), dim=-1)
    return found[0], 1.96 * deviation, halves


def draw(points: list[dict[str, Any]], tasks: int, path: Path) -> None:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(12, 4), layout="constrained")
    for axes, pair in zip(figure.subplots(1, 3, sharey=True), PAIRS, strict=True):
        for column, steps in enumerate(INNER_STEPS):
            mine = [point for point in points if point["inner_steps"] == steps]
            for start, style in (("trained", "o-"), ("random", "s:")):
                axes.errorbar(
                    [point["inner_lr"] for point in mine],
                    [point["cosines"][pair][start] for point in mine],
                    [point["ci95"][pair][start] for point in mine],
                    fmt=style,
                    markersize=4,
                    capsize=2,
                    color=f"C{column}",
                    alpha=1 if start == "trained" else 0.5,
                    label=f"K = {steps}" if start == "trained" else None,
                )
        axes.set(xscale="log", xlabel="inner_lr (α)", title=f"cos({pair})")
        axes.axhline(0, color="black", linewidth=0.6)
        axes.grid(alpha=0.3)
    figure.axes[0].legend(title="trained θ; dotted: random θ")
    figure.suptitle(f"{tasks} tasks of glyphs, 5-way 1-shot", size=10)
    figure.savefig(path, dpi=90)


def main(ckpt_path: str, tasks: int) -> None:
    record: dict[str, Any] = {"commit": commit(), "versions": versions(), "machine": machine(torch.device("cpu"))}
    learner = load_learner(ckpt_path)
    torch.manual_seed(0)
    fresh = copy.deepcopy(learner.network)
    for module in fresh.modules():
        if hasattr(module, "reset_parameters"):
            module.reset_parameters()
    data = Glyphs()
    data.prepare_data()
    tasks_of = data.task_set("train")
    batches = [as_task_batch(tasks_of.batch(range(i, i + BATCH))) for i in range(0, tasks, BATCH)]
    points: list[dict[str, Any]] = []
    for inner_lr, inner_steps in product(INNER_LRS, INNER_STEPS):
        point: dict[str, Any] = {"inner_lr": inner_lr, "inner_steps": inner_steps}
        point |= {"cosines": {pair: {} for pair in PAIRS}, "ci95": {pair: {} for pair in PAIRS}}
        point |= {"halves": {name: {} for name in ALGORITHMS}}
        for start, network in (("trained", learner.network), ("random", fresh)):
            found, ci95, halves = measure(network, batches, inner_lr, inner_steps)
            for i, (pair, name) in enumerate(zip(PAIRS, ALGORITHMS, strict=True)):
                point["cosines"][pair][start] = float(found[i])
                point["ci95"][pair][start] = float(ci95[i])
                point["halves"][name][start] = float(halves[i])
        points.append(point)
        print(inner_lr, inner_steps, point["cosines"], point["halves"], flush=True)
    root = Path(__file__).parents[1]
    draw(points, tasks, root / "docs" / "images" / "cosine.png")
    record |= {"tasks": tasks, "shown": SHOWN, "points": points}
    (root / "benchmarks" / "results" / "cosine.json").write_text(json.dumps(record))


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ckpt_path", required=True, help="of a learner of glyphs: fit --config maml.yaml")
    parser.add_argument("--tasks", type=int, default=256)
    arguments = parser.parse_args()
    warnings.filterwarnings("ignore", "inner_steps 1 on the full support set")
    main(arguments.ckpt_path, arguments.tasks)
