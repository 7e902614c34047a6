"""Resume, test and print tasks where learn2learn cannot be imported and the package has no metadata of an installation.

Arguments: a checkpoint to resume, one to test. Leaves ``kept/last.ckpt``, and logs under ``resumed`` and ``tested``.
"""

import json
import sys
from importlib.metadata import Distribution, PackageNotFoundError
from typing import Any

import torch
from conftest import TINY

from meta_lightning.cli import main
from meta_lightning.data.tasks import FewShotTasks

HIDDEN = ("learn2learn", "meta-lightning")
# classes of 9 samples, and of 7 to 18; the rest are arguments of FewShotTasks
KINDS: list[tuple[list[int], dict[str, Any]]] = [
    ([9] * 12, {"ways": 5, "shots": 2}),
    ([7, 9, 8, 18, 7, 11], {"ways": 3, "shots": 4}),
    ([9] * 12, {"ways": (2, 6), "shots": (1, 5), "block": 4}),
    ([7, 9, 8, 18, 7, 11], {"ways": (2, 6), "shots": 1, "label_space": "split"}),
]


def task_sets() -> list[FewShotTasks]:
    """Tasks over samples that are their own numbers."""
    sets = []
    for sizes, options in KINDS:
        labels = torch.arange(len(sizes)).repeat_interleave(torch.tensor(sizes))
        labels = labels[torch.randperm(len(labels), generator=torch.Generator().manual_seed(0))]
        numbers, classes = torch.arange(len(labels)).unsqueeze(1), range(len(sizes))
        sets.append(FewShotTasks(numbers, labels, classes, queries=2, seed=3, split="val", **options))
    return sets


def drawn() -> list[Any]:
    """Support and query samples and labels of 40 tasks of each kind."""
    batches = [tasks.batch([*range(first, first + 4)]) for tasks in task_sets() for first in range(0, 40, 4)]
    return [[part.tolist() for part in batch] for batch in batches]  # type: ignore[union-attr]


def hide() -> None:
    """Hide learn2learn, and the metadata of the package."""
    found = Distribution.from_name

    def unless_hidden(name: str) -> Distribution:
        if name in HIDDEN:
            raise PackageNotFoundError(name)
        return found(name)

    Distribution.from_name = unless_hidden  # type: ignore[method-assign]
    sys.modules["learn2learn"] = None  # type: ignore[assignment]  # an import then finds none


if __name__ == "__main__":
    hide()
    resume, test = sys.argv[1:]
    at = ["--trainer.default_root_dir=resumed", "--checkpoint.dirpath=kept", "--trainer.max_steps=4"]
    main(["fit", "--config", TINY, "--ckpt_path", resume, *at])
    main(["test", "--ckpt_path", test, "--trainer.default_root_dir=tested"])
    sys.stdout.write(f"{json.dumps(drawn())}\n")
