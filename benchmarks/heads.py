"""What a head does to tasks of other numbers, and other orders, of classes (benchmarks/results/heads.md).

    python benchmarks/heads.py drawings hub:characters runs/best.ckpt --root data    # ten drawn characters, 20 times
    python benchmarks/heads.py orders runs/best.ckpt                                 # 5-way tasks of glyphs in 8 orders

``root`` holds torchvision's folder omniglot-py.
"""

import argparse
from pathlib import Path

import numpy as np
import torch

from meta_lightning import Glyphs, MetaLearner, load_learner
from meta_lightning.data.omniglot import shrink
from meta_lightning.data.tasks import Array, as_task_batch

CHARACTERS, DRAWS = 10, 20
ORDERS, TASKS, AT_ONCE = 8, 200, 10


def interval(values: Array) -> str:
    """Mean and half-width of the 95 % interval, in per cent."""
    return f"{100 * values.mean():.1f} ± {196 * values.std(ddof=1) / len(values) ** 0.5:.1f}"


def drawn(root: Path, draw: int) -> tuple[Array, Array, Array]:
    """One drawing of each of ten of Omniglot's evaluation characters, the others, and their classes."""
    characters = sorted((root / "omniglot-py/images_evaluation").glob("*/*"))
    rng = np.random.default_rng(draw)
    files = [sorted(characters[i].glob("*.png")) for i in rng.choice(len(characters), CHARACTERS, replace=False)]
    orders = [rng.permutation(len(of_one)) for of_one in files]
    support = [of_one[order[0]] for of_one, order in zip(files, orders, strict=True)]
    queries = [of_one[i] for of_one, order in zip(files, orders, strict=True) for i in order[1:]]
    return shrink(support), shrink(queries), np.repeat(np.arange(CHARACTERS), len(queries) // CHARACTERS)


def drawings(learner: MetaLearner, root: Path) -> str:
    """Accuracy of a learner over draws of characters, and of the nearest drawing by pixels."""
    ours, nearest = np.zeros(DRAWS), np.zeros(DRAWS)
    for draw in range(DRAWS):
        support, queries, y = drawn(root, draw)
        answers = learner.adapt(support, np.arange(CHARACTERS)).predict_proba(queries).argmax(1).numpy()
        distances = np.square(queries[:, None] / 255.0 - support[None] / 255.0).sum((2, 3, 4))
        ours[draw], nearest[draw] = (answers == y).mean(), (distances.argmin(1) == y).mean()
    return f"{interval(ours)}; nearest drawing by pixels {interval(nearest)}"


@torch.no_grad()
def orders(learner: MetaLearner) -> str:
    """Accuracy in each order of the labels, and how much it varies with the order for a task."""
    data = Glyphs(ways=5, shots=1, queries=15)
    data.prepare_data()
    data.setup("test")
    tasks = data.task_set("test")
    accuracy = torch.zeros(ORDERS, TASKS)
    for order in range(ORDERS):
        labels = torch.randperm(5, generator=torch.Generator().manual_seed(order))
        for first in range(0, TASKS, AT_ONCE):
            batch = as_task_batch(tasks.batch(range(first, first + AT_ONCE)))
            batch = batch._replace(support_y=labels[batch.support_y], query_y=labels[batch.query_y])
            right = learner.predict_tasks(batch)[-1].argmax(-1) == batch.query_y
            accuracy[order, first : first + AT_ONCE] = right.float().mean(1)
    means = ", ".join(f"{100 * mean:.1f}" for mean in accuracy.mean(1))
    spread = 100 * (accuracy.amax(0) - accuracy.amin(0))
    of_task = f"standard deviation {100 * accuracy.std(0).mean():.1f}, best less worst {spread.mean():.1f}"
    return f"{means} in each order; of a task: {of_task} in the mean, {spread.max():.1f} at most"


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("drawings", "orders"))
    parser.add_argument("checkpoints", nargs="+")
    parser.add_argument("--root", type=Path, default=Path("data"))
    arguments = parser.parse_args()
    for checkpoint in arguments.checkpoints:
        learner = load_learner(checkpoint)
        said = drawings(learner, arguments.root) if arguments.what == "drawings" else orders(learner)
        print(f"{checkpoint}: {said}", flush=True)
