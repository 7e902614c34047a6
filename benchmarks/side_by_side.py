"""learn2learn's MAML and ours, the same network, settings and tasks: accuracy on test tasks, and time.

    python benchmarks/side_by_side.py --root photographs [--steps 200] [--compile_passes]

The photographs lie as ImageFolderTasks takes them. Conv4 of 32 filters on 84×84 colour, 5-way 1-shot, inner_lr 0.01,
5 inner steps, Adam of 0.001, 5 queries a class in training and 15 in the test. learn2learn's goes task by task, as in
its examples; ours is a fit and a test of Lightning's Trainer. The seconds are those of training.
"""

import argparse
import copy
import logging
import time
import warnings

import lightning as L
import torch
from torch import nn
from torch.nn import functional as F
from workloads import INNER_LR, learn2learn_adapted

from meta_lightning import MAML, Conv4, ImageFolderTasks, TaskMean
from meta_lightning.data.tasks import as_task_batch
from meta_lightning.runs.machine import keep_freed_memory

STEPS = 5


def theirs(network: nn.Module, data: ImageFolderTasks) -> tuple[float, TaskMean]:
    """Seconds of training, and the test tasks' accuracies."""
    from learn2learn import algorithms

    peer = algorithms.MAML(network, lr=INNER_LR)
    optimizer = torch.optim.Adam(network.parameters(), 0.001)
    start = time.perf_counter()
    for batch in data.train_dataloader():
        optimizer.zero_grad()
        for support_x, support_y, query_x, query_y in zip(*as_task_batch(batch), strict=True):
            learner = learn2learn_adapted(peer, STEPS, support_x, support_y)
            (F.cross_entropy(learner(query_x), query_y) / data.meta_batch_size).backward()
        optimizer.step()
    seconds = time.perf_counter() - start
    accuracy = TaskMean()
    for batch in data.test_dataloader():
        for support_x, support_y, query_x, query_y in zip(*as_task_batch(batch), strict=True):
            predictions = learn2learn_adapted(peer, STEPS, support_x, support_y)(query_x)
            accuracy.update((predictions.argmax(1) == query_y).float().mean()[None])
    return seconds, accuracy


def ours(network: nn.Module, data: ImageFolderTasks, compile_passes: bool) -> tuple[float, TaskMean]:
    """The same of ours."""
    learner = MAML(network, inner_lr=INNER_LR, inner_steps=STEPS, gradient_clip_val=None, compile_passes=compile_passes)
    trainer = L.Trainer(
        accelerator="cpu",
        max_epochs=1,
        limit_val_batches=0,
        num_sanity_val_steps=0,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
    )
    start = time.perf_counter()
    trainer.fit(learner, data)
    seconds = time.perf_counter() - start
    trainer.test(learner, data, verbose=False)
    return seconds, learner.evaluation.means["accuracy"]


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--root", required=True)
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--tasks", type=int, default=4, help="a meta-batch")
    parser.add_argument("--test_tasks", type=int, default=600)
    parser.add_argument("--compile_passes", action="store_true")
    arguments = parser.parse_args()
    warnings.filterwarnings("ignore")
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    keep_freed_memory()  # as fit does; learn2learn has it too
    data = ImageFolderTasks(
        arguments.root,
        train_queries=5,
        meta_batch_size=arguments.tasks,
        epoch_length=arguments.steps,
        test_tasks=arguments.test_tasks,
    )
    data.prepare_data()
    torch.manual_seed(0)
    network = Conv4(5, 3, 84, 32, "max_pool")
    runs = {
        "learn2learn": lambda: theirs(copy.deepcopy(network), data),
        "ours": lambda: ours(copy.deepcopy(network), data, arguments.compile_passes),
    }
    for name, run in runs.items():
        seconds, accuracy = run()
        mean, ci95, tasks = accuracy.compute()
        print(f"{name}: {100 * mean:.2f} ± {100 * ci95:.2f} % over {int(tasks)} tasks, {seconds:.0f} s", flush=True)
