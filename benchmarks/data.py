"""How long a task takes to sample and gather, ours against learn2learn's, and what share of `fit` waits for data.

    OMP_NUM_THREADS=1 python benchmarks/data.py [--omniglot ROOT]

Both draw N-way tasks of K + 15 samples of the same images: 28×28 grey 5-way 1-shot (Omniglot where its folder is given,
else the glyphs) and 84×84 colour 5-way 5-shot (random pixels). learn2learn's Taskset.sample() collates single images,
which it holds as float tensors; ours gathers uint8, and the learner scales it on its device, which is timed beside it.
Milliseconds a task, medians of repeats.
"""

import argparse
import logging
import statistics
import time
import warnings
from collections.abc import Callable
from pathlib import Path

import lightning as L
import numpy as np
import torch
from torch.utils.data import DataLoader, TensorDataset

from meta_lightning import MAML, Conv4, Glyphs, ImageTasks, Omniglot
from meta_lightning.data.cache import LabelledImages
from meta_lightning.loading import MetaBatches
from meta_lightning.tasks import FewShotTasks, as_task_batch, import_learn2learn


class Colour(ImageTasks):
    """Random pixels of the size of mini-ImageNet's, 100 classes of 100."""

    cache_name = "benchmark-colour-84"

    def build(self) -> LabelledImages:
        images = np.random.default_rng(0).integers(0, 256, (10_000, 3, 84, 84), dtype=np.uint8)
        return LabelledImages(images, np.arange(10_000) // 100, np.arange(100).astype(str), np.arange(100) % 3)


def milliseconds(draw: Callable[[], object], tasks: int, repeats: int = 5) -> float:
    """Median time a task of a function that draws so many."""
    draw()
    times = []
    for _ in range(repeats):
        start = time.perf_counter()
        draw()
        times.append((time.perf_counter() - start) / tasks * 1e3)
    return statistics.median(times)


def learn2learn_taskset(data: ImageTasks) -> object:
    """learn2learn's own pipeline over the training classes of a data module, images in memory as floats."""
    l2l = import_learn2learn()
    labelled = data.load()
    rows = np.flatnonzero(np.isin(labelled.labels, labelled.members("train")))
    images = torch.from_numpy(labelled.images[rows]).float() / 255
    labels = labelled.labels[rows]
    dataset = l2l.data.MetaDataset(
        TensorDataset(images, torch.from_numpy(labels)), indices_to_labels=dict(enumerate(labels.tolist()))
    )
    transforms = [
        l2l.data.transforms.NWays(dataset, data.ways),
        l2l.data.transforms.KShots(dataset, data.shots + data.queries),
        l2l.data.transforms.LoadData(dataset),
        l2l.data.transforms.RemapLabels(dataset),
        l2l.data.transforms.ConsecutiveLabels(dataset),
    ]
    return l2l.data.Taskset(dataset, transforms)


def compare(name: str, data: ImageTasks, batches: int) -> None:
    theirs = learn2learn_taskset(data)
    ours = data.task_set("train")
    assert isinstance(ours, FewShotTasks)
    size = data.meta_batch_size
    tasks = batches * size
    start = [0]

    def draw_ours() -> None:
        for _ in range(batches):
            ours.batch(range(start[0], start[0] + size))
            start[0] += size

    learn2learn = milliseconds(lambda: [theirs.sample() for _ in range(tasks)], tasks)  # type: ignore[attr-defined]
    single = milliseconds(draw_ours, tasks)
    loader = DataLoader(MetaBatches(ours, size), None, sampler=range(10**6), num_workers=2, persistent_workers=True)
    iterator = iter(loader)
    workers = milliseconds(lambda: [next(iterator) for _ in range(batches)], tasks)
    batch = ours.batch(range(size))
    scaled = milliseconds(lambda: as_task_batch(batch), size)
    described = milliseconds(lambda: [ours.rows(i) for i in range(tasks)], tasks)
    print(
        f"{name:44} learn2learn {learn2learn:6.3f}   ours {single:6.3f} ({learn2learn / single:4.1f} x)   "
        f"2 workers {workers:6.3f} ({learn2learn / workers:4.1f} x)   "
        f"of ours, description {described:6.3f}; scaling on this CPU afterwards {scaled:6.3f}"
    )


def share_of_waiting(steps: int) -> None:
    """The profiler's account of a fit on the glyph configuration."""
    data = Glyphs(train_queries=5, meta_batch_size=8)
    trainer = L.Trainer(
        accelerator="cpu",
        max_steps=steps,
        limit_val_batches=0,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        profiler="simple",
    )
    trainer.fit(MAML(Conv4(filters=32), inner_lr=0.2, inner_steps=2), data)
    recorded = trainer.profiler.recorded_durations  # type: ignore[attr-defined]
    waiting = sum(sum(times) for action, times in recorded.items() if action.endswith("train_dataloader_next"))
    epoch = sum(recorded["run_training_epoch"])
    print(f"fit on glyphs, {steps} steps: {waiting / epoch:.1%} of {epoch:.1f} s waited for data")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--omniglot", type=Path, help="folder that holds torchvision's omniglot-py")
    root = parser.parse_args().omniglot
    warnings.filterwarnings("ignore")
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    print(f"torch {torch.__version__}, {torch.get_num_threads()} threads; ms a task")
    grey: ImageTasks = Omniglot(str(root)) if root else Glyphs()
    compare(f"{type(grey).__name__} 28×28, 5-way 1-shot 15-query", grey, batches=8)
    compare("84×84 colour, 5-way 5-shot 15-query", Colour(shots=5, meta_batch_size=4), batches=4)
    share_of_waiting(200)
