"""How long a task takes to sample and gather, ours against learn2learn's, and what share of `fit` waits for data.

    OMP_NUM_THREADS=1 python benchmarks/data.py [--omniglot ROOT] [--gathers]    # what was measured: results/data.md

Both draw N-way tasks of K + 15 samples of the same images: 28×28 grey 5-way 1-shot (Omniglot where its folder is given,
else the glyphs) and 84×84 colour 5-way 5-shot (random pixels). learn2learn's Taskset.sample() collates single images,
which it holds as float tensors; ours gathers uint8, and the learner scales it on its device, which is timed beside it.
Milliseconds a task, medians of repeats. With --gathers: other ways to gather the colour images, without the drawing of
the tasks.
"""

import argparse
import itertools
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

from meta_lightning import FOMAML, MAML, Conv4, Glyphs, ImageTasks, MetaLearner, Omniglot, Reptile, TaskDataModule
from meta_lightning.data.cache import LabelledImages
from meta_lightning.data.loading import MetaBatches
from meta_lightning.data.tasks import FewShotTasks, as_task_batch, import_learn2learn


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
    ours.images.sum()  # every page is mapped, as in a training's later minutes; learn2learn's images are in memory
    size = data.meta_batch_size
    tasks = batches * size
    start = [0]

    def draw_ours() -> None:
        for _ in range(batches):
            ours.batch(range(start[0], start[0] + size))
            start[0] += size

    learn2learn = milliseconds(lambda: [theirs.sample() for _ in range(tasks)], tasks)  # type: ignore[attr-defined]
    single = milliseconds(draw_ours, tasks)
    workers = {context: with_workers(ours, size, batches, context) for context in ("fork", "spawn")}
    batch = ours.batch(range(size))
    scaled = milliseconds(lambda: as_task_batch(batch), size)
    described = milliseconds(lambda: [ours.rows(ours.rng(i)) for i in range(tasks)], tasks)
    print(
        f"{name:44} learn2learn {learn2learn:6.3f}   ours {single:6.3f} ({learn2learn / single:4.1f} x)   "
        f"2 workers {', '.join(f'{name} {ms:6.3f} ({learn2learn / ms:4.1f} x)' for name, ms in workers.items())}   "
        f"of ours, description {described:6.3f}; scaling on this CPU afterwards {scaled:6.3f}"
    )


def with_workers(tasks: FewShotTasks, size: int, batches: int, context: str) -> float:
    """Milliseconds a task from two workers that keep running."""
    sampler = range(10**6)
    iterator = iter(
        DataLoader(MetaBatches(tasks, size), None, False, sampler, None, 2, multiprocessing_context=context)
    )
    return milliseconds(lambda: [next(iterator) for _ in range(batches)], batches * size)


def gathers(data: ImageTasks) -> None:
    """Ways to gather the images of a meta-batch, each on the same rows in turn."""
    tasks = data.task_set("train")
    size, K = data.meta_batch_size, data.shots
    images = tasks.images
    images.sum()  # every page is mapped
    drawn = [
        torch.tensor([tasks.rows(tasks.rng(size * j + t)) for t in range(size)]).view(-1, K + data.queries)
        for j in range(40)
    ]
    rows = [torch.cat([r[:, :K].flatten(), r[:, K:].flatten()]) for r in drawn]  # support, query
    cut = size * data.ways * K
    kept = torch.empty((len(rows[0]), *images.shape[1:]), dtype=torch.uint8)
    # numpy asks for huge pages
    huge = torch.from_numpy(np.array(data.load().images))
    ways: dict[str, Callable[[torch.Tensor], object]] = {
        "index_select of support and of query, as FewShotTasks": lambda r: [
            images.index_select(0, part) for part in (r[:cut], r[cut:])
        ],
        "one index_select": lambda r: images.index_select(0, r),
        "one index_select into a buffer that is used again": lambda r: torch.index_select(images, 0, r, out=kept),
        "index_select from memory of huge pages": lambda r: huge.index_select(0, r),
        "the same into that buffer": lambda r: torch.index_select(huge, 0, r, out=kept),
        "one np.take": lambda r: np.take(images.numpy(), r.numpy(), 0),
        "one np.take without checks, into that buffer": lambda r: np.take(
            images.numpy(), r.numpy(), 0, out=kept.numpy(), mode="clip"
        ),
        "one np.take from memory of huge pages": lambda r: np.take(huge.numpy(), r.numpy(), 0),
        "as 64-bit words, one index_select": lambda r: images.flatten(1).view(torch.int64).index_select(0, r),
    }
    for name, gather in ways.items():
        stream = itertools.cycle(rows)
        times = [milliseconds(lambda s=stream, g=gather: g(next(s)), size, repeats=1) for _ in rows]  # type: ignore[misc]
        print(f"{name:56} {statistics.median(times):6.3f}   least {min(times):6.3f}")


def share_of_waiting(name: str, learner: MetaLearner, data: TaskDataModule, steps: int) -> None:
    """The profiler's account of a fit, without its first batch, for which the data set is made."""
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
    trainer.fit(learner, data)
    recorded = trainer.profiler.recorded_durations  # type: ignore[attr-defined]
    (waits,) = (times[1:] for action, times in recorded.items() if action.endswith("train_dataloader_next"))
    (batches,) = (times[1:] for action, times in recorded.items() if action.endswith("run_training_batch"))
    epoch = sum(waits) + sum(batches)
    print(f"fit, {name}, {steps} steps: {sum(waits) / epoch:.2%} of {epoch:.1f} s waited for data")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--omniglot", type=Path, help="folder that holds torchvision's omniglot-py")
    parser.add_argument("--gathers", action="store_true", help="only compare ways to gather")
    arguments = parser.parse_args()
    root = arguments.omniglot
    warnings.filterwarnings("ignore")
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    print(f"torch {torch.__version__}, {torch.get_num_threads()} threads; ms a task")
    colour = Colour(shots=5, meta_batch_size=4)
    if arguments.gathers:
        gathers(colour)
        raise SystemExit
    grey: ImageTasks = Omniglot(str(root)) if root else Glyphs()
    compare(f"{type(grey).__name__} 28×28, 5-way 1-shot 15-query", grey, batches=16)
    compare("84×84 colour, 5-way 5-shot 15-query", colour, batches=24)
    glyphs = Glyphs(train_queries=5, meta_batch_size=8)
    share_of_waiting("glyphs", MAML(Conv4(filters=32), inner_lr=0.2, inner_steps=2), glyphs, 200)
    for algorithm in (MAML, FOMAML, Reptile):
        learner = algorithm(Conv4(5, 3, 84, 32, "max_pool"), inner_lr=0.01, inner_steps=5)
        share_of_waiting(f"84×84 colour, {algorithm.__name__}", learner, colour, 20)
