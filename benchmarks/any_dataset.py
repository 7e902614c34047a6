"""Tasks per second from a data set of one's own, and the lines that it takes, beside learn2learn and easyfsl.

    pip install easyfsl datasets && python benchmarks/any_dataset.py

5-way 1-shot tasks with 5 queries per class, of 60 classes of 20 images, 28×28: a set of torchvision that makes an
image when it is read, one of Hugging Face in memory (where ``datasets`` can be imported), and a folder of PNG files.
"""

import inspect
import itertools
import tempfile
import time
from collections.abc import Callable, Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch.utils.data import Dataset
from torchvision.datasets import FakeData, ImageFolder
from torchvision.transforms import ToTensor

CLASSES, IMAGES, SECONDS = 60, 20, 4.0


def ours(dataset: Any) -> Iterator[Any]:
    from meta_lightning import DatasetTasks

    data = DatasetTasks(dataset, ways=5, shots=1, queries=5, meta_batch_size=1)
    tasks = data.task_set("train")
    return (tasks.batch([number]) for number in itertools.count())


def lazily(dataset: Any) -> Iterator[Any]:
    from meta_lightning import DatasetTasks

    data = DatasetTasks(dataset, ways=5, shots=1, queries=5, meta_batch_size=1, in_memory=False)
    tasks = data.task_set("train")
    return (tasks.batch([number]) for number in itertools.count())


def learn2learn(dataset: Any) -> Iterator[Any]:
    import learn2learn as l2l
    from learn2learn.data.transforms import ConsecutiveLabels, KShots, LoadData, NWays, RemapLabels

    meta = l2l.data.MetaDataset(dataset)
    transforms = [NWays(meta, 5), KShots(meta, 6), LoadData(meta), RemapLabels(meta), ConsecutiveLabels(meta)]
    tasks = l2l.data.Taskset(meta, task_transforms=transforms)
    while True:
        x, y = tasks.sample()
        support = torch.arange(len(x)) % 6 == 0
        yield x[support], y[support], x[~support], y[~support]


def easyfsl(dataset: Any) -> Iterator[Any]:
    from easyfsl.samplers import TaskSampler  # type: ignore[import-not-found]
    from torch.utils.data import DataLoader

    dataset.get_labels = lambda: labels_of(dataset)
    sampler = TaskSampler(dataset, n_way=5, n_shot=1, n_query=5, n_tasks=1_000_000)
    return iter(DataLoader(dataset, batch_sampler=sampler, collate_fn=sampler.episodic_collate_fn))


def labels_of(dataset: Any) -> list[int]:
    """easyfsl asks the data set for its labels."""
    return [int(label) for label in getattr(dataset, "targets", None) or [label for _, label in dataset]]


class Pairs(Dataset[Any]):
    """A set of dicts as pairs, which learn2learn and easyfsl need."""

    def __init__(self, dataset: Any) -> None:
        self.dataset, self.targets = dataset, [*dataset["label"]]

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, index: int) -> Any:
        item = self.dataset[int(index)]
        return torch.as_tensor(item["image"], dtype=torch.float32), item["label"]


def torchvision_set(folder: Path) -> tuple[Any, Any]:
    fake = FakeData(CLASSES * IMAGES, (1, 28, 28), CLASSES, ToTensor())
    return fake, fake


def huggingface_set(folder: Path) -> tuple[Any, Any]:
    import datasets  # type: ignore[import-not-found]
    import pyarrow  # type: ignore[import-not-found]

    images = np.random.default_rng(0).random((CLASSES * IMAGES, 1, 28, 28)).astype(np.float32)
    columns = {"image": images.tolist(), "label": [n % CLASSES for n in range(len(images))]}
    table = datasets.table.InMemoryTable(pyarrow.table(columns))
    made = datasets.Dataset(table, fingerprint="memory").with_format("numpy")
    return made, Pairs(made)


def folder_set(folder: Path) -> tuple[Any, Any]:
    rng = np.random.default_rng(0)
    for number in range(CLASSES * IMAGES):
        path = folder / f"{number % CLASSES:02}" / f"{number}.png"
        path.parent.mkdir(exist_ok=True)
        Image.fromarray(rng.integers(0, 256, (28, 28), np.uint8)).save(path)
    files = ImageFolder(str(folder), ToTensor(), loader=lambda path: Image.open(path).convert("L"))
    return files, files


def tasks_per_second(make: Callable[[Any], Iterator[Any]], dataset: Any) -> tuple[float, float]:
    """Seconds before the first task, and tasks per second afterwards."""
    start = time.perf_counter()
    tasks = make(dataset)
    next(tasks)
    first = time.perf_counter()
    drawn = 0
    while (passed := time.perf_counter() - first) < SECONDS:
        next(tasks)
        drawn += 1
    return first - start, drawn / passed


def main() -> None:
    libraries = {"`DatasetTasks`, in memory": ours, "`DatasetTasks`, read by task": lazily, "learn2learn": learn2learn}
    libraries |= {"easyfsl": easyfsl} if find_spec("easyfsl") else {}
    sets: dict[str, Callable[[Path], tuple[Any, Any]]] = {"torchvision `FakeData`": torchvision_set}
    sets |= {"Hugging Face, in memory": huggingface_set} if find_spec("datasets") else {}
    sets["folder of PNG files"] = folder_set
    lines = {name: len(inspect.getsource(make).strip().splitlines()) - 1 for name, make in libraries.items()}
    rows = ["| data set | tasks from | lines | s before the first task | tasks/s |", "|---|---|---|---|---|"]
    for name, made in sets.items():
        with tempfile.TemporaryDirectory() as folder:
            own, pairs = made(Path(folder))
            for library, make in libraries.items():
                dataset = own if library.startswith("`") else pairs
                try:
                    seconds, rate = tasks_per_second(make, dataset)
                    measured = f"{seconds:.1f} | {rate:,.0f}"
                except TypeError as error:  # easyfsl 1.5 calls a constructor that torch 2.14 no longer has
                    measured = f"does not start with torch {torch.__version__} | {error}"
                extra = len(inspect.getsource(Pairs).splitlines()) if dataset is not own else 0
                extra += len(inspect.getsource(labels_of).splitlines()) - 1 if library == "easyfsl" else 0
                rows.append(f"| {name} | {library} | {lines[library] + extra} | {measured} |")
    print("\n".join(rows))


if __name__ == "__main__":
    main()
