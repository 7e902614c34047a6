"""How Reptile's update points beside FOMAML's and MAML's gradient, against inner_lr (α) and inner_steps (K).

    python benchmarks/cosine.py --ckpt_path runs/best.ckpt [--tasks 256]

Reptile's update is θ'−θ averaged over tasks; its negative is compared with the meta-gradients at the same θ, all as one
vector over all parameters: of a checkpoint, and of a random initialisation of its network. What is estimated is the
cosine of the expected updates, from tasks that the checkpoint was not trained on; the interval is a jackknife's over
batches of 8. It writes docs/images/cosine.png and benchmarks/results/cosine.json, of which benchmarks/tables.py makes
the guide's table.
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
from meta_lightning.data.tasks import as_task_batch
from meta_lightning.inner.params import Params
from meta_lightning.runs.machine import commit, machine, versions
from meta_lightning.runs.record import finite

INNER_LRS = (0.001, 0.01, 0.05, 0.2, 0.4)
INNER_STEPS = (1, 2, 5, 10)
SHOWN = (0.01, 0.2)
PAIRS = {"FOMAML, MAML": (1, 0), "Reptile, FOMAML": (2, 1), "Reptile, MAML": (2, 0)}
BATCH = 8
SEED = 1000  # of the tasks; trainings have small ones


def flat(params: Params) -> Tensor:
    return torch.cat([p.detach().flatten() for p in params.values()]).double()


def updates(network: nn.Module, batch: TaskBatch, inner_lr: float, inner_steps: int) -> Tensor:
    """MAML's and FOMAML's meta-gradient and the negative of Reptile's update.  # 3 P"""
    gradients = [
        flat(algorithm(network, inner_lr=inner_lr, inner_steps=inner_steps).meta_gradient(batch)[0])
        for algorithm in (MAML, FOMAML)
    ]
    reptile = Reptile(network, inner_lr=inner_lr, inner_steps=inner_steps)
    support = reptile.support(batch.support_x, batch.support_y, inner_steps)
    mean, _ = reptile.in_passes(reptile.adapt_pass, support)
    return torch.stack([*gradients, flat(reptile.meta_parameters()) - flat(mean)])


def cosines(each: Tensor) -> tuple[Tensor, Tensor]:
    """Each pair's cosine of the expected updates, with the half-width of its interval.  # n 3 P; 3, 3

    Updates of the same tasks share their noise, which raises their cosine, and noise of one's own lowers it: so only
    inner products of different batches count, whose expectation is that of the expected updates. NaN where an update
    cannot be told from noise. The interval is the jackknife's over batches: a bootstrap repeats batches, which is what
    must not be.
    """
    n, gram = len(each), torch.einsum("aip,bjp->abij", each, each)
    gram[range(n), range(n)] = 0
    # to leave a batch out needs the inner products of the batches' vectors only, not the vectors
    weights = torch.cat([torch.ones(1, n), 1 - torch.eye(n)]).double()  # the first takes all, each other all but one
    inner = torch.einsum("ra,rb,abij->rij", weights, weights, gram)
    lengths = inner.diagonal(dim1=1, dim2=2).sqrt()
    found = torch.stack([inner[:, a, b] / (lengths[:, a] * lengths[:, b]) for a, b in PAIRS.values()], -1)
    deviation = ((n - 1) * found[1:].var(0, correction=0)).sqrt()
    return found[0], 1.96 * deviation


def told(point: dict[str, Any], pair: str, start: str) -> bool:
    """Whether a cosine was told from noise: there is one, and its interval is not so wide that it says nothing."""
    ci95 = point["ci95"][pair][start]
    return point["cosines"][pair][start] is not None and ci95 is not None and ci95 < 0.5


def draw(points: list[dict[str, Any]], tasks: int, path: Path) -> None:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(12, 4), layout="constrained")
    for axes, pair in zip(figure.subplots(1, 3, sharey=True), PAIRS, strict=True):
        for column, steps in enumerate(INNER_STEPS):
            mine = [point for point in points if point["inner_steps"] == steps]
            for start, style in (("trained", "o-"), ("random", "s:")):
                known = [point for point in mine if told(point, pair, start)]
                axes.errorbar(
                    [point["inner_lr"] for point in known],
                    [point["cosines"][pair][start] for point in known],
                    [point["ci95"][pair][start] for point in known],
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
    data = Glyphs(seed=SEED)
    data.prepare_data()
    tasks_of = data.task_set("train")
    batches = [as_task_batch(tasks_of.batch(range(i, min(i + BATCH, tasks)))) for i in range(0, tasks, BATCH)]
    points: list[dict[str, Any]] = []
    for inner_lr, inner_steps in product(INNER_LRS, INNER_STEPS):
        point: dict[str, Any] = {"inner_lr": inner_lr, "inner_steps": inner_steps}
        point |= {"cosines": {pair: {} for pair in PAIRS}, "ci95": {pair: {} for pair in PAIRS}}
        for start, network in (("trained", learner.network), ("random", fresh)):
            each = torch.stack([updates(network, batch, inner_lr, inner_steps) for batch in batches])
            for pair, *values in zip(PAIRS, *cosines(each), strict=True):
                point["cosines"][pair][start], point["ci95"][pair][start] = map(finite, map(float, values))
        points.append(point)
        print(inner_lr, inner_steps, point["cosines"], flush=True)
    root = Path(__file__).parents[1]
    draw(points, tasks, root / "docs" / "images" / "cosine.png")
    trained = {name: learner.hparams[name] for name in ("inner_lr", "inner_steps")} | {
        "algorithm": type(learner).__name__
    }
    record |= {"checkpoint": trained, "tasks": tasks, "shown": SHOWN, "points": points}
    (root / "benchmarks" / "results" / "cosine.json").write_text(json.dumps(record))


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ckpt_path", required=True, help="of a learner of glyphs: fit --config maml.yaml")
    parser.add_argument("--tasks", type=int, default=256)
    arguments = parser.parse_args()
    warnings.filterwarnings("ignore", "inner_steps 1 on the full support set")
    main(arguments.ckpt_path, arguments.tasks)
